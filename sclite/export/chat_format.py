"""Derive a chat format from the output of a chat template, and write it as a small Jinja template and as a Go template.

Runtimes differ in what they pass to a chat template (tools, thinking, the date), and Ollama needs a Go template. So the
exported model gets a template that uses only roles and contents and renders what the student was trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sclite.config import Config
from sclite.errors import DataError
from sclite.export.tensors import read_json
from sclite.student.base import Messages
from sclite.student.chat_template import render_chat
from sclite.student.tokenization import end_id, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[Messages, bool], str]
"""Renders messages, with (True) or without (False) the prompt for an answer."""
ROLES = {"s": "system", "u": "user", "a": "assistant"}
SPACES = " \n"
"""The whitespace that is tried at the ends of a content. A template that strips both strips all whitespace."""


def _chat(roles: str, *contents: str) -> Messages:
    return tuple({"role": ROLES[role], "content": text} for role, text in zip(roles, contents, strict=True))


_MANY = ("Be brief.", "What is 2 + 3?", "It is 5.", "And 7 - 4?", "It is 3.", "Thanks. And 10 / 5?")
CHATS: dict[str, Messages] = {
    "system and user": _chat("su", *_MANY[:2]),
    "user alone": _chat("u", _MANY[1]),
    "many turns": _chat("suauau", *_MANY),
    "assistant last": _chat("suaua", *_MANY[:5]),
    "quotes and braces": _chat(
        "suau", "'a' \"b\" `c`", "{{ messages }} {% if x %} {# n #}", '"""{{ .System }}"""', "\\n </s> $x"
    ),
    "leading spaces": _chat("suauau", *(f"  \n {text}  x\n\n  " for text in _MANY)),
    "empty system": _chat("suau", "", *_MANY[1:4]),
    "unicode": _chat("suau", "Réponds en français.", "数学: ∑ 2ⁿ?", "∞ 🙂", "Größe? ｜end｜"),
}
"""Chats that a derived template must render exactly as the original does."""


class Turn(NamedTuple):
    """The messages of a role: the text around a content, and which SPACES are stripped from its two ends."""

    before: str
    after: str
    left: str = ""
    right: str = ""


@dataclass(frozen=True)
class ChatFormat:
    """Every chat is `start`, its turns, and then `opening` (the prompt for an answer) or `closing`.

    `system_in`: the system text is a separate turn ("own"), or comes before the content of the "first" or "last" user
    turn, which is then `host`. `final` and `prefilled` are the assistant's turn at the end of a chat, without and with the
    prompt for an answer. `dropped` is the original's default system prompt, which the derived templates do not have.
    """

    start: str
    system: Turn
    system_in: str
    empty_system: bool
    user: Turn
    host: Turn
    assistant: Turn
    final: Turn
    prefilled: Turn
    opening: str
    closing: str
    dropped: str

    def jinja(self) -> str:
        """The format as a Jinja template without any option."""

        def content(message: str, turn: Turn) -> str:
            text = f'{message}["content"]'
            if turn.left == turn.right == SPACES:
                return f"({text} | trim)"
            for method, spaces in (("lstrip", turn.left), ("rstrip", turn.right)):
                if spaces:
                    text += f".{method}({_quote(spaces) if spaces != SPACES else ''})"
            return text

        def write(*parts: str) -> str:
            return f"{{{{- {' + '.join(part for part in parts if part)} -}}}}"

        def show(turn: Turn, *inside: str) -> str:
            return write(_quote(turn.before), *inside, content("message", turn), _quote(turn.after))

        separate = self.system_in == "own"
        system = "message" if separate else "messages[0]"
        has_system = f'{system}["role"] == "system"'
        if not self.empty_system:
            has_system += f' and {system}["content"]'
        lines = [write(_quote(self.start))] if self.start else []
        if separate:
            lines += ["{%- for message in messages -%}", f"{{%- if {has_system} -%}}", show(self.system)]
        else:
            host = 'turns | length - 1 if turns[-1]["role"] == "user" else 0'
            before, after = _quote(self.system.before), _quote(self.system.after)
            lines += [
                '{%- set turns = messages[1:] if messages[0]["role"] == "system" else messages -%}',
                f"{{%- set host = {host if self.system_in == 'last' else 0} -%}}",
                "{%- for message in turns -%}",
                f"{{%- if loop.index0 == host and {has_system} -%}}",
                show(self.host, before, content(system, self.system), after),
            ]
        lines += ['{%- elif message["role"] == "user" -%}', show(self.user)]
        lines += ['{%- elif message["role"] == "assistant" -%}']
        answer, ends = self.assistant, (self.opening, self.closing)
        if [self.prefilled, self.final] == [answer._replace(after=answer.after + end) for end in ends]:
            lines += [show(answer), "{%- endif -%}", "{%- endfor -%}"]
            last = ["{%- endif -%}"]
        else:
            lines += ["{%- if not loop.last -%}", show(answer), "{%- elif add_generation_prompt -%}"]
            lines += [show(self.prefilled), "{%- else -%}", show(self.final), "{%- endif -%}"]
            lines += ["{%- endif -%}", "{%- endfor -%}", '{%- if messages[-1]["role"] != "assistant" -%}']
            last = ["{%- endif -%}", "{%- endif -%}"]
        lines += ["{%- if add_generation_prompt -%}", write(_quote(self.opening) or '""')]
        lines += ["{%- else -%}", write(_quote(self.closing))] if self.closing else []
        return "\n".join([*lines, *last])

    def go_template(self, bos: str = "") -> str:
        """The format as a Go template for Ollama. `bos`: the text of the BOS token, if the runtime adds it itself.

        A final assistant message follows the opening and stays open: Ollama continues it.
        """
        strips: dict[tuple[str, str], str] = {}

        def content(value: str, turn: Turn) -> str:
            ends = turn.left, turn.right
            if not any(ends):
                return f"{{{{ {value} }}}}"
            return f'{{{{ template "{strips.setdefault(ends, f"strip{len(strips)}")}" {value} }}}}'

        def show(turn: Turn, inside: str = "") -> str:
            return _go(turn.before) + inside + content(".Content", turn) + _go(turn.after)

        opening, user, prepare = _go(self.opening), show(self.user), ""
        begin, end = ("", "") if self.empty_system else ("{{ if .Content }}", "{{ end }}")
        if self.system_in == "own":
            system = begin + show(self.system) + end
            user = f'{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
        else:
            found = begin + "{{ $found = true }}" + end
            host = "{{ $host = $i }}"
            host = host if self.system_in == "last" else f"{{{{ if lt $host 0 }}}}{host}{{{{ end }}}}"
            prepare = (
                '{{ $system := "" }}{{ $found := false }}{{ $host := -1 }}{{ range $i, $_ := .Messages }}'
                f'{{{{ if eq .Role "system" }}}}{{{{ $system = .Content }}}}{found}'
                f'{{{{ else if eq .Role "user" }}}}{host}{{{{ end }}}}{{{{ end }}}}'
            )
            inside = _go(self.system.before) + content("$system", self.system) + _go(self.system.after)
            user = (
                f'{{{{ if eq .Role "user" }}}}{{{{ if and $found (eq $i $host) }}}}{show(self.host, inside)}'
                f"{{{{ else }}}}{user}{{{{ end }}}}"
            )
        assistant = show(self.assistant)
        return (
            "".join(_go_strip(name, *ends) for ends, name in strips.items())
            + prepare
            + _go(self.start.removeprefix(bos))
            + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + f"{user}{{{{ if $last }}}}{opening}{{{{ end }}}}"
            + f'{{{{ else if eq .Role "assistant" }}}}{{{{ if $last }}}}{opening}{{{{ .Content }}}}'
            + f"{{{{ else }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
        )


def derive_format(render: Render, bos: str = "") -> ChatFormat:
    """Derive the format from the way `render` renders chats. `bos` is the text of the BOS token.

    Raises DataError, with the reason, for a template that uses more than roles and contents.
    """

    def gaps(roles: str, generation_prompt: bool) -> tuple[str, list[str]]:
        """The roles in the order of the text, and the texts before, between and after the contents."""
        marks = [f"Q{ROLES[role]}{i}Q" for i, role in enumerate(roles)]
        text = render(_chat(roles, *marks), generation_prompt)
        for role, mark in zip(roles, marks, strict=True):
            if text.count(mark) != 1:
                raise _refusal(f"it drops, repeats or changes the content of the {ROLES[role]}'s messages")
        order = sorted(range(len(roles)), key=lambda i: text.index(marks[i]))
        return "".join(roles[i] for i in order), re.split("|".join(marks), text)

    def stripped(roles: str, index: int, generation_prompt: bool = True) -> tuple[str, str]:
        """Which SPACES are stripped from the left and right end of the content at `index`."""

        def length(before: str, after: str) -> int:
            contents = [f"{before}Q{after}" if i == index else "Q" for i in range(len(roles))]
            return len(render(_chat(roles, *contents), generation_prompt))

        whole = length("", "")
        return (
            "".join(space for space in SPACES if length(space, "") == whole),
            "".join(space for space in SPACES if length("", space) == whole),
        )

    begin, to_assistant, to_user, *_, ending = gaps("uau", True)[1]
    user_end = gaps("u", False)[1][-1]
    _, to_final, final_end = gaps("ua", False)[1]
    _, to_prefilled, prefilled_end = gaps("ua", True)[1]
    after_user = _shared(to_assistant, ending, user_end, to_final, to_prefilled)
    before_user = _shared(begin, to_user[len(_shared(to_user, final_end)) :], end=True)
    order, found = gaps("suauau", True)
    empty, question = render(_chat("su", "", "Q"), True), f"{before_user}Q{ending}"
    start, dropped = begin.removesuffix(before_user), ""
    if order == "uauasu":
        system_in, before_system, after_system = "last", found[4].removeprefix(to_user), found[5]
    elif order != "suauau":
        raise _refusal("it moves the system prompt")
    elif found[1].endswith(before_user):
        system_in, before_system, after_system = "own", found[0], found[1].removesuffix(before_user)
        if not before_system.startswith(start):  # a chat without a system prompt gets the template's own
            bare = empty.removesuffix(question)  # .. but sometimes not with an empty system prompt
            known = bare if start.startswith(bare) and before_system.startswith(bare) else bos
            known = "" if known in before_user else known  # SmolLM2 has <|im_start|> as BOS
            dropped = start.removeprefix(known)
            start = start.removesuffix(dropped)
        before_system = before_system.removeprefix(start)
    else:
        system_in, before_system, after_system = "first", found[0].removeprefix(begin), found[1]
    form = ChatFormat(
        start=start,
        system=Turn(before_system, after_system, *stripped("su", 0)),
        system_in=system_in,
        empty_system=empty not in (f"{begin}Q{ending}", start + question),
        user=Turn(before_user, after_user, *stripped("uau", 2)),
        host=Turn(before_user, after_user, *stripped("su", 1)),
        assistant=Turn(
            to_assistant.removeprefix(after_user), to_user.removesuffix(before_user), *stripped("uau", 1)
        ),
        final=Turn(to_final.removeprefix(after_user), final_end, *stripped("ua", 1, False)),
        prefilled=Turn(to_prefilled.removeprefix(after_user), prefilled_end, *stripped("ua", 1)),
        opening=ending.removeprefix(after_user),
        closing=user_end.removeprefix(after_user),
        dropped=dropped,
    )
    template = form.jinja()
    for name, chat in CHATS.items():
        for generation_prompt in (True, False):
            wanted = render(chat, generation_prompt)
            if name == "user alone" or (name == "empty system" and not form.empty_system):
                wanted = start + wanted.removeprefix(start).removeprefix(dropped)
            text = render_chat(template, chat, generation_prompt=generation_prompt)
            if text != wanted:
                pairs = enumerate(zip(text, wanted, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(wanted)))
                raise _refusal(
                    f"it uses more than roles and contents. The chat {name!r} has "
                    f"{wanted[max(0, at - 20) : at + 40]!r}, expected from shorter chats: {text[max(0, at - 20) : at + 40]!r}"
                )
    return form


def trained_format(config: Config, tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The format that a student is trained on; None if its own template is kept.

    Raises DataError, with the reason, for a template that uses more than roles and contents.
    """
    if config.export.keep_template:
        return None
    return derive_format(partial(prompt_text, tokenizer), tokenizer.bos_token or "")


def write_format(form: ChatFormat, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Apply the format to a model folder: its chat template, its end token, and whether text begins with BOS.

    Runtimes put BOS before a prompt if the tokenizer does so with plain texts; training follows the chat template.
    """
    (folder / "chat_template.jinja").write_text(form.jinja(), encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    changes: dict[str, object] = {"chat_template": None}
    end = end_id(tokenizer)
    if end != tokenizer.eos_token_id:
        changes["eos_token"] = tokenizer.convert_ids_to_tokens(end)
    bos = tokenizer.bos_token or ""
    if bos and not form.start.startswith(bos):
        changes["add_bos_token"] = False  # without it, llama.cpp adds one for some vocabularies
        if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
            _edit(folder / "tokenizer.json", {"post_processor": None})  # takes precedence over add_bos_token
    _edit(folder / "tokenizer_config.json", changes)
    if "eos_token" in changes:
        _edit(folder / "generation_config.json", {"eos_token_id": end})


def _edit(path: Path, changes: dict[str, object]) -> None:
    """Change keys of a JSON object in a file, if the file exists; None removes a key."""
    if path.is_file():
        kept = {key: value for key, value in {**read_json(path), **changes}.items() if value is not None}
        path.write_text(json.dumps(kept, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _refusal(reason: str) -> DataError:
    return DataError(
        f"the chat template cannot be reduced to what was trained: {reason}",
        "use --set export.keep_template=true to export the model's own template, and check how your runtime renders it",
    )


_ATOM = re.compile(r"<[^<>\n]{1,60}>|\[[^\[\]\n]{1,60}\]|\w+|.", re.DOTALL)


def _shared(*texts: str, end: bool = False) -> str:
    """The longest common start, or end, that does not split a word or a tag."""
    order = -1 if end else 1
    places = zip(*(_ATOM.findall(text)[::order] for text in texts), strict=False)
    found = [atoms[0] for atoms in takewhile(lambda atoms: len(set(atoms)) == 1, places)]
    return "".join(found[::order])


# -- texts as source code --------------------------------------------------------------------------------------------


def _quote(text: str) -> str:
    """A literal in Jinja and in Go; empty if the text is empty."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _go(text: str) -> str:
    """A text in a Go template, so that it neither begins an action nor ends a string of a Modelfile."""
    return f"{{{{ {_quote(text)} }}}}" if re.search(r'["{]', text) else text


def _go_strip(name: str, left: str, right: str) -> str:
    """Go templates that write their argument without the whitespace at its ends, one character per call."""

    def step(name: str, spaces: str, index: str, rest: str, then: str) -> str:
        codes = {" ": (32,), "\n": (10,), SPACES: (32, 10, 9, 13, 11, 12)}[spaces]
        is_space = " ".join(f"(eq (index . {index}) {code})" for code in codes)
        return (
            f'{{{{ define "{name}" }}}}{{{{ if and . (or {is_space}) }}}}{{{{ template "{name}" (slice . {rest}) }}}}'
            f"{{{{ else }}}}{then}{{{{ end }}}}{{{{ end }}}}"
        )

    last, whole = "(len (slice . 1))", "{{ . }}"
    if not left:
        return step(name, right, last, f"0 {last}", whole)
    if not right:
        return step(name, left, "0", "1", whole)
    end = f"{name}-end"
    then = f'{{{{ template "{end}" . }}}}'
    return step(end, right, last, f"0 {last}", whole) + step(name, left, "0", "1", then)
