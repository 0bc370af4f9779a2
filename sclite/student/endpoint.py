"""A model behind an API as a student: it solves, and reviews freely; its replies cannot be made to continue a prefix.

Its calls go through the teacher's client and ledger, so each reply is requested, and paid for, only once.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from threading import Event

from sclite.errors import BudgetError, TeacherError, UsageError
from sclite.student.base import Reply, Request, ScoreRequest, Scores, Student
from sclite.teacher.client import CUT_OFF, EMPTY_REPLY, REASONING_TOO_LONG, Job, Result, Teacher
from sclite.trace import TAG, without_thoughts

RENAMED = (
    ("teacher.model", "attempts.student"),
    ("teacher.api_base", "attempts.api_base"),
    ("teacher.concurrency", "attempts.concurrency"),
    ("teacher.max_tokens", "attempts.max_tokens"),
    ("teacher ", "student "),
)
"""The client's names for the endpoint's settings, and those in the configuration."""


class Endpoint(Student):
    """`teacher` is a client with the endpoint's model and base URL (`repairs` 0); `stage` labels its ledger rows.

    `name` is the user's name for the model, if the client uses another. `version` distinguishes models that have had
    the same name: a reply in the ledger is of one version.
    """

    def __init__(self, teacher: Teacher, stage: str, name: str = "", version: int = 0):
        self.teacher, self.stage, self.version = teacher, stage, version
        self.name = name or teacher.settings.model

    def generate(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yield each reply as it arrives, with as many requests in flight as the client allows.

        The seed distinguishes samples: it is sent, and is part of the ledger's key. Stop strings are applied here,
        because endpoints remove them and do not say which one matched. Token counts are 0 if the endpoint does not
        report them. A failed call yields a reply with finish "error" and the reason. Raises UsageError for a request with
        `pieces`, which a chat endpoint may not continue; TeacherError if no further request can succeed.
        """
        jobs = [self._job(index, request) for index, request in enumerate(requests)]
        with self._named_errors():
            for result in self.teacher.ask_after_pilot(jobs, len(jobs), self.stage):
                yield _read(requests[int(result.id)], result)

    def stream(
        self, ask: Request | ScoreRequest, cancel: Event | None = None, pieces: bool = True
    ) -> Iterator[str | Reply | Scores]:
        """Yield the text of a reply as it arrives, without thoughts and what follows a stop string; then the reply."""
        if isinstance(ask, ScoreRequest) or not pieces:
            yield from super().stream(ask, cancel, pieces)
            return
        received = shown = ""
        with self._named_errors(), closing(self.teacher.stream(self._job(0, ask), self.stage)) as arriving:
            for found in arriving:
                if isinstance(found, Result):
                    reply = _read(ask, found)
                    if reply.text.startswith(shown):
                        yield reply.text[len(shown) :]
                    yield reply
                    return
                received += found
                text = without_thoughts(received).lstrip()
                if text.startswith(("<", "[")) and not TAG.match(text):  # thoughts, or the start of a tag
                    continue
                text = _up_to_stop(text, ask.stop).rstrip()  # the reply is stripped, too
                if text.startswith(shown) and text != shown:
                    yield text[len(shown) :]
                    shown = text

    def _job(self, index: int, request: Request) -> Job:
        if request.pieces:
            hint = "use free review (review.mode=free), or a GGUF of this model"
            raise UsageError(f"{self.name} is an endpoint: it cannot continue a given prefix", hint)
        parameters = {
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            "drop_params": True,  # otherwise LiteLLM rejects what the provider does not support
        }
        if request.top_p < 1 and "claude" not in self.teacher.settings.model:  # rejects it with a temperature
            parameters["top_p"] = request.top_p
        return Job(
            str(index), lambda error: request.messages, lambda text: None, self.version, parameters=parameters
        )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Rephrase errors of the client in terms of the student's settings."""
        try:
            yield
        except (BudgetError, TeacherError, UsageError) as error:
            message, hint = error.message, error.hint
            for known, ours in ((self.teacher.settings.model, self.name), *RENAMED):
                message, hint = message.replace(known, ours), hint.replace(known, ours)
            raise type(error)(message, hint) from None


def _read(request: Request, result: Result) -> Reply:
    """The reply to a request; cut after its first stop string."""
    index, entry, rejection = int(result.id), result.entry, result.rejection
    reason = rejection.reason if rejection else ""
    if rejection and (entry is None or reason not in (CUT_OFF, REASONING_TOO_LONG, EMPTY_REPLY)):
        return Reply(index, "", 0, 0, "error", f"{reason}: {rejection.text}")
    assert entry is not None, "only a call that failed has none"
    text, prompt_tokens = _up_to_stop(entry.text, request.stop), entry.prompt_tokens or 0
    cut_off = reason in (CUT_OFF, REASONING_TOO_LONG) and not text.endswith(tuple(request.stop))
    counts = entry.completion_tokens or 0, prompt_tokens
    return Reply(index, text, *counts, "length" if cut_off else "stop", prefill_tokens=prompt_tokens)


def _up_to_stop(text: str, stops: tuple[str, ...]) -> str:
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]
