"""`sclite` and `python -m sclite`: every error ends in one line, a hint and an exit code, under --json in one object."""

import os
import sys
import tempfile
import threading
import traceback
from types import TracebackType


def main() -> None:
    """Run the command line and exit with its code."""
    from sclite.threads import wait_briefly

    wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import typer

    from sclite import console
    from sclite.cli import app
    from sclite.errors import INTERRUPTED, USAGE, ScliteError

    if not os.environ.get("SCLITE_DEBUG"):
        sys.excepthook = _unexpected
        threading.excepthook = lambda thrown: _unexpected(*thrown[:3])
    arguments = sys.argv[1:]
    try:
        # not app() itself, which puts typer's own excepthook in place
        command = typer.main.get_command(app)
        code = command(arguments or ["--help"], prog_name="sclite", standalone_mode=False)
    except ScliteError as error:
        console.fault(error, _as_json())
        sys.exit(error.code)
    except typer.TyperException as error:
        console.fault(_usage_error(error), _as_json())
        sys.exit(USAGE)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:  # typer turns Ctrl-C into this by itself
        if _as_json():
            console.print_json({"error": "interrupted", "hint": "re-run to resume", "exit_code": INTERRUPTED})
        console.note("interrupted; re-run to resume")
    sys.exit(code if arguments else USAGE)


def _as_json() -> bool:
    return "--json" in sys.argv


def _usage_error(error):
    """The parser's error as one of ours: its own come with the usage line and no exit code of their class."""
    from sclite.errors import UsageFault

    context = getattr(error, "ctx", None)
    message = error.format_message()
    command = context.command_path if context else "sclite"
    return UsageFault(
        message[:1].lower() + message[1:].rstrip("."), f"`{command} --help` lists what it takes"
    )


def _unexpected(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """One line for an exception that nobody expected; its traceback goes to a file. Python then exits with code 1."""
    from sclite import console
    from sclite.errors import ScliteError

    if issubclass(kind, KeyboardInterrupt):
        return
    said = next(iter(str(value).splitlines()), "")[:300]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="sclite-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{sys.argv}\n")
            traceback.print_exception(kind, value, trace, file=file)
        where = f"the traceback is in {file.name}"
    except OSError:
        where = "SCLITE_DEBUG=1 prints the traceback"
    advice = "`sclite doctor` checks the installation" if issubclass(kind, ImportError) else "this is a bug"
    console.fault(ScliteError(f"unexpected {kind.__name__}: {said}", f"{advice}; {where}"), _as_json())


if __name__ == "__main__":
    main()
