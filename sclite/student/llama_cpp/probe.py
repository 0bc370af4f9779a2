"""Check a new GGUF in a separate process: llama.cpp aborts the process that loads certain files."""

import json
import os
import subprocess
import sys
from pathlib import Path

from sclite.errors import DataError, DeviceError, ScliteError

TEXT = "<Step1>2 + 3 = 5 €\n</Step1>\n<Cause>"


def check_gguf(path: Path) -> None:
    """Load the file, tokenize a text and run the model, in a child process. Raises DataError or DeviceError if that fails."""
    root = str(Path(__file__).resolve().parents[3])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
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
    kind = DeviceError if done.returncode == DeviceError.code else DataError
    raise kind(report["message"], report["hint"])


if __name__ == "__main__":
    from sclite.student.llama_cpp.engine import Engine

    try:
        with Engine(sys.argv[1], parallel=1, context=256, gpu_layers=0, cache_gb=0.1) as engine:
            engine.log_probabilities(engine.vocabulary.ids(TEXT))
    except ScliteError as error:
        os.write(1, json.dumps({"message": error.message, "hint": error.hint}).encode())
        sys.exit(error.code)
