"""Check a new GGUF in a separate process: llama.cpp aborts the process that loads certain files."""

import json
import os
import subprocess
import sys
from pathlib import Path

from sclite.errors import DataError, ScliteError

TEXT = "<Step1>2 + 3 = 5 €\n</Step1>\n<Cause>"


def check_gguf(path: Path) -> None:
    """Load the file, tokenize a text and run the model, in a child process. Raises DataError if llama.cpp cannot."""
    root = str(Path(__file__).resolve().parents[3])
    known = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, known]) if known else root,
        "GGML_NO_BACKTRACE": "1",  # otherwise it starts a debugger
    }
    done = subprocess.run(
        [sys.executable, "-m", "sclite.student.llama_cpp.probe", str(path)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode == 0:
        return
    try:
        report = json.loads(done.stdout)
    except ValueError:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = [line for line in lines if "what():" in line or "failed" in line.lower()] or lines
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        reason = f"it exits with {ended}: {why[-1] if why else 'no reason given'}"
        raise DataError(
            f"llama.cpp cannot read {path}: {reason}",
            "llama.cpp does not support its tokenizer or header: use another base model, or another copy of the file",
        ) from None
    raise DataError(report["message"], report["hint"])


if __name__ == "__main__":
    from sclite.student.llama_cpp.engine import Engine

    try:
        with Engine(sys.argv[1], parallel=1, context=256, gpu_layers=0, cache_gb=0.1) as engine:
            engine.log_probabilities(engine.token_ids(TEXT))
    except ScliteError as error:
        os.write(1, json.dumps({"message": error.message, "hint": error.hint}).encode())
        sys.exit(error.code)
