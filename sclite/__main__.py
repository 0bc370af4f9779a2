"""`sclite` and `python -m sclite`. Every error becomes one line, a hint and an exit code; with --json, one object."""

import errno
import os
import sys
import tempfile
import traceback
from contextlib import suppress

import typer

from sclite import console
from sclite.cli import app
from sclite.cores import wait_briefly
from sclite.errors import DONE, INTERRUPTED, ScliteError, UsageError


def main() -> None:
    """Run the command line and exit with its code."""
    wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it prints two lines per retry
    if "_SCLITE_COMPLETE" in os.environ:  # the shell asks for completions
        app(prog_name="sclite")
    console.prepare_streams()
    arguments, as_json, code = sys.argv[1:], "--json" in sys.argv, DONE
    try:
        try:
            # app() itself would exit if the reader of a pipe is gone
            command = typer.main.get_command(app)
            with command.make_context("sclite", [*arguments] or ["--help"]) as context:
                command.invoke(context)
        except typer.Exit as ended:
            code = ended.exit_code
        except ScliteError as error:
            console.error(error, as_json)
            code = error.code
        except typer.TyperException as error:
            message, given = error.format_message(), getattr(error, "ctx", None)
            hint = f"run `{given.command_path if given else 'sclite'} --help`"
            console.error(UsageError(message[:1].lower() + message[1:].rstrip("."), hint), as_json)
            code = UsageError.code
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
            if as_json:
                console.print_json({"error": "interrupted", "hint": "re-run to resume", "exit_code": code})
            console.note("interrupted; re-run to resume")
        sys.stdout.flush()
    except OSError as error:  # a full disk, a missing permission, or a failed write to stdout
        kind, hint, to_stdout = ScliteError, "re-run to resume", error.filename == console.OUTPUT
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free some disk space, then re-run to resume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            kind, hint = UsageError, "check its name and permissions, or use another folder with --run"
        if to_stdout:
            with suppress(OSError):  # at exit, Python would try again to write the buffer
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not (to_stdout and isinstance(error, BrokenPipeError)):  # such as `| head`
            code, place = kind.code, f"{error.filename}: " if error.filename else ""
            with suppress(OSError):
                console.error(kind(f"{place}{error.strerror or error}", hint), as_json and not to_stdout)
    except Exception as error:
        if os.environ.get("SCLITE_DEBUG"):
            raise
        from sclite.config import without_password  # pydantic takes longer to import than --help takes

        with tempfile.NamedTemporaryFile(
            "w", prefix="sclite-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{[without_password(word) for word in sys.argv]}\n")
            traceback.print_exception(error, file=file)
        how = "run `sclite doctor`" if isinstance(error, ImportError) else "this is a bug, please report it"
        said = f"unexpected {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
        console.error(ScliteError(said, f"{how}; the traceback is in {file.name}"), as_json)
        code = ScliteError.code
    sys.exit(code if arguments else UsageError.code)


if __name__ == "__main__":
    main()
