"""The Modelfile, and `ollama create`.

Ollama renders chats with a Go template of its own; what the GGUF's Jinja says is ignored by some versions. So the Jinja is
compared with what known families of templates would write, and the Go template of the one that agrees is written out.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from sclite.errors import DataError, ScliteError, UsageError
from sclite.student.base import Messages
from sclite.student.chat_template import render_chat

Around = tuple[str, str]
"""What stands before and after a message's text."""


@dataclass(frozen=True)
class Family:
    """A chat format. `system_in`: the system text is a message of its own ("own"), or opens the "first" or "last" user's."""

    name: str
    user: Around
    assistant: Around
    opening: str
    stops: tuple[str, ...]
    system: Around = ("", "")
    system_in: str = "own"

    def render(self, messages: Messages) -> str:
        """The chat as this format writes it, up to where the assistant begins. BOS is left to the runtime."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        host = {"own": -1, "first": users[0], "last": users[-1]}[self.system_in]
        text = ""
        for i, message in enumerate(messages):
            before, after = getattr(self, message["role"])
            content = message["content"]
            if message["role"] == "system":
                text += before + content + after if self.system_in == "own" else ""
            else:
                text += before + (f"{system}\n\n" if i == host and system else "") + content + after
        return text + self.opening

    def go_template(self) -> str:
        """The same as a Go template for Ollama. An assistant's text that comes last follows the opening, to be continued."""
        merged = {
            "own": "",
            "first": '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}',
            "last": "{{ if and $last $system }}{{ $system }}\n\n{{ end }}",
        }[self.system_in]
        opening = f"{{{{ if $last }}}}{self.opening}{{{{ end }}}}"
        system = (
            f'{{{{ if eq .Role "system" }}}}{self.system[0]}{{{{ .Content }}}}{self.system[1]}{{{{ else }}}}'
        )
        own = self.system_in == "own"
        return (
            ("" if own else "{{- $system := .System }}")
            + "{{- range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + (system if own else "")
            + '{{ if eq .Role "user" }}'
            + f"{self.user[0]}{merged}{{{{ .Content }}}}{self.user[1]}{opening}"
            + '{{ else if eq .Role "assistant" }}'
            + f"{{{{ if $last }}}}{self.opening}{{{{ .Content }}}}"
            + f"{{{{ else }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}{{{{ end }}}}"
            + ("{{ end }}" if not own else "{{ end }}{{ end }}")
            + "{{ end }}"
        )


def families(eos: str = "</s>") -> list[Family]:
    """The formats we know; `eos` is the model's end token, which some of them write after an answer."""
    found = [
        Family(
            "chatml",
            user=("<|im_start|>user\n", "<|im_end|>\n"),
            assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
            system=("<|im_start|>system\n", "<|im_end|>\n"),
            opening="<|im_start|>assistant\n",
            stops=("<|im_end|>",),
        ),
        Family(
            "llama-3",
            user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
            system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
            opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
            stops=("<|eot_id|>",),
        ),
        Family(
            "user-assistant",
            user=("User: ", "\n\n"),
            assistant=("Assistant: ", eos),
            system=("", "\n\n"),
            opening="Assistant:",
            stops=(eos, "User:"),
        ),
        Family(
            "gemma",
            user=("<start_of_turn>user\n", "<end_of_turn>\n"),
            assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
            opening="<start_of_turn>model\n",
            stops=("<end_of_turn>",),
            system_in="first",
        ),
        Family(
            "alpaca",
            user=("### Instruction:\n", "\n\n"),
            assistant=("### Response:\n", eos + "\n\n"),
            system=("", "\n\n"),
            opening="### Response:\n",
            stops=(eos, "### Instruction:"),
        ),
    ]
    mistral = product(("[INST] ", "[INST]"), (" [/INST]", "[/INST]"), (" ", ""), ("first", "last"))
    for before, after, space, place in mistral:
        answer = (space, eos)
        found.append(Family("mistral", (before, after), answer, "", (eos,), system_in=place))
    v7 = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    for space in (" ", ""):
        system = (v7[0] + space, v7[1])
        found.append(
            Family("mistral", ("[INST]" + space, "[/INST]"), (space, eos), "", (eos,), system=system)
        )
    return found


PROBES: tuple[Messages, ...] = (
    (
        {"role": "system", "content": "Rule one."},
        {"role": "user", "content": "First question?"},
    ),
    (
        {"role": "system", "content": "Rule one."},
        {"role": "user", "content": "First question?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Second question?"},
    ),
)


def detect_family(chat_template: str, *, bos: str = "", eos: str = "") -> Family | None:
    """The family that writes the probe chats exactly as the Jinja template does, or None."""
    try:
        texts = [render_chat(chat_template, probe, bos_token=bos, eos_token=eos) for probe in PROBES]
    except DataError:
        return None
    texts = [text.removeprefix(bos) for text in texts]
    for family in families(eos):
        family = replace(family, opening=family.opening + _empty_thought(texts[0]))
        candidates = [family]
        head, found, _ = texts[0].partition(PROBES[0][0]["content"])
        if found and family.system_in == "own" and family.system[0] and head.startswith(family.system[0]):
            candidates.append(replace(family, system=(head, family.system[1])))  # Llama 3.1 puts dates there
        for candidate in candidates:
            written = "".join((*candidate.system, *candidate.user, *candidate.assistant, candidate.opening))
            if '"""' in written or "{{" in written:
                continue  # it would end TEMPLATE, or be run by Ollama
            if texts == [candidate.render(probe) for probe in PROBES]:
                return candidate
    return None


def _empty_thought(text: str) -> str:
    """The empty think block that thinking models are given when they shall not think, at the end of a prompt."""
    found = re.search(r"<think>\s*</think>\s*$", text)
    return found[0] if found else ""


def modelfile(
    gguf_name: str,
    chat_template: str,
    *,
    system: str = "",
    stop: tuple[str, ...] = (),
    num_ctx: int = 8192,
    bos: str = "",
    eos: str = "",
) -> tuple[str, list[str]]:
    """The text of a Modelfile for a GGUF that lies beside it, and warnings.

    `chat_template` is the model's Jinja, `bos` and `eos` its tokens as text, `num_ctx` in tokens. Stops are those of the
    family, the model's end token and `stop`. For a template of no known family TEMPLATE is left out, with a warning.
    """
    if '"""' in system or system.endswith('"'):
        raise DataError(
            'the system prompt holds """ or ends in ", which a Modelfile cannot',
            "change prompts/student_system",
        )
    warnings = []
    family = detect_family(chat_template, bos=bos, eos=eos)
    lines = [f"FROM ./{gguf_name}"]
    if family:
        lines.append(f'TEMPLATE """{family.go_template()}"""')
        plain = (PROBES[0][1],)
        if render_chat(chat_template, plain, bos_token=bos, eos_token=eos).removeprefix(bos) != family.render(
            plain
        ):
            warnings.append(
                "without a system prompt the model's own template writes one; in Ollama always give one"
            )
        if re.search(r"Date.*\d{4}", family.system[0]):
            warnings.append(
                "the model's own template writes a date before the system prompt; here it is fixed"
            )
    else:
        warnings.append(
            "the chat template is of no family we know: TEMPLATE is left out, and Ollama uses the one inside the GGUF "
            "or guesses; compare `ollama show --template` with it"
        )
    if system:
        lines.append(f'SYSTEM """{system}"""')
    stops = dict.fromkeys([*(family.stops if family else ()), *([eos] if eos else []), *stop])
    lines += [f"PARAMETER stop {_quoted(text)}" for text in stops if text]
    lines += [f"PARAMETER num_ctx {num_ctx}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n", warnings


def _quoted(text: str) -> str:
    if '"' in text or "\n" in text:
        raise DataError(
            f"the stop {text!r} holds a quote or a newline, which a Modelfile cannot", "use another stop"
        )
    return f'"{text}"'


def create(name: str, modelfile_path: Path) -> str:
    """Run `ollama create NAME -f MODELFILE`; returns what it printed. ScliteError when ollama is missing or refuses."""
    if not re.fullmatch(r"[A-Za-z0-9][\w./:-]*", name):
        raise UsageError(
            f"export.ollama = {name!r} is not a name for a model",
            "use letters, digits and . _ - / : as in my-model:v1",
        )
    program = shutil.which("ollama")
    if program is None:
        raise ScliteError(
            "ollama is not installed", "install it: curl -fsSL https://ollama.com/install.sh | sh"
        )
    command = [program, "create", name, "-f", str(modelfile_path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ScliteError(
            f"ollama create {name} failed: {lines[-1] if lines else 'no reason given'}",
            "is the server running? start it with: ollama serve",
        )
    return done.stdout
