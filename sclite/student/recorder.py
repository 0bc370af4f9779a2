"""Students around another: one keeps its replies until the work is done, so that it resumes; one counts its work."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from sclite.signature import digest
from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student

Asked = TypeVar("Asked", Request, ScoreRequest)
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
        yield from self._ask(self.student.generate, requests, Reply)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        yield from self._ask(self.student.score, requests, Scores)

    def _ask(
        self,
        ask: Callable[[Sequence[Asked]], Iterator[Result]],
        requests: Sequence[Asked],
        kind: Callable[..., Result],
    ) -> Iterator[Result]:
        """The results that the file has, then those of `ask`, which are appended to it."""
        keys = [digest([self.identity, asdict(request)]) for request in requests]
        pending = [number for number, key in enumerate(keys) if key not in self.known]
        for number, key in enumerate(keys):
            if kept := self.known.get(key):
                lists = {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
                yield kind(**kept | lists | {"index": number})
        with open(self.path, "a", encoding="utf-8") as file:
            for result in ask([requests[number] for number in pending]):
                number = pending[result.index]
                file.write(json.dumps({keys[number]: asdict(result)}) + "\n")
                file.flush()
                yield replace(result, index=number)


class WorkCounter(Student):
    """Passes everything on to `student`, which will write `texts` (without corrections) and compute `scores`.

    After each reply or score, `report` gets the number of texts, at most `texts`, the share of the work done (a score
    weighs as much as a text), and a note such as "40 texts written, 12 reviewed".
    """

    def __init__(self, student: Student, texts: int, scores: int, report: Callable[[int, float, str], None]):
        self.student, self.texts, self.scores, self.report = student, texts, scores, report
        self.written = self.corrections = 0
        self.scored = {True: 0, False: 0}  # by review, by confidence

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        for reply in self.student.generate(requests):
            if requests[reply.index].pieces:  # it continues an attempt
                self.corrections += 1
            else:
                self.written += 1
            self._count()
            yield reply

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        for scores in self.student.score(requests):
            self.scored[requests[scores.index].options[0][1] is not None] += 1
            self._count()
            yield scores

    def _count(self) -> None:
        scored = max(self.scored.values())
        texts, scores = min(self.texts, self.written), min(self.scores, scored)
        # assume as many corrections as scores, rather too many, so that the time left does not reach 0 early
        done = texts + scores + min(self.scores, self.corrections)
        note = f"{self.written + self.corrections} texts written" + (f", {scored} reviewed" if scored else "")
        self.report(texts, done / (self.texts + 2 * self.scores), note)
