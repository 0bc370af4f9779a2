"""The run folder, the only thing between stages: rows appended whole, files replaced by rename, stages signed when done."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from sclite import __version__, console
from sclite.config import Config
from sclite.errors import DataError, ScliteError, UsageError
from sclite.files import end_last_line, file_digest, line_at
from sclite.files import sync as sync
from sclite.files import write_text as write_text
from sclite.manifest import Manifest
from sclite.manifest import Report as Report
from sclite.manifest import timed as timed
from sclite.records import ROWS, Drop, Row
from sclite.settings import NOT_SAVED, RUN_FILE

R = TypeVar("R", bound=Row)
BESIDES = frozenset(
    {RUN_FILE, ".lock", "problems.jsonl", "problems.json", "dropped.jsonl", "begun.json", "libraries.log"}
    | {f"ledger.sqlite{end}" for end in ("", "-wal", "-shm", "-journal")}
)
"""Files of a run that a command writes before it has made anything."""


MADE_BY = {
    "problems.jsonl": ("problems", "build-data"),
    "templates.jsonl": ("templates", "build-data"),
    "attempts.jsonl": ("attempts", "build-data --only corrections"),
    "reviews.jsonl": ("corrections", "build-data --only corrections"),
    "pairs.jsonl": ("pairs", "train"),
}
"""The stage that writes a file of rows, and the command that makes its missing rows again."""


class Run:
    """One run folder. Methods take names relative to it, such as "templates.jsonl"."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._said: set[str] = set()

    def warn(self, text: str) -> None:
        """Say once on stderr what was found damaged."""
        if text not in self._said:
            self._said.add(text)
            console.note(f"[yellow]warning:[/] {console.escape(text)}")

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
                raise UsageError(
                    f"{self.folder} cannot be written: {error.strerror}", "name another with --run"
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                raise UsageError(
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

        What filters or asks for one command is left out (`settings.NOT_SAVED`): `--limit`, `--ollama`.
        """
        import tomlkit

        write_text(
            self.path(RUN_FILE), tomlkit.dumps(config.model_dump(exclude_none=True, exclude=NOT_SAVED))
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
        with open(path, "ab+", buffering=0) as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                end_last_line(file)

            def add(rows: Iterable[Row]) -> None:
                data = "".join(row.model_dump_json(exclude_none=False) + "\n" for row in rows).encode()
                begin = file.seek(0, os.SEEK_END)
                try:
                    while data:
                        data = data[file.write(data) :]
                except OSError:  # a full disk: all of the rows or none
                    file.truncate(begin)
                    raise

            yield add

    def rows(self, name: str, kind: type[R], whole: bool = True) -> Iterator[R]:
        """The rows of a file, each read when it is asked for; none where the file is absent.

        A half-written last line is dropped; any other line that is no row raises DataFault with its number, or is
        skipped with a warning where the file need not be `whole`. A file of drops never needs to.
        """
        return (row for _, row in self.located(name, kind, whole))

    def located(self, name: str, kind: type[R], whole: bool = True) -> Iterator[tuple[int, R]]:
        """The rows of a file as `rows` gives them, each with the byte that its line begins at."""
        offset, path, damaged = 0, self.path(name), []
        if not path.is_file():
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                begin, offset = offset, offset + len(line)
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
                        message = f"{path}, line {number}: {where or 'not a row'}: {first['msg']}"
                        raise DataError(message, self._remedy(name)) from None
                    damaged.append(number)
                    continue
                yield begin, row
        if damaged:
            more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
            self.warn(f"{path}: line {damaged[0]}{more} damaged, skipped")

    def _remedy(self, name: str) -> str:
        """How a damaged file of rows gets whole again."""
        stage, command = MADE_BY.get(name, ("", ""))
        if stage and self.path(f"done/{stage}.json").is_file():
            again = f"`sclite {command} --run {self.folder}` makes its missing rows again"
            return f"{again}; replies that were paid for come from the ledger"
        return "fix or remove the line, or run the command again that made the file"

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
        begins = {row.id: begin for begin, row in self.located(name, kind, whole=False)}
        if not begins:
            self.replace(name, [])
            return
        with open(self.path(name), "rb") as file:
            found = (begins[id] for id in ids if id in begins)
            self.replace(name, (kind.model_validate_json(line_at(file, begin)) for begin in found))

    def require(self, name: str, kind: type[R], hint: str) -> list[R]:
        """The rows of a file that a stage needs; raises DataFault with `hint` where there are none."""
        rows = self.read(name, kind)
        if not rows:
            raise DataError(f"{self.path(name)} is missing or empty", hint)
        return rows

    def replace_drops(self, stages: Iterable[str], drops: Iterable[Drop]) -> None:
        """Exchange the drops of these stages for new ones, and leave those of the others."""
        stages = set(stages)
        kept = [drop for drop in self.read("dropped.jsonl", Drop) if drop.stage not in stages]
        self.replace("dropped.jsonl", [*kept, *drops])

    def read_json(self, name: str, shape: Any = Any) -> Any:
        """A JSON file of the run; None where it is absent, or damaged (not of `shape`), which is said."""
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            return TypeAdapter(shape).validate_json(path.read_bytes())
        except ValidationError:
            self.warn(f"{path} is damaged and not used")
            return None

    def write_json(self, name: str, value: Any) -> None:
        write_text(self.path(name), json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    # -- signatures ------------------------------------------------------------------------------------------------

    def done(self, stage: str, inputs: dict[str, Any], *outputs: str) -> dict[str, Any] | None:
        """The stage's manifest where it was finished from these same inputs and its outputs are whole, else None."""
        manifest = self.finished(stage)
        if (
            manifest is None
            or manifest["inputs"] != inputs
            or not all(self.path(n).exists() for n in outputs)
        ):
            return None
        for lost in (found := self.damaged(manifest)):
            self.warn(lost)
        return None if found else manifest

    def damaged(self, manifest: dict[str, Any]) -> list[str]:
        """In words, what is not whole of the files that a manifest vouches for; rows may have been edited."""
        found = []
        for name, signed in manifest["outputs"].items():
            path, rows = self.path(name), signed["rows"]
            if not path.is_file() or self.file_digest(name) == signed["digest"]:
                continue
            if rows is None:
                found.append(f"{path} is damaged: it is not the file that {manifest['stage']} wrote")
            elif (whole := self._count(name)) < rows:
                found.append(f"{path} is damaged: {whole} of {rows} rows are whole")
        return found

    def _count(self, name: str) -> int:
        return sum(1 for _ in self.rows(name, ROWS[name], whole=False))

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The stage's manifest, from whatever inputs; its copy where it is damaged."""
        path = self.path(f"done/{stage}.json")
        if not path.is_file():
            return None
        for place in (path, path.with_name(f".{path.name}")):
            with suppress(ValidationError, FileNotFoundError):
                return Manifest.model_validate_json(place.read_bytes()).model_dump()
        raise DataError(
            f"{path} and its copy are damaged",
            f"remove {path} and run the same command again: it repeats {stage}",
        )

    def sign(
        self,
        stage: str,
        inputs: dict[str, Any],
        report: Report,
        outputs: Mapping[str, int | None] | None = None,
    ) -> None:
        """Note that a stage is done, last of all its files.

        `outputs` are the files that this vouches for, each with its number of rows where it holds rows: they are forced
        to disk first. Raises DataFault where rows are missing, as where another process has written to the run.
        """
        signed: dict[str, dict[str, Any]] = {}
        for name, rows in (outputs or {}).items():
            if rows is not None and (there := self._count(name)) != rows:
                raise DataError(
                    f"{self.path(name)} holds {there} of {rows} rows: another process has written to the run",
                    "run the same command again, one at a time; replies that were paid for come from the ledger",
                )
            sync(self.path(name))
            sync(self.path(name).parent)
            signed[name] = {"digest": self.file_digest(name), "rows": rows}
        manifest = {
            "stage": stage,
            "sclite": __version__,
            "inputs": inputs,
            **report.as_dict(),
            "outputs": signed,
        }
        self.write_json(f"done/.{stage}.json", manifest)
        self.write_json(f"done/{stage}.json", manifest)

    def begin(self, stage: str) -> None:
        """Note that a stage writes its files now, so that they are not taken for ones that were brought along."""
        self.write_json(f"{stage}.begun.json", {"sclite": __version__})

    def is_imported(self, stage: str, name: str) -> bool:
        """Whether the stage's output lies there and was put there by the user: no stage of ours has begun or ended it."""
        path = self.path(name)
        ours = self.path(f"done/{stage}.json").exists() or self.path(f"{stage}.begun.json").exists()
        return not ours and path.is_file() and path.stat().st_size > 0

    def file_digest(self, name: str) -> str:
        """A short hash of a file's bytes; empty where it is absent."""
        return file_digest(self.path(name))
