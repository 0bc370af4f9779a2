"""A model behind LiteLLM as a student: it solves, and reviews freely; nothing can be put into its mouth.

Its replies go through the client and the ledger of the teacher, so they too are asked for, and paid for, once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sclite.errors import TeacherError, UsageError
from sclite.student.base import Reply, Request, ScoreRequest, Scores
from sclite.teacher.client import EMPTY_REPLY, Job, Result, Teacher

CUT_OFF = "cut_off"  # the client's name for finish_reason length


class Endpoint:
    """`teacher` is the client with the endpoint's name and address (its `repairs` 0); `stage` names the ledger's rows."""

    def __init__(self, teacher: Teacher, stage: str):
        self.teacher, self.stage = teacher, stage

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yield each reply when it is done, as many in flight as the client allows.

        A request's seed tells samples apart: it is sent along and is part of what the ledger knows a request by. What a
        provider has no name for (seed, top_p, for some models the temperature) is left out of what it gets. Stop
        strings are looked for here, because endpoints cut them off and do not say which one they met. A call that fails
        gives a reply with finish "error" and the reason. Raises UsageFault for a request with `pieces`: a chat endpoint
        does not promise to go on from them; TeacherFault where no further request can succeed.
        """
        if any(request.pieces for request in requests):
            raise UsageError(
                f"{self.teacher.settings.model} is an endpoint: it cannot go on from a given beginning",
                "use free review (review.mode=free), or a GGUF of this model",
            )
        jobs = (_job(index, request) for index, request in enumerate(requests))
        try:
            for result in self.teacher.ask_all(jobs, self.stage):
                yield _reply(result, requests[int(result.id)])
        except TeacherError as error:
            raise TeacherError(_of_the_student(error.message), _of_the_student(error.hint)) from None

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[Scores]:
        """Endpoints cannot weigh two given continuations: NotImplementedError, always."""
        raise NotImplementedError(f"{self.teacher.settings.model} is an endpoint and cannot score")


def _job(index: int, request: Request) -> Job:
    parameters: dict[str, Any] = {
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "drop_params": True,  # LiteLLM would else refuse what the provider does not know
    }
    if request.top_p < 1:
        parameters["top_p"] = request.top_p
    return Job(str(index), lambda error: request.messages, lambda text: None, parameters=parameters)


def _reply(result: Result, request: Request) -> Reply:
    """The client's result as a student's reply; token counts are 0 where the endpoint does not tell them."""
    entry, rejection = result.entry, result.rejection
    if entry is None or (rejection is not None and rejection.reason not in (CUT_OFF, EMPTY_REPLY)):
        said = f"{rejection.reason}: {rejection.text}" if rejection is not None else "no reply"
        return Reply(int(result.id), "", 0, 0, "error", said)
    text, finish = entry.text, "length" if rejection is not None and rejection.reason == CUT_OFF else "stop"
    for stop in request.stop:
        if stop in text:
            text, finish = text[: text.index(stop) + len(stop)], "stop"
    return Reply(int(result.id), text, entry.completion_tokens or 0, entry.prompt_tokens or 0, finish)


def _of_the_student(text: str) -> str:
    """The client's words with the names that this endpoint has in the configuration."""
    for ours, theirs in (
        ("attempts.student", "teacher.model"),
        ("attempts.api_base", "teacher.api_base"),
        ("student ", "teacher "),
    ):
        text = text.replace(theirs, ours)
    return text
