"""A student whose replies are kept in a file until the work is done, so that an interrupted command resumes."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from sclite.signature import digest
from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student

Result = TypeVar("Result", Reply, Scores)


@contextmanager
def recorded(student: Student, path: Path, identity: str) -> Iterator["Recorder"]:
    """The student with a Recorder, whose file is removed at the end, unless the work is interrupted."""
    yield Recorder(student, path, identity)
    path.unlink(missing_ok=True)


class Recorder(Student):
    """Passes requests on to `student`, unless the file at `path` has the reply; `identity` is that of the model."""

    def __init__(self, student: Student, path: Path, identity: str):
        self.student, self.path, self.identity = student, path, identity
        self.known: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                self.known |= json.loads(line)
            except ValueError:  # half-written
                continue
        path.parent.mkdir(parents=True, exist_ok=True)

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        keys, pending = self._keys(requests)
        yield from (
            Reply(**self.known[key] | {"index": i}) for i, key in enumerate(keys) if key in self.known
        )
        replies = self.student.generate([requests[i] for i in pending])
        yield from self._keep(replies, keys, pending)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        keys, pending = self._keys(requests)
        for i, key in enumerate(keys):
            if key in self.known:
                kept = self.known[key]
                yield Scores(**kept | {"index": i, "log_odds": tuple(kept["log_odds"])})
        yield from self._keep(self.student.score([requests[i] for i in pending]), keys, pending)

    def _keys(self, requests: Sequence[Request] | Sequence[ScoreRequest]) -> tuple[list[str], list[int]]:
        """The key of each request, and the numbers of those without a reply."""
        keys = [digest([self.identity, asdict(request)]) for request in requests]
        return keys, [i for i, key in enumerate(keys) if key not in self.known]

    def _keep(self, results: Iterator[Result], keys: list[str], pending: list[int]) -> Iterator[Result]:
        with open(self.path, "a", encoding="utf-8") as file:
            for result in results:
                number = pending[result.index]
                file.write(json.dumps({keys[number]: asdict(result)}) + "\n")
                file.flush()
                yield replace(result, index=number)
