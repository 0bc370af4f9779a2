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
from sclite.export.weights import read_json
from sclite.student.base import Messages
from sclite.student.chat_template import render_chat
from sclite.student.tokenization import end_id, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def _chat(roles: str, *contents: str) -> Messages:
    return tuple({"role": ROLES[role], "content": text} for role, text in zip(roles, contents, strict=True))


_MANY = ("Be brief.", "What is 2 + 3?", "It is 5.", "And 7 - 4?", "It is 3.", "Thanks. And 10 / 5?")
CHATS: dict[str, Messages] = {
    "system and user": _chat("su", *_MANY[:2]),
    "user alone": _chat("u", _MANY[1]),
    "many turns": _chat("suauau", *_MANY),
    "quotes and braces": _chat(
        "suau", "'a' \"b\" `c`", "{{ messages }} {% if x %} {# n #}", '"""{{ .System }}"""', "\\n </s> $x"
    ),
    "leading spaces": _chat("suauau", *(f"  \n {text}  x\n\n  " for text in _MANY)),
    "unicode": _chat("suau", "Réponds en français.", "数学: ∑ 2ⁿ?", "∞ 🙂", "Größe? ｜end｜"),
}
"""Chats that a derived template must render exactly as the original does."""


class Turn(NamedTuple):
    """The messages of a role: the text around a content, and whether its two ends are stripped."""

    before: str
    after: str
    left: bool
    right: bool


@dataclass(frozen=True)
class ChatFormat:
    """Every chat is `start`, its turns and, if an answer is asked for, `opening`.

    `system_in`: the system text is a separate turn ("own"), or comes before the content of the "first" or "last" user
    turn, which is then `host`. The original's default system prompt is dropped.
    """

    start: str
    system: Turn
    system_in: str
    user: Turn
    host: Turn
    assistant: Turn
    opening: str

    def jinja(self) -> str:
        """The format as a Jinja template without any option."""

        def content(message: str, turn: Turn) -> str:
            return f'{message}["content"]' + ".lstrip()" * turn.left + ".rstrip()" * turn.right

        def write(*parts: str) -> str:
            return f"{{{{- {' + '.join(filter(None, parts))} -}}}}"

        def show(turn: Turn, *inside: str) -> str:
            return write(_quote(turn.before), *inside, content("message", turn), _quote(turn.after))

        lines = [write(_quote(self.start))] if self.start else []
        lines.append("{%- for message in messages -%}")
        if self.system_in == "own":
            lines += ['{%- if message["role"] == "system" -%}', show(self.system)]
        else:
            host = "loop.index0 == 1" if self.system_in == "first" else "loop.revindex <= 2"
            is_host = f'message["role"] == "user" and messages[0]["role"] == "system" and {host}'
            text = content("messages[0]", self.system)
            inside = show(self.host, _quote(self.system.before), text, _quote(self.system.after))
            lines += [f"{{%- if {is_host} -%}}", inside]
        lines += ['{%- elif message["role"] == "user" -%}', show(self.user)]
        lines += ['{%- elif message["role"] == "assistant" -%}', show(self.assistant)]
        lines += ["{%- endif -%}", "{%- endfor -%}", "{%- if add_generation_prompt -%}"]
        return "\n".join([*lines, write(_quote(self.opening) or '""'), "{%- endif -%}"])

    def go_template(self, bos: str = "") -> str:
        """The format as a Go template for Ollama. `bos`: the text of the BOS token, if the runtime adds it itself.

        Contents are not stripped. A final assistant message follows the opening and stays open: Ollama continues it.
        """
        inside, system = "", f'{{{{ if eq .Role "system" }}}}{_go_turn(self.system)}{{{{ else '
        if self.system_in != "own":
            host = "eq $i 1" if self.system_in == "first" else "le (len (slice $.Messages $i)) 2"
            text = _go_turn(self.system, "$.System")
            inside, system = f"{{{{ if and $.System ({host}) }}}}{text}{{{{ end }}}}", "{{ "
        opening, last = _go(self.opening), "{{ if $last }}"
        return (
            f"{_go(self.start.removeprefix(bos))}"
            "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{system}if eq .Role "user" }}}}{_go(self.user.before)}{inside}{{{{ .Content }}}}{_go(self.user.after)}'
            f"{last}{opening}{{{{ end }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{last}{opening}{{{{ .Content }}}}'
            f"{{{{ else }}}}{_go_turn(self.assistant)}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
        )


def derive_format(render: Callable[[Messages, bool], str], bos: str = "") -> ChatFormat:
    """Derive the format from the way `render` renders chats with (True) or without (False) the prompt for an answer.

    `bos` is the text of the BOS token.

    Raises DataError, with the reason, for a template that uses more than roles and contents.
    """

    def gaps(roles: str, generation_prompt: bool = True) -> tuple[str, list[str]]:
        """The roles in the order of the text, and the texts before, between and after the contents."""
        marks = [f"Q{ROLES[role]}{i}Q" for i, role in enumerate(roles)]
        text = render(_chat(roles, *marks), generation_prompt)
        for role, mark in zip(roles, marks, strict=True):
            if text.count(mark) != 1:
                raise _refusal(f"it drops, repeats or changes the content of the {ROLES[role]}'s messages")
        order = sorted(range(len(roles)), key=lambda i: text.index(marks[i]))
        return "".join(roles[i] for i in order), re.split("|".join(marks), text)

    def turn(before: str, after: str, roles: str, index: int) -> Turn:
        """The turn of the message at `index` in a chat, with what is stripped from its content."""
        lengths = []
        for content in ("Q", " \nQ", "Q\n "):
            contents = [content if i == index else "Q" for i in range(len(roles))]
            lengths.append(len(render(_chat(roles, *contents), True)))
        return Turn(before, after, lengths[1] == lengths[0], lengths[2] == lengths[0])

    begin, to_assistant, to_user, ending = gaps("uau")[1]
    after_user = _shared(to_assistant, ending, gaps("u", False)[1][-1])
    answer_end = gaps("ua", False)[1][-1]
    before_user = _shared(begin, to_user[len(_shared(to_user, answer_end)) :], end=True)
    order, found = gaps("suauau")
    start, dropped = begin.removesuffix(before_user), ""
    if order == "uauasu":
        system_in, before_system, after_system = "last", found[4].removeprefix(to_user), found[5]
    elif order != "suauau":
        raise _refusal("it moves the system prompt")
    elif found[1].endswith(before_user):
        system_in, before_system, after_system = "own", found[0], found[1].removesuffix(before_user)
        if not before_system.startswith(start):  # a chat without a system prompt gets the template's own
            # .. but sometimes not with an empty system prompt
            bare = render(_chat("su", "", "Q"), True).removesuffix(f"{before_user}Q{ending}")
            known = bare if start.startswith(bare) and before_system.startswith(bare) else bos
            known = "" if known in before_user else known  # SmolLM2 has <|im_start|> as BOS
            dropped = start.removeprefix(known)
            start = start.removesuffix(dropped)
        before_system = before_system.removeprefix(start)
    else:
        system_in, before_system, after_system = "first", found[0].removeprefix(begin), found[1]
    form = ChatFormat(
        start=start,
        system=turn(before_system, after_system, "su", 0),
        system_in=system_in,
        user=turn(before_user, after_user, "uau", 2),
        host=turn(before_user, after_user, "su", 1),
        assistant=turn(to_assistant.removeprefix(after_user), to_user.removesuffix(before_user), "uau", 1),
        opening=ending.removeprefix(after_user),
    )
    template = form.jinja()
    for name, chat in CHATS.items():
        wanted, text = render(chat, True), render_chat(template, chat)
        if name == "user alone":
            wanted = start + wanted.removeprefix(start).removeprefix(dropped)
        if text != wanted:
            at = len(_shared(text, wanted))
            raise _refusal(
                f"it uses more than roles and contents. The chat {name!r} has {wanted[max(0, at - 20) : at + 40]!r}, "
                f"expected from shorter chats: {text[max(0, at - 20) : at + 40]!r}"
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


def _quote(text: str) -> str:
    """A literal in Jinja and in Go; empty if the text is empty."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def _go(text: str) -> str:
    """A text in a Go template, so that it neither begins an action nor ends a string of a Modelfile."""
    return f"{{{{ {_quote(text)} }}}}" if re.search(r'["{]', text) else text


def _go_turn(turn: Turn, content: str = ".Content") -> str:
    return f"{_go(turn.before)}{{{{ {content} }}}}{_go(turn.after)}"
