"""The run folder, the only state that stages share: rows, atomically replaced files, and manifests of finished stages."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sclite import __version__, console
from sclite.config import Config
from sclite.errors import DataError, UsageError
from sclite.files import file_digest, sync, write_text
from sclite.records import ROWS, Drop, Problem, Row, Template
from sclite.settings import NOT_SAVED, RUN_FILE

R = TypeVar("R", bound=Row)
PACKAGES = ("torch", "transformers", "peft", "llama-cpp-python", "litellm")
"""Whose versions a manifest records."""
LOCK = ".lock"
MADE_BY = {
    "problems.jsonl": ("problems", "build-data"),
    "templates.jsonl": ("templates", "build-data"),
    "attempts.jsonl": ("attempts", "build-data --only corrections"),
    "reviews.jsonl": ("corrections", "build-data --only corrections"),
    "pairs.jsonl": ("pairs", "train"),
}
"""The stage that writes each file of rows, and the command that restores missing rows."""


@dataclass
class Report:
    """The result of a stage: counts, drops by reason, seconds, cost (None: unknown); `figures` holds stage-specific values."""

    stage: str
    counts: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cost_usd: float | None = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: bool = False

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Report":
        """The report of a stage that was already done, from its manifest."""
        return cls(**{each.name: manifest[each.name] for each in fields(cls)} | {"skipped": True})

    def warn(self, progress: Callable[..., None], text: str) -> None:
        self.figures.setdefault("warnings", []).append(text)
        progress(0, 0, warning=text)

    def as_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("counts", "dropped", "seconds", "cost_usd", "figures")}


@contextmanager
def timed(report: Report) -> Iterator[None]:
    """Add the duration of the block to the report."""
    began = time.monotonic()
    try:
        yield
    finally:
        report.seconds = round(report.seconds + time.monotonic() - began, 3)


@dataclass
class Output:
    """A file listed in a manifest; `rows` is None for a file without rows."""

    digest: str
    rows: int | None


@dataclass(kw_only=True)
class Manifest(Report):
    """done/<stage>.json: the report of a finished stage, its inputs and its outputs."""

    sclite: str
    versions: dict[str, str]
    inputs: dict[str, Any]
    outputs: dict[str, Output]


class Run:
    """One run folder. Methods take names relative to it, such as "templates.jsonl"."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._warnings: set[str] = set()

    def warn(self, text: str) -> None:
        """Print a warning to stderr, each one once."""
        if text not in self._warnings:
            self._warnings.add(text)
            console.note(f"[yellow]warning:[/] {console.escape(text)}")

    def path(self, name: str) -> Path:
        return self.folder / name

    def is_begun(self) -> bool:
        """Whether this is a run: a chat leaves only its ledger and feedback, an `eval` its drops."""
        return any(self.path(name).exists() for name in (RUN_FILE, *MADE_BY, "sft", "export"))

    # -- lock and settings -----------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other sclite processes, or raise UsageError."""
        from filelock import FileLock, Timeout

        elsewhere = "choose another folder with --run"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path(LOCK), timeout=0)
            lock.acquire()
        except Timeout:
            message = f"another sclite process is using {self.folder}"
            raise UsageError(message, f"wait for it, or {elsewhere}") from None
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written: {error.strerror}", elsewhere) from error
        try:
            yield
        finally:
            lock.release()

    def has_own_problems(self) -> bool:
        """Whether the problems came with the run, as those of the quickstart did, and were not read from a source."""
        signed, path = self.manifest("problems"), self.path("problems.jsonl")
        own = not signed["inputs"]["source"] if signed else self.is_imported("problems", path.name)
        return own and path.is_file() and path.stat().st_size > 0

    @contextmanager
    def recording(self, config: Config) -> Iterator[None]:
        """Lock the run, and save the configuration to run.toml: later commands on this run need not repeat it.

        Raises UsageError if the run has its own problems, and so cannot have those of problems.source. If a value is
        rejected before a stage has finished, run.toml is restored: it does not break later commands.
        """
        import tomlkit

        def signed() -> set[tuple[str, int]]:
            done = (path for path in self.folder.glob("done/*.json") if path.stem != "problems")
            return {(path.name, path.stat().st_mtime_ns) for path in done}

        path, source = self.path(RUN_FILE), config.problems.source
        if source and self.has_own_problems():
            hint = "choose another folder with --run, or keep them: --set problems.source="
            raise UsageError(f"{self.folder} has other problems than {source}", hint)
        with self.lock():
            done, before = signed(), path.read_text(encoding="utf-8") if path.is_file() else None
            write_text(path, tomlkit.dumps(config.model_dump(exclude_none=True, exclude=NOT_SAVED)))
            try:
                yield
            except (UsageError, DataError):
                if before is None and signed() == done:
                    path.unlink()
                elif signed() == done:
                    write_text(path, before or "")
                raise

    # -- rows ------------------------------------------------------------------------------------------------------

    def append(self, name: str, rows: Iterable[Row]) -> None:
        """Append rows in one write: a kill leaves complete rows and at most one broken last line, which readers skip."""
        data = "".join(row.model_dump_json() + "\n" for row in rows).encode()
        if not data:
            return
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.seek(0)
                content = file.read()
                begin = content.rfind(b"\n") + 1
                try:
                    json.loads(content[begin:])
                except ValueError:  # the process was killed while writing
                    file.truncate(begin)
                else:  # some editors remove the last newline
                    file.write(b"\n")
            begin = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:  # a full disk: all of the rows or none
                file.truncate(begin)
                raise

    def rows(self, name: str, kind: type[R], whole: bool = True) -> Iterator[R]:
        """Read the rows of a file lazily; a missing file has none, and an incomplete last line is skipped.

        Any other invalid line raises DataError; with `whole` False, and in a file of drops, it is skipped with a warning.
        """
        path, damaged = self.path(name), []
        if not path.is_file():
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = kind.model_validate_json(line)
                except ValidationError as error:
                    if not line.endswith(b"\n"):  # the process was killed while writing
                        break
                    if whole and kind is not Drop:
                        first = error.errors()[0]
                        where = ".".join(str(p) for p in first["loc"])
                        stage, command = MADE_BY.get(name, ("", ""))
                        how = "re-run the command that wrote the file"
                        own = stage == "problems" and self.has_own_problems()
                        if not own and self.path(f"done/{stage}.json").is_file():
                            how = f"run `sclite {command} --run {self.folder}` to restore the rows; paid replies are kept"
                        message = f"{path}, line {number}: {where or 'not a row'}: {first['msg']}"
                        raise DataError(message, f"fix or remove the line, or {how}") from None
                    damaged.append(number)
                    continue
                yield row
        if damaged:
            more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
            self.warn(f"{path}: line {damaged[0]}{more} damaged and skipped")

    def read(self, name: str, kind: type[R], whole: bool = True) -> list[R]:
        return list(self.rows(name, kind, whole))

    def replace(self, name: str, rows: Iterable[Row]) -> None:
        """Write a whole file of rows and rename it into place."""
        write_text(self.path(name), (row.model_dump_json() + "\n" for row in rows))

    def reorder(self, name: str, kind: type[Problem | Template], ids: Iterable[str]) -> None:
        """Sort the rows of a file by these IDs: the last row of each ID, no others."""
        rows = {row.id: row for row in self.rows(name, kind, whole=False)}
        self.replace(name, [rows[id] for id in ids if id in rows])

    def require(self, name: str, kind: type[R], hint: str) -> list[R]:
        """All rows of a file; raises DataError with `hint` if there are none."""
        rows = self.read(name, kind)
        if not rows:
            raise DataError(f"{self.path(name)} is missing or empty", hint)
        return rows

    def replace_drops(self, stage: str, drops: Iterable[Drop]) -> None:
        """Replace the drops of a stage and keep those of the others."""
        kept = [drop for drop in self.read("dropped.jsonl", Drop) if drop.stage != stage]
        self.replace("dropped.jsonl", [*kept, *drops])

    def read_json(self, name: str, shape: Any = Any) -> Any:
        """A JSON file of the run, validated as type `shape`; None if it is missing or, with a warning, damaged."""
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            return TypeAdapter(shape).validate_json(path.read_bytes())
        except ValidationError:
            self.warn(f"{path} is damaged and ignored")
            return None

    def write_json(self, name: str, value: Any) -> None:
        write_text(self.path(name), json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    # -- manifests -------------------------------------------------------------------------------------------------

    def done(self, stage: str, inputs: dict[str, Any], *outputs: str) -> dict[str, Any] | None:
        """The stage's manifest if it finished with the same inputs and its outputs are intact, else None."""
        manifest = self.manifest(stage)
        if manifest is None or manifest["inputs"] != inputs:
            return None
        damages = self.damages(manifest)
        for damage in damages:
            self.warn(damage)
        return None if damages or not all(self.path(name).exists() for name in outputs) else manifest

    def damages(self, manifest: dict[str, Any]) -> list[str]:
        """A message for each damaged output that the manifest lists. Rows may have been edited, but not lost."""
        found = []
        for name, signed in manifest["outputs"].items():
            path, rows = self.path(name), signed["rows"]
            if not path.is_file() or self.file_digest(name) == signed["digest"]:
                continue
            if rows is None:
                found.append(f"{path} is damaged: it is not the file that {manifest['stage']} wrote")
            elif (whole := len(self.read(name, ROWS[name], whole=False))) < rows:
                found.append(f"{path} is damaged: {whole} of {rows} rows are intact")
        return found

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, whatever its inputs."""
        path = self.path(f"done/{stage}.json")
        try:
            return asdict(TypeAdapter(Manifest).validate_json(path.read_bytes())) if path.is_file() else None
        except ValidationError:
            raise DataError(f"{path} is damaged", f"remove it and re-run to repeat {stage}") from None

    def sign(
        self, stage: str, inputs: dict[str, Any], report: Report, outputs: Mapping[str, int | None] = {}
    ) -> None:
        """Sync a stage's outputs to disk, then write the manifest that marks the stage as done.

        `outputs` maps each file to its number of rows, or None.
        """
        signed: dict[str, dict[str, Any]] = {}
        for name, rows in outputs.items():
            sync(self.path(name))
            sync(self.path(name).parent)
            signed[name] = {"digest": self.file_digest(name), "rows": rows}
        versions = {name: version(name) for name in PACKAGES}
        about = {"stage": stage, "sclite": __version__, "versions": versions, "inputs": inputs}
        self.write_json(f"done/{stage}.json", {**about, **report.as_dict(), "outputs": signed})

    def mark_started(self, stage: str) -> None:
        """Record that a stage is writing its files, so that they are not mistaken for imported ones."""
        self.write_json(f"{stage}.begun.json", {"sclite": __version__})

    def is_imported(self, stage: str, name: str) -> bool:
        """Whether the user supplied the stage's output: the file exists, but the stage has never started here."""
        path = self.path(name)
        ours = self.path(f"done/{stage}.json").exists() or self.path(f"{stage}.begun.json").exists()
        return not ours and path.is_file() and path.stat().st_size > 0

    def file_digest(self, name: str) -> str:
        return file_digest(self.path(name))
