"""`sclite` and `python -m sclite`: faults that a user can mend end in one line, a remedy and an exit code."""

import os
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from sclite.threads import wait_briefly

    wait_briefly()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from sclite import console
    from sclite.cli import app
    from sclite.errors import INTERRUPTED, ScliteError

    try:
        app()
    except ScliteError as error:
        console.fault(error)
        sys.exit(error.code)
    except KeyboardInterrupt:
        _interrupted()
        sys.exit(INTERRUPTED)
    except SystemExit as leaving:  # typer turns Ctrl-C into its exit code by itself
        if leaving.code == INTERRUPTED:
            _interrupted()
        raise


def _interrupted() -> None:
    from sclite import console

    console.note("interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
