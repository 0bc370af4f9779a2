"""Write a Modelfile, and run `ollama create`.

Ollama renders chats with a Go template, and some versions ignore the Jinja template in the GGUF. So the Jinja template is
compared with known chat formats, and the Go template of the matching one is written.
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

Affixes = tuple[str, str]
"""The text before and after the content of a message."""


@dataclass(frozen=True)
class Family:
    """A chat format. `system_in`: the system text is a message of its own ("own") or starts the "first" or "last" user turn."""

    name: str
    user: Affixes
    assistant: Affixes
    opening: str
    stops: tuple[str, ...]
    system: Affixes = ("", "")
    system_in: str = "own"

    def render(self, messages: Messages) -> str:
        """The chat in this format, up to where the assistant begins, without BOS, which the runtime adds."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        host = {"own": -1, "first": users[0], "last": users[-1]}[self.system_in]
        text = ""
        for i, message in enumerate(messages):
            if message["role"] == "system" and self.system_in != "own":
                continue
            before, after = getattr(self, message["role"])
            text += before + (f"{system}\n\n" if i == host and system else "") + message["content"] + after
        return text + self.opening

    def go_template(self) -> str:
        """The same format as a Go template for Ollama. A final assistant message follows the opening, to be continued."""
        inline = {
            "own": "",
            "first": '{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}',
            "last": "{{ if and $last $system }}{{ $system }}\n\n{{ end }}",
        }[self.system_in]
        system, user, assistant = (
            f"{before}{{{{ .Content }}}}{after}"
            for before, after in (self.system, (self.user[0] + inline, self.user[1]), self.assistant)
        )
        turns = (
            f'{{{{ if eq .Role "user" }}}}{user}{{{{ if $last }}}}{self.opening}{{{{ end }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{{{{ if $last }}}}{self.opening}{{{{ .Content }}}}'
            f"{{{{ else }}}}{assistant}{{{{ end }}}}{{{{ end }}}}"
        )
        if self.system_in == "own":
            turns = f'{{{{ if eq .Role "system" }}}}{system}{{{{ else }}}}{turns}{{{{ end }}}}'
        loop = "{{- range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        return (
            "" if self.system_in == "own" else "{{- $system := .System }}"
        ) + f"{loop}{turns}{{{{ end }}}}"


def families(eos: str = "</s>") -> list[Family]:
    """The known chat formats; `eos` is the model's end token, which some of them put after an answer."""
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
        found.append(Family("mistral", (before, after), (space, eos), "", (eos,), system_in=place))
    for space in (" ", ""):  # v7, with a system message of its own
        user, system = ("[INST]" + space, "[/INST]"), ("[SYSTEM_PROMPT]" + space, "[/SYSTEM_PROMPT]")
        found.append(Family("mistral", user, (space, eos), "", (eos,), system=system))
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
    """The family that renders the probe chats exactly as the Jinja template does, or None."""
    try:
        texts = [render_chat(chat_template, probe, {"bos_token": bos, "eos_token": eos}) for probe in PROBES]
    except DataError:
        return None
    texts = [text.removeprefix(bos) for text in texts]
    # with thinking off, the prompt of a thinking model ends in an empty block
    empty_thought = re.search(r"(<think>\s*</think>\s*)?$", texts[0])[0]
    for family in families(eos):
        family = replace(family, opening=family.opening + empty_thought)
        candidates = [family]
        head, found, _ = texts[0].partition(PROBES[0][0]["content"])
        if found and family.system_in == "own" and family.system[0] and head.startswith(family.system[0]):
            candidates.append(replace(family, system=(head, family.system[1])))  # Llama 3.1 puts dates there
        for candidate in candidates:
            literals = "".join((*candidate.system, *candidate.user, *candidate.assistant, candidate.opening))
            if '"""' in literals or "{{" in literals:
                continue  # it would end TEMPLATE, or Ollama would execute it
            if texts == [candidate.render(probe) for probe in PROBES]:
                return candidate
    return None


def build_modelfile(
    gguf_name: str,
    chat_template: str,
    *,
    system: str = "",
    num_ctx: int = 8192,
    bos: str = "",
    eos: str = "",
) -> tuple[str, list[str]]:
    """The text of a Modelfile for a GGUF in the same folder, and warnings.

    `chat_template` is the model's Jinja template, `bos` and `eos` are its tokens as text, `num_ctx` is in tokens. Stops are
    those of the family and the model's end token. Without a matching family there is a warning instead of a TEMPLATE.
    """
    if '"""' in system or system.endswith('"'):
        raise DataError(
            'a Modelfile cannot hold a system prompt that contains """ or ends in "',
            "change prompts/student_system",
        )
    warnings = []
    family = detect_family(chat_template, bos=bos, eos=eos)
    lines = [f"FROM ./{gguf_name}"]
    if family:
        lines.append(f'TEMPLATE """{family.go_template()}"""')
        question = (PROBES[0][1],)
        text = render_chat(chat_template, question, {"bos_token": bos, "eos_token": eos})
        if text.removeprefix(bos) != family.render(question):
            warnings.append(
                "the chat template adds a default system prompt, which Ollama does not: always set one in Ollama"
            )
        if re.search(r"Date.*\d{4}", family.system[0]):
            warnings.append(
                "the chat template adds the current date to the system prompt; the Modelfile has a fixed date"
            )
    else:
        warnings.append(
            "the chat template matches no known family, so the Modelfile has no TEMPLATE: Ollama uses the template in the "
            "GGUF or guesses one; check it with `ollama show --template`"
        )
    if system:
        lines.append(f'SYSTEM """{system}"""')
    for stop in dict.fromkeys([*(family.stops if family else ()), eos]):
        if '"' in stop or "\n" in stop:
            raise DataError(
                f"a Modelfile cannot hold the stop {stop!r}, which contains a quote or a newline",
                "use a student with another end token",
            )
        lines += [f'PARAMETER stop "{stop}"'] if stop else []
    lines += [f"PARAMETER num_ctx {num_ctx}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n", warnings


def create_model(name: str, modelfile_path: Path) -> str:
    """Run `ollama create NAME -f MODELFILE` and return its output. Raises ScliteError if ollama is missing or fails."""
    if not re.fullmatch(r"[A-Za-z0-9][\w./:-]*", name):
        raise UsageError(
            f"export.ollama = {name!r} is not a valid model name",
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
