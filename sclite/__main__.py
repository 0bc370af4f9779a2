"""`sclite` and `python -m sclite`: every error ends in one line, a hint and an exit code, under --json in one object."""

import os
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from types import TracebackType


def main() -> None:
    """Run the command line and exit with its code."""
    from sclite.threads import wait_briefly

    wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from sclite import console

    console.prepare_streams()
    if not os.environ.get("SCLITE_DEBUG"):
        sys.excepthook = _unexpected
        threading.excepthook = lambda thrown: _unexpected(*thrown[:3])
    arguments = sys.argv[1:]
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except OSError as error:
        code = _system_failed(error)
    sys.exit(code if arguments else 2)


def _run(arguments: list[str]) -> int:
    """Run a command line, and print its error if it has one; its exit code."""
    import typer

    from sclite import console
    from sclite.cli import app
    from sclite.errors import DONE, INTERRUPTED, USAGE, ScliteError

    code = DONE
    try:
        # not app() itself, which ends the process by itself when nobody reads its output
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


def _system_failed(error: OSError) -> int:
    """What the system did not do: a full disk, no permission, an output that nobody reads; the exit code."""
    from sclite import console
    from sclite.errors import DONE, from_os_error

    failed = from_os_error(error)
    if error.filename != console.OUTPUT:
        with suppress(OSError):
            console.error(failed, _as_json())
        return failed.code
    console.discard_output()
    if isinstance(error, BrokenPipeError):  # the reader has seen enough
        return DONE
    console.error(failed)
    return failed.code


def _as_json() -> bool:
    return "--json" in sys.argv


def _usage_error(error):
    """The parser's error as one of ours: its own come with the usage line and no exit code of their class."""
    from sclite.errors import UsageError

    context = getattr(error, "ctx", None)
    message = error.format_message()
    command = context.command_path if context else "sclite"
    return UsageError(
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
    console.error(ScliteError(f"unexpected {kind.__name__}: {said}", f"{advice}; {where}"), _as_json())


if __name__ == "__main__":
    main()
