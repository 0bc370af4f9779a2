"""The run folder, the only thing between stages: rows appended whole, files replaced by rename, stages signed when done."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import ValidationError

from sclite import __version__
from sclite.config import Config
from sclite.errors import DataFault, ScliteError, UsageFault
from sclite.records import Drop, Row
from sclite.settings import FORGOTTEN, RUN_FILE
from sclite.signature import brought_up

R = TypeVar("R", bound=Row)
BESIDES = frozenset(
    {RUN_FILE, ".lock", "problems.jsonl", "problems.json", "dropped.jsonl", "begun.json", "libraries.log"}
    | {f"ledger.sqlite{end}" for end in ("", "-wal", "-shm", "-journal")}
)
"""Files of a run that a command writes before it has made anything."""


@dataclass
class Report:
    """What a stage has done: counts, drops by reason, seconds, cost; `figures` holds what is particular to it."""

    stage: str
    counts: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cost_usd: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Report":
        """The report that a finished stage has left in its manifest."""
        names = ("stage", "counts", "dropped", "seconds", "cost_usd", "figures")
        return cls(**{name: manifest[name] for name in names}, skipped=True)

    def as_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("counts", "dropped", "seconds", "cost_usd", "figures")}


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, whole or in pieces, beside, force to disk, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class Run:
    """One run folder. Methods take names relative to it, such as "templates.jsonl"."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other sclite process off this run; raises UsageFault where one is at work.

        A folder that was not there before, and in which nothing was made, goes again.
        """
        new = [folder for folder in (self.folder, self.folder.parent) if not folder.exists()]
        file = self._locked()
        try:
            yield
        finally:
            with suppress(OSError):  # somebody else may have put something there, or taken the folder away
                if new and [path.name for path in self.folder.iterdir()] == [".lock"]:
                    self.path(".lock").unlink()
                    for folder in new:
                        folder.rmdir()
            file.close()

    def _locked(self) -> TextIO:
        """The lock file, open and locked; made anew where a process that has just ended took it away."""
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = open(self.path(".lock"), "w")  # noqa: SIM115 - closed by `hold`, and by the system after a kill
            except OSError as error:
                raise UsageFault(
                    f"{self.folder} cannot be written: {error.strerror}", "name another with --run"
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                raise UsageFault(
                    f"another sclite process is at work on {self.folder}",
                    "wait for it, or name another folder with --run",
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path(".lock"))):
                    return file
            file.close()

    def _made(self) -> dict[str, int]:
        """When each file was changed that a stage has made: rows, adapters, checkpoints, exports, figures, signatures."""
        found = (path for path in self.folder.rglob("*") if path.is_file() and path.name not in BESIDES)
        return {str(path): path.stat().st_mtime_ns for path in found if not path.name.endswith(".begun.json")}

    def busy(self) -> bool:
        """Whether a process holds this run: asked by a shared lock that is let go at once."""
        try:
            with open(self.path(".lock"), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def remember(self, config: Config) -> None:
        """Write the resolved configuration to run.toml, so that the next command on this run need not repeat it.

        What filters or asks for one command is left out (`settings.FORGOTTEN`): `--limit`, `--ollama`.
        """
        import tomlkit

        write_text(
            self.path(RUN_FILE), tomlkit.dumps(config.model_dump(exclude_none=True, exclude=FORGOTTEN))
        )

    @contextmanager
    def remembering(self, config: Config) -> Iterator[None]:
        """Remember the configuration; after a fault before any stage has made anything, run.toml is as it was.

        So a mistyped value or file does not become a setting of the run, which would break later commands; and what is
        paid for or trained keeps the settings that it was made with.
        """
        path, made = self.path(RUN_FILE), self._made()
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        self.remember(config)
        try:
            yield
        except ScliteError:
            if self._made() == made:
                if before is None:
                    path.unlink(missing_ok=True)
                else:
                    write_text(path, before)
            raise

    # -- rows ------------------------------------------------------------------------------------------------------

    def append(self, name: str, rows: Iterable[Row]) -> None:
        """Add rows in one write, so that after a kill each is whole or is a broken last line that reading drops."""
        found = list(rows)
        if found:
            with self.appending(name) as add:
                add(found)

    @contextmanager
    def appending(self, name: str) -> Iterator[Callable[[Iterable[Row]], None]]:
        """`append` for a file that stays open meanwhile: opening it anew is most of the work of a row."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                _end_last_line(file)

            def add(rows: Iterable[Row]) -> None:
                file.write("".join(row.model_dump_json(exclude_none=False) + "\n" for row in rows).encode())
                file.flush()

            yield add

    def rows(self, name: str, kind: type[R]) -> Iterator[R]:
        """The rows of a file, each read when it is asked for; none where the file is absent.

        A half-written last line is dropped; any other line that is no row raises DataFault with its number.
        """
        return (row for _, row in self.located(name, kind))

    def located(self, name: str, kind: type[R]) -> Iterator[tuple[int, R]]:
        """The rows of a file as `rows` gives them, each with the byte that its line begins at."""
        offset, path = 0, self.path(name)
        if not path.is_file():
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                begin, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                try:
                    row = kind.model_validate_json(line.decode("utf-8", errors="replace"))
                except ValidationError as error:
                    if not line.endswith(b"\n"):  # the process was killed while writing
                        return
                    first = error.errors()[0]
                    where = ".".join(str(p) for p in first["loc"])
                    raise DataFault(
                        f"{path}, line {number}: {where or 'not a row'}: {first['msg']}", "mend or remove it"
                    ) from None
                yield begin, row

    def read(self, name: str, kind: type[R]) -> list[R]:
        """All rows of a file, as `rows` gives them."""
        return list(self.rows(name, kind))

    def replace(self, name: str, rows: Iterable[Row]) -> None:
        """Write a whole file of rows by rename."""
        write_text(self.path(name), (row.model_dump_json(exclude_none=False) + "\n" for row in rows))

    def arrange(self, name: str, kind: type[R], ids: Iterable[str]) -> None:
        """Put the rows of a file into the order of these ids, by rename and one row in memory at a time.

        Rows of other ids go; of several of one id the last stays.
        """
        begins = {row.id: begin for begin, row in self.located(name, kind)}
        if not begins:
            self.replace(name, [])
            return
        with open(self.path(name), "rb") as file:
            found = (begins[id] for id in ids if id in begins)
            self.replace(name, (kind.model_validate_json(_line_at(file, begin)) for begin in found))

    def require(self, name: str, kind: type[R], hint: str) -> list[R]:
        """The rows of a file that a stage needs; raises DataFault with `hint` where there are none."""
        rows = self.read(name, kind)
        if not rows:
            raise DataFault(f"{self.path(name)} is missing or empty", hint)
        return rows

    def replace_drops(self, stages: Iterable[str], drops: Iterable[Drop]) -> None:
        """Exchange the drops of these stages for new ones, and leave those of the others."""
        stages = set(stages)
        kept = [drop for drop in self.read("dropped.jsonl", Drop) if drop.stage not in stages]
        self.replace("dropped.jsonl", [*kept, *drops])

    def read_json(self, name: str) -> Any:
        """A JSON file of the run; None where it is absent."""
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataFault(f"{path}: {error}", "remove it; its stage writes it again") from error

    def write_json(self, name: str, value: Any) -> None:
        write_text(self.path(name), json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    # -- signatures ------------------------------------------------------------------------------------------------

    def done(self, stage: str, inputs: dict[str, Any], *outputs: str) -> dict[str, Any] | None:
        """The stage's manifest where it was finished from these same inputs and its outputs are there, else None."""
        manifest = self.read_json(f"done/{stage}.json")
        same = manifest is not None and brought_up(manifest.get("inputs", {}), inputs) == inputs
        return manifest if same and all(self.path(name).exists() for name in outputs) else None

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The stage's manifest, from whatever inputs."""
        return self.read_json(f"done/{stage}.json")

    def sign(self, stage: str, inputs: dict[str, Any], report: Report) -> None:
        """Note that a stage is done, last of all its files."""
        manifest = {"stage": stage, "sclite": __version__, "inputs": inputs, **report.as_dict()}
        self.write_json(f"done/{stage}.json", manifest)

    def begin(self, stage: str) -> None:
        """Note that a stage writes its files now, so that they are not taken for ones that were brought along."""
        self.write_json(f"{stage}.begun.json", {"sclite": __version__})

    def brought_along(self, stage: str, name: str) -> bool:
        """Whether the stage's output lies there and was put there by the user: no stage of ours has begun or ended it."""
        path = self.path(name)
        ours = self.path(f"done/{stage}.json").exists() or self.path(f"{stage}.begun.json").exists()
        return not ours and path.is_file() and path.stat().st_size > 0

    def file_digest(self, name: str) -> str:
        """A short hash of a file's bytes; empty where it is absent."""
        path = self.path(name)
        if not path.is_file():
            return ""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _line_at(file, begin: int) -> bytes:
    file.seek(begin)
    return file.readline()


def _end_last_line(file) -> None:
    """Cut a half-written last line off; a whole one, as an editor may leave it, gets its newline."""
    file.seek(0)
    content = file.read()
    begin = content.rfind(b"\n") + 1
    try:
        json.loads(content[begin:])
    except ValueError:
        file.truncate(begin)
    else:
        file.write(b"\n")
    file.seek(0, os.SEEK_END)


@contextmanager
def timed(report: Report) -> Iterator[None]:
    """Add the seconds that the block takes to the report."""
    began = time.monotonic()
    try:
        yield
    finally:
        report.seconds = round(report.seconds + time.monotonic() - began, 3)
