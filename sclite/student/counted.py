"""A student whose work is counted while it works, for the progress of evaluations."""

from collections.abc import Callable, Iterator, Sequence

from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student


class Counted(Student):
    """Passes everything on to `student`, which is to solve and review `problems` of them.

    After each reply or score, `report` gets the number of solved problems, the share of the work done (solving is taken
    for half of it), and a note such as "40 texts written, 12 reviewed".
    """

    def __init__(self, student: Student, problems: int, report: Callable[[int, float, str], None]):
        self.student, self.problems, self.report = student, problems, report
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
        solved = min(self.problems, self.written)
        # a free review is written, a guided one begins with scores
        reviewed = min(self.problems, max(self.scored, self.written - self.problems))
        note = f"{self.written} texts written" + (f", {self.scored} reviewed" if self.scored else "")
        self.report(solved, (solved + reviewed) / (2 * self.problems), note)
