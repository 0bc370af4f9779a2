"""The run folder, the only state that stages share: rows, atomically replaced files, and manifests of finished stages."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from sclite import __version__, console
from sclite.config import Config
from sclite.errors import DataError, ScliteError, UsageError
from sclite.files import file_digest, sync, write_text
from sclite.manifest import Manifest, Report
from sclite.manifest import timed as timed
from sclite.records import FEEDBACK, ROWS, Drop, Problem, Row, Template
from sclite.settings import NOT_SAVED, RUN_FILE, load

R = TypeVar("R", bound=Row)
PACKAGES = ("torch", "transformers", "peft", "llama-cpp-python", "litellm")
"""Whose versions a manifest records."""
LOCK = ".lock"
LEDGER = frozenset(f"ledger.sqlite{end}" for end in ("", "-wal", "-shm", "-journal"))
NOT_OUTPUTS = LEDGER | {
    RUN_FILE, LOCK, "problems.jsonl", "problems.json", ".problems.json", "dropped.jsonl", "libraries.log",
}  # fmt: skip
"""Files that a command writes to a run before any stage has produced something."""
MADE_BY = {
    "problems.jsonl": ("problems", "build-data"),
    "templates.jsonl": ("templates", "build-data"),
    "attempts.jsonl": ("attempts", "build-data --only corrections"),
    "reviews.jsonl": ("corrections", "build-data --only corrections"),
    "pairs.jsonl": ("pairs", "train"),
}
"""The stage that writes each file of rows, and the command that restores missing rows."""


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
        """Whether this is a run: it has more than a chat's lock, ledger and feedback, and the drops of an `eval`."""
        return any(
            path.name not in (LOCK, FEEDBACK, "dropped.jsonl", *LEDGER) for path in self.folder.glob("*")
        )

    # -- lock and settings -----------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other sclite processes, or raise UsageError. A new folder that stays empty is removed."""
        from filelock import FileLock, Timeout

        new = [folder for folder in (self.folder, self.folder.parent) if not folder.exists()]
        lock = FileLock(self.path(LOCK), timeout=0.5)  # `is_locked` in another process takes it for a moment
        elsewhere = "choose another folder with --run"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            message = f"another sclite process is using {self.folder}"
            raise UsageError(message, f"wait for it, or {elsewhere}") from None
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written: {error.strerror}", elsewhere) from error
        try:
            yield
        finally:
            with suppress(OSError):  # another program may have put a file there, or removed the folder
                if new and [path.name for path in self.folder.iterdir()] == [LOCK]:
                    self.path(LOCK).unlink()
                    for folder in new:
                        folder.rmdir()
            lock.release()

    def has_own_problems(self) -> bool:
        """Whether the problems came with the run, as those of the quickstart did, and were not read from a source."""
        signed, path = self.manifest("problems"), self.path("problems.jsonl")
        own = not signed["inputs"]["source"] if signed else self.is_imported("problems", path.name)
        return own and path.is_file() and path.stat().st_size > 0

    def check_problems(self, source: str) -> None:
        """Raise UsageError if the run has its own problems, and so cannot have those of `source`."""
        if source and self.has_own_problems():
            embedded = load(None, [f"run={self.folder}"], {}, own_file=False).teacher.embedded
            keep = f"`sclite quickstart --run {self.folder}`" if embedded else "--set problems.source="
            hint = f"choose another folder with --run, or keep them: {keep}"
            raise UsageError(f"{self.folder} has other problems than {source}", hint)

    def is_locked(self) -> bool:
        """Whether a process is using this run. False if the folder is read-only."""
        from filelock import FileLock, Timeout

        try:
            with suppress(PermissionError):
                if self.path(LOCK).is_file():
                    FileLock(self.path(LOCK), timeout=0).acquire().lock.release()
        except Timeout:
            return True
        return False

    @contextmanager
    def recording(self, config: Config) -> Iterator[None]:
        """Lock the run, and save the configuration to run.toml: later commands on this run need not repeat it.

        If the block fails before any stage has produced something, run.toml is restored: a mistyped value does not break
        later commands, but whatever was paid for or trained keeps its settings.
        """
        import tomlkit

        path = self.path(RUN_FILE)
        self.check_problems(config.problems.source)
        with self.lock():
            outputs, before = self._outputs(), path.read_text(encoding="utf-8") if path.is_file() else None
            write_text(path, tomlkit.dumps(config.model_dump(exclude_none=True, exclude=NOT_SAVED)))
            try:
                yield
            except ScliteError:
                if self._outputs() == outputs:
                    if before is None:
                        path.unlink(missing_ok=True)
                    else:
                        write_text(path, before)
                raise

    def _outputs(self) -> dict[str, int]:
        """{path: modification time} of all files that stages produced, from rows to manifests."""
        found = (path for path in self.folder.rglob("*") if path.is_file() and path.name not in NOT_OUTPUTS)
        return {str(path): path.stat().st_mtime_ns for path in found if not path.name.endswith(".begun.json")}

    # -- rows ------------------------------------------------------------------------------------------------------

    def append(self, name: str, rows: Iterable[Row]) -> None:
        """Append rows in one write: a kill leaves complete rows and at most one broken last line, which readers skip."""
        if found := list(rows):
            with self.appending(name) as add:
                add(found)

    @contextmanager
    def appending(self, name: str) -> Iterator[Callable[[Iterable[Row]], None]]:
        """`append` to a file that stays open: opening it takes most of the time of an append."""
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

            def add(rows: Iterable[Row]) -> None:
                data = "".join(row.model_dump_json() + "\n" for row in rows).encode()
                begin = file.seek(0, os.SEEK_END)
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:  # a full disk: all of the rows or none
                    file.truncate(begin)
                    raise

            yield add

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
            elif (whole := self._count(name)) < rows:
                found.append(f"{path} is damaged: {whole} of {rows} rows are intact")
        return found

    def _count(self, name: str) -> int:
        return sum(1 for _ in self.rows(name, ROWS[name], whole=False))

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, whatever its inputs; its copy if it is damaged."""
        path = self.path(f"done/{stage}.json")
        if not path.is_file():
            return None
        for place in (path, path.with_name(f".{path.name}")):
            with suppress(ValidationError, FileNotFoundError):
                return Manifest.model_validate_json(place.read_bytes()).model_dump()
        raise DataError(f"{path} and its copy are damaged", f"remove {path} and re-run to repeat {stage}")

    def sign(
        self, stage: str, inputs: dict[str, Any], report: Report, outputs: Mapping[str, int | None] = {}
    ) -> None:
        """Sync a stage's outputs to disk, then write the manifest that marks the stage as done.

        `outputs` maps each file to its number of rows, or None. Raises DataError if rows are missing.
        """
        signed: dict[str, dict[str, Any]] = {}
        for name, rows in outputs.items():
            path = self.path(name)
            if rows is not None and (there := self._count(name)) != rows:
                hint = "re-run with one process at a time; paid replies come from the ledger"
                message = f"{path} contains {there} of {rows} rows: another process has written to the run"
                raise DataError(message, hint)
            sync(path)
            sync(path.parent)
            signed[name] = {"digest": self.file_digest(name), "rows": rows}
        versions = {name: version(name) for name in PACKAGES}
        manifest: dict[str, Any] = {
            "stage": stage,
            "sclite": __version__,
            "versions": versions,
            "inputs": inputs,
        }
        manifest |= {**report.as_dict(), "outputs": signed}
        self.write_json(f"done/.{stage}.json", manifest)
        self.write_json(f"done/{stage}.json", manifest)

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
