"""A model behind an API as a student: it solves, and reviews freely; its replies cannot be forced to start in a given way.

Its calls go through the teacher's client and ledger, so each reply is requested, and paid for, only once.
"""

from collections.abc import Iterator, Sequence

from sclite.errors import TeacherError, UsageError
from sclite.student.base import Reply, Request, Student
from sclite.teacher.client import CUT_OFF, EMPTY_REPLY, REASONING_TOO_LONG, Job, Teacher

RENAMED = (
    ("teacher.model", "attempts.student"),
    ("teacher.api_base", "attempts.api_base"),
    ("teacher ", "student "),
)
"""What the client's messages call the endpoint, and what the configuration calls it."""


class Endpoint(Student):
    """`teacher` is a client with the endpoint's model and base URL (`repairs` 0); `stage` labels its ledger rows."""

    def __init__(self, teacher: Teacher, stage: str):
        self.teacher, self.stage = teacher, stage

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yield each reply as it arrives, with as many requests in flight as the client allows.

        The seed distinguishes samples: it is sent, and is part of the ledger's key. Stop strings are applied here,
        because endpoints remove them and do not say which one matched. Token counts are 0 if the endpoint does not
        report them. A failed call gives a reply with finish "error" and the reason. Raises UsageError for a request with
        `pieces`, which a chat endpoint may not continue; TeacherError if no further request can succeed.
        """
        if any(request.pieces for request in requests):
            raise UsageError(
                f"{self.teacher.settings.model} is an endpoint: it cannot continue a given beginning",
                "use free review (review.mode=free), or a GGUF of this model",
            )
        try:
            for result in self.teacher.ask_all(map(_job, range(len(requests)), requests), self.stage):
                index, entry, rejection = int(result.id), result.entry, result.rejection
                cut_off = rejection is not None and rejection.reason in (CUT_OFF, REASONING_TOO_LONG)
                if rejection is not None and not cut_off and rejection.reason != EMPTY_REPLY:
                    yield Reply(index, "", 0, 0, "error", f"{rejection.reason}: {rejection.text}")
                elif entry is None:
                    yield Reply(index, "", 0, 0, "error", "no reply")
                else:
                    text, finish = entry.text, "length" if cut_off else "stop"
                    for stop in requests[index].stop:
                        if stop in text:
                            text, finish = text[: text.index(stop) + len(stop)], "stop"
                    counts = (entry.completion_tokens or 0, entry.prompt_tokens or 0)
                    yield Reply(index, text, *counts, finish)
        except TeacherError as error:
            message, hint = error.message, error.hint
            for name, ours in RENAMED:
                message, hint = message.replace(name, ours), hint.replace(name, ours)
            raise TeacherError(message, hint) from None


def _job(index: int, request: Request) -> Job:
    parameters = {
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "drop_params": True,  # otherwise LiteLLM rejects what the provider does not support
    }
    if request.top_p < 1:
        parameters["top_p"] = request.top_p
    return Job(str(index), lambda error: request.messages, lambda text: None, parameters=parameters)
