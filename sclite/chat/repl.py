"""Chat in the terminal or a pipe: the model solves a problem, reviews its own steps and corrects the wrong one."""

import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from sclite import console
from sclite.chat.answer import Settings, open_gguf
from sclite.chat.conversation import KEYS, Chat
from sclite.config import Config
from sclite.console import escape
from sclite.errors import DONE, ScliteError
from sclite.run import Run
from sclite.student.base import Student
from sclite.student.step_scores import Cutoff

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

ALIASES = {"exit": "/bye", "quit": "/bye", "bye": "/bye", "?": "/help", "help": "/help"}
"""Other words for a command, with or without a slash."""


def run_chat(
    path: Path,
    config: Config,
    cutoff: Cutoff | None,
    run: Run,
    off: str = "",
    endpoint: Student | None = None,
    question: str | None = None,
    example: str = "",
    as_json: bool = False,
) -> int:
    """Answer one question, or those typed or piped in. Returns the exit code (of the last error, in a pipe).

    `off`: why answers are not reviewed, "" if they are. `endpoint`: the student, if it is not the GGUF `path`; its
    reviews are free. `example`: a problem to show if the student solves one kind only.
    """
    mode = config.review.mode if endpoint is None else "free"
    settings = Settings.of(config, cutoff, "" if off else mode)
    with ExitStack() as stack:
        if endpoint is not None:
            student, context, about = endpoint, 0, ""
        else:
            # one sequence keeps the solution while the other reviews it
            engine = stack.enter_context(open_gguf(path, config, parallel=2))
            student, context = engine, engine.context
            about = f": {engine.description}, on the {'GPU' if engine.offloaded else 'CPU'}"
        chat = Chat(student, context, path, run, settings, mode)
        if off and not as_json:
            console.note(f"[dim]{escape(off)}[/]")
        if question is not None:
            answer = chat.ask(question, quiet=as_json)
            if as_json:
                console.print_json(answer.as_json() | {"note": answer.note or off})
            return DONE
        if console.is_interactive():
            console.note(f"[dim]{escape(chat.name + about)}[/]")
            if example:
                console.note(f"This model has only learned problems like this one:\n{escape(example)}")
            converse(chat)
            return DONE
        # each line of stdin gets one line of output; an error gets an empty line, or an object
        code = DONE
        for number, line in enumerate(map(str.strip, iter(console.read_line, "")), 1):
            if not line:
                continue
            try:
                answer = chat.ask(line, quiet=True)
            except ScliteError as error:
                code = error.code
                console.error(error)
                row = {"question": line, "error": error.message}
                console.print_json(row, line=True) if as_json else console.print()
                continue
            if as_json:
                console.print_json(answer.as_json() | {"note": answer.note or off}, line=True)
                continue
            console.print(escape(" ".join(answer.result.split())))
            if answer.final.answer is None:  # perhaps a model that writes no steps
                why = f"no answer can be read from the reply, so all of it is printed ({answer.note})"
                console.note(f"[yellow]note:[/] line {number}: {escape(why)}")
        return code


def converse(chat: Chat) -> None:
    """Answer what is typed, or pasted as one input, until Ctrl-D, /bye, or Ctrl-C twice at an empty prompt."""
    import termios

    console.note("Type or paste a problem; /help lists the commands.")
    session, keyboard, warned = open_prompt(), sys.stdin.fileno(), False
    echoing, silent = termios.tcgetattr(keyboard), termios.tcgetattr(keyboard)
    silent[3] &= ~termios.ECHO  # the local modes: typing during an answer would break its view
    try:
        while not chat.left:
            used = ""
            if chat.context and chat.answers and (first := chat.answers[-1].first).tokens:
                used = f" · context {100 * (first.prompt_tokens + first.tokens) // chat.context}%"
            turns = f" · {len(chat.answers)} earlier" if chat.history and chat.answers else ""
            toolbar = f"{chat.name} · review {chat.settings.mode or 'off'}{used}{turns} · /help"
            try:
                typed = session.prompt(bottom_toolbar=toolbar).strip()
            except KeyboardInterrupt:
                if warned:
                    return
                warned = True
                console.note("[dim]Press Ctrl-C again, or Ctrl-D, to exit.[/]")
                continue
            except EOFError:
                return
            warned = False
            typed = ALIASES.get(typed.lower().removeprefix("/"), typed)
            if typed.startswith('"""'):
                typed = typed.removeprefix('"""').removesuffix('"""').strip()
            try:
                termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
                if typed.startswith("/"):
                    chat.command(typed)
                elif typed:
                    chat.ask(typed)
            except ScliteError as error:
                console.error(error)
            except KeyboardInterrupt:
                console.note("[dim]stopped[/]")
            finally:
                termios.tcsetattr(keyboard, termios.TCSADRAIN, echoing)
    finally:  # typed-ahead input must not reach the shell
        with suppress(OSError, termios.error):
            termios.tcflush(keyboard, termios.TCIFLUSH)


def open_prompt() -> "PromptSession[str]":
    """The prompt: Enter sends, Alt-Enter and an open triple quote start a new line, Ctrl-C clears the input."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.keys import Keys
    from prompt_toolkit.output import create_output

    keys, dumb = KeyBindings(), os.environ.get("TERM") == "dumb"
    typing = has_focus(DEFAULT_BUFFER)  # not while searching the history

    @keys.add("enter", filter=typing)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.text.strip()
        quoted = text.startswith('"""') and (len(text) < 6 or not text.endswith('"""'))
        pasted = dumb and event.key_processor.input_queue  # a dumb terminal does not mark a paste
        if quoted or pasted:
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add(Keys.BracketedPaste)
    def paste(event: KeyPressEvent) -> None:
        # a trailing empty line would hide a paste that fills the window
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        event.current_buffer.insert_text(text.rstrip("\n"))

    @keys.add("c-c", filter=typing)
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    history: FileHistory | InMemoryHistory = InMemoryHistory()
    file = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "sclite" / "chat_history"
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        history = FileHistory(str(file))
    values = ["mode guided", "mode free", "history on", "history off"]
    words = [f"/{name}" for name in (*Chat.commands(), "correct on", "correct off")]
    words += [f"/set {key}" for key in (*KEYS, *values)]
    return PromptSession(
        "> ",
        multiline=True,
        enable_suspend=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=history,
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
        output=None if dumb else create_output(cast(TextIO, console.make_console(stderr=True).file)),
    )
