"""A student whose work is counted, for the progress of evaluations."""

from collections.abc import Callable, Iterator, Sequence

from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student


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
