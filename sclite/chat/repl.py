"""Chat in the terminal or a pipe: the model solves a problem, reviews its own steps and corrects the wrong one."""

import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from sclite import console
from sclite.chat.answer import Settings, open_gguf
from sclite.chat.conversation import Chat
from sclite.config import Config
from sclite.console import escape
from sclite.errors import DONE, DataError, ScliteError
from sclite.run import Run
from sclite.student.base import Student
from sclite.student.step_scores import Cutoff

ALIASES = {"exit": "/bye", "quit": "/bye", "/exit": "/bye", "/quit": "/bye", "?": "/help", "/?": "/help"}


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
            student, context, name, about = endpoint, 0, str(path), ""
        else:
            # one sequence keeps the solution while the other reviews it
            engine = stack.enter_context(open_gguf(path, config.eval.context, 2))
            student, context, name = engine, engine.context, path.name
            about = f": {engine.description}, on the {'GPU' if engine.offloaded else 'CPU'}"
        chat = Chat(student, context, path, name, run, settings, mode)
        if off and not as_json:
            console.note(f"[dim]{escape(off)}[/]")
        if question is not None and not as_json:
            chat.ask(question)
            return DONE
        if question is None and console.is_interactive():
            console.note(f"[dim]{escape(chat.name + about)}[/]")
            if example:
                console.note(f"This model has only learned problems like this one:\n{escape(example)}")
            converse(chat)
            return DONE
        # each line of stdin gets one line of output; an error gets an empty line, or an object
        code = DONE
        lines = filter(None, map(str.strip, sys.stdin or ()))
        for line in lines if question is None else [question]:
            try:
                answer = chat.ask(line, quiet=True)
            except ScliteError as error:
                if question is not None:
                    raise
                code = error.code
                console.error(error)
                row = {"question": line, "error": error.message}
                console.print_json(row, line=True) if as_json else console.print()
                continue
            if as_json:
                console.print_json(answer.as_json() | {"note": answer.note or off}, line=True)
            else:
                console.print(escape(" ".join(answer.result.split())))
        return code


def converse(chat: Chat) -> None:
    """Answer what is typed, or pasted as one input, until Ctrl-D, /bye, or Ctrl-C twice at an empty prompt."""
    import termios

    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys, history = KeyBindings(), None
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))  # Alt-Enter
    file = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "sclite" / "chat_history"
    with suppress(OSError):  # such as a read-only home
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        history = FileHistory(str(file))
    output = None if os.environ.get("TERM") == "dumb" else create_output(always_prefer_tty=True)
    session = PromptSession[str]("> ", key_bindings=keys, history=history, output=output)
    keyboard, warned = sys.stdin.fileno(), False
    echoing, silent = termios.tcgetattr(keyboard), termios.tcgetattr(keyboard)
    silent[3] &= ~termios.ECHO  # the local modes: typing during an answer would break its view
    console.note("Type or paste a problem; /help lists the commands.")
    while not chat.left:
        toolbar = f"{chat.name} · review {chat.settings.mode or 'off'} · /help"
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
        typed = ALIASES.get(typed.lower(), typed)
        try:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
            if typed.startswith("/"):
                chat.command(typed)
            elif typed:
                chat.ask(typed)
        except ScliteError as error:
            console.error(error)
        except OSError as error:  # of /save, /load, /good and /bad
            hint = "choose another file, or check its permissions"
            console.error(DataError(f"{error.filename}: {error.strerror}", hint))
        except KeyboardInterrupt:
            console.note("[dim]stopped[/]")
        finally:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, echoing)
