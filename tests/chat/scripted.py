"""A student with a written solution, review and correction."""

from sclite.student.base import Reply, Scores, Student
from sclite.trace import Step, Trace, render

PLAIN = render(Trace((Step("2 + 2 = 4"), Step("4 + 1 = 5")), None, "5"))
WRONG = render(Trace((Step("2 + 2 = 4"), Step("4 + 1 = 6"), Step("6 + 1 = 7")), None, "7"))
CORRECTION = "4 and 1 are 5.</Cause>\n<Correction>4 + 1 = 5</Correction>"
REST = "<Step3>5 + 1 = 6\n</Step3>\n<Answer>6</Answer>"


class Scripted(Student):
    """A student with one solution and fixed review scores; questions with more than 99 words are too long."""

    context, offloaded, description = 512, False, ""

    def __init__(self, text=PLAIN, scores=(-3.0, -3.0), finish="stop", correction="unreadable", rest=REST):
        self.texts, self.scores, self.finish, self.asked = (text, correction, rest), scores, finish, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def generate(self, requests):
        for index, request in enumerate(requests):
            self.asked.append(request)
            kind = 0 if not request.pieces else 1 if request.pieces[-1] == "<Cause>" else 2
            if request.messages[-1]["content"].count("word") > 99:
                yield Reply(index, "", 5, 20, "error", "too long", prefill_tokens=2)
            else:
                yield Reply(index, self.texts[kind], 5, 20, self.finish, prefill_tokens=2)

    def score(self, requests):
        yield Scores(0, self.scores or (float("nan"),) * len(requests[0].marks), prefill_tokens=3)


CORRECTING = {"text": WRONG, "scores": (-2.0, 3.0, -1.0), "correction": CORRECTION}
