"""`sclite` and `python -m sclite`. Every error becomes one line, a hint and an exit code; with --json, one object."""

import os
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    from sclite.errors import UsageError


def main() -> None:
    """Run the command line and exit with its code."""
    from sclite.threads import wait_briefly

    wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from sclite import console

    console.prepare_streams()
    if not os.environ.get("SCLITE_DEBUG"):
        sys.excepthook = _report_bug
        threading.excepthook = lambda thrown: _report_bug(*thrown[:3])
    arguments = sys.argv[1:]
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except OSError as error:
        code = _report_os_error(error)
    sys.exit(code if arguments else 2)


def _run(arguments: list[str]) -> int:
    """Run a command line and print its error, if any. Returns the exit code."""
    import typer

    from sclite import console
    from sclite.cli import app
    from sclite.errors import DONE, INTERRUPTED, USAGE, ScliteError

    code = DONE
    try:
        # app() itself would exit when the reader of a pipe is gone
        command = typer.main.get_command(app)
        with command.make_context("sclite", [*arguments] or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        code = ended.exit_code
    except ScliteError as error:
        console.error(error, _as_json())
        return error.code
    except typer.TyperException as error:
        console.error(_usage_error(error), _as_json())
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        if _as_json():
            console.print_json({"error": "interrupted", "hint": "re-run to resume", "exit_code": INTERRUPTED})
        console.note("interrupted; re-run to resume")
    return code


def _report_os_error(error: OSError) -> int:
    """Print a full disk, a missing permission or a failed write to stdout. Returns the exit code."""
    from sclite import console
    from sclite.errors import DONE, from_os_error

    reported = from_os_error(error)
    if error.filename != console.OUTPUT:
        with suppress(OSError):
            console.error(reported, _as_json())
        return reported.code
    console.discard_output()
    if isinstance(error, BrokenPipeError):  # such as `| head`
        return DONE
    console.error(reported)
    return reported.code


def _as_json() -> bool:
    return "--json" in sys.argv


def _usage_error(error: "typer.TyperException") -> "UsageError":
    """Typer's error as a UsageError."""
    from sclite.errors import UsageError

    context = getattr(error, "ctx", None)
    message = error.format_message()
    command = context.command_path if context else "sclite"
    return UsageError(message[:1].lower() + message[1:].rstrip("."), f"run `{command} --help`")


def _report_bug(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Print an unexpected exception as one line and save its traceback. Python then exits with code 1."""
    from sclite import console
    from sclite.errors import ScliteError

    if issubclass(kind, KeyboardInterrupt):
        return
    first_line = next(iter(str(value).splitlines()), "")[:300]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="sclite-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{sys.argv}\n")
            traceback.print_exception(kind, value, trace, file=file)
        where = f"the traceback is in {file.name}"
    except OSError:
        where = "set SCLITE_DEBUG=1 to see the traceback"
    advice = "run `sclite doctor`" if issubclass(kind, ImportError) else "this is a bug, please report it"
    console.error(ScliteError(f"unexpected {kind.__name__}: {first_line}", f"{advice}; {where}"), _as_json())


if __name__ == "__main__":
    main()
