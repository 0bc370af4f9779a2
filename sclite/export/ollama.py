"""Write a Modelfile, and run `ollama create`."""

import re
import shutil
import subprocess
from pathlib import Path

from sclite.errors import DataError, ScliteError, UsageError


def build_modelfile(
    gguf_name: str, template: str, *, system: str = "", num_ctx: int = 8192, stops: tuple[str, ...] = ()
) -> str:
    """The text of a Modelfile for a GGUF in the same folder.

    `template` is a Go template, which versions before 0.30 need ("": none), `num_ctx` is in tokens. A text is written
    between three quotes, or one for a stop; a text that could end early is refused.
    """
    if '"""' in system or system.endswith('"'):
        raise DataError(
            'a Modelfile cannot hold a system prompt that contains """ or ends in "',
            "change prompts/student_system",
        )
    lines = [f"FROM ./{gguf_name}"]
    lines += [f'TEMPLATE """{template}"""'] if template else []
    lines += [f'SYSTEM """{system}"""'] if system else []
    for stop in dict.fromkeys(stops):
        if '"' in stop or "\n" in stop:
            raise DataError(
                f"a Modelfile cannot hold the stop {stop!r}, which contains a quote or a newline",
                "use a student with another end token",
            )
        lines += [f'PARAMETER stop "{stop}"'] if stop else []
    lines += [f"PARAMETER num_ctx {num_ctx}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


def create_model(name: str, modelfile_path: Path) -> str:
    """Run `ollama create NAME -f MODELFILE` and return its output. Raises ScliteError if ollama is missing or fails."""
    if not re.fullmatch(r"[A-Za-z0-9][\w./:-]*", name):
        raise UsageError(
            f"export.ollama = {name!r} is not a valid model name",
            "use letters, digits and . _ - / : as in my-model:v1",
        )
    program = shutil.which("ollama")
    if program is None:
        raise ScliteError(
            "ollama is not installed", "install it: curl -fsSL https://ollama.com/install.sh | sh"
        )
    command = [program, "create", name, "-f", str(modelfile_path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ScliteError(
            f"ollama create {name} failed: {lines[-1] if lines else 'no reason given'}",
            "is the server running? start it with: ollama serve",
        )
    return done.stdout
