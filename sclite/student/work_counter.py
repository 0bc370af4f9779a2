"""A student whose work is counted while it works, for the progress of evaluations."""

from collections.abc import Callable, Iterator, Sequence

from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student


class WorkCounter(Student):
    """Passes everything on to `student`, which is to write `texts` (corrections not counted) and give `scores`.

    After each reply or score, `report` gets the number of texts, at most `texts`, the share of the work done (a score
    weighs as much as a text), and a note such as "40 texts written, 12 reviewed".
    """

    def __init__(self, student: Student, texts: int, scores: int, report: Callable[[int, float, str], None]):
        self.student, self.texts, self.scores, self.report = student, texts, scores, report
        self.written = self.scored = 0

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        for reply in self.student.generate(requests):
            self._count(written=1)
            yield reply

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        for scores in self.student.score(requests):
            self._count(scored=1)
            yield scores

    def _count(self, written: int = 0, scored: int = 0) -> None:
        self.written += written
        self.scored += scored
        texts, scores = min(self.texts, self.written), min(self.scores, self.scored)
        note = f"{self.written} texts written" + (f", {self.scored} reviewed" if self.scored else "")
        self.report(texts, (texts + scores) / (self.texts + self.scores), note)
