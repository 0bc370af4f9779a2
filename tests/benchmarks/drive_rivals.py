"""Request all templates with one tool; bench_rivals runs this in the tool's own interpreter.

    python drive_rivals.py TOOL URL WORK IN_FLIGHT [MODEL]

WORK contains problems.jsonl and requests.jsonl (`id`, `messages`: the same chats for every tool) and the tool's output;
MODEL is a LiteLLM name, for sclite only. Only sclite's own driver imports sclite. The last line printed is a JSON object:
`seconds` from the first connection to the last reply, `call_seconds` of the tool's call without imports and set-up, and
`replies`, the number with an <Answer>.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

MODEL = "replay"
NO_LIMIT = 10**9  # per minute


class Clock:
    """The times of the first connection to the server and of the last reply, measured alike for all tools."""

    def __init__(self, url: str):
        self.port = urlsplit(url).port
        self.began: float | None = None
        self.last = 0.0

    def start(self) -> None:
        """Start watching for the first connection."""
        sys.addaudithook(self._watch)

    def reply(self, *_: object) -> None:
        self.last = time.monotonic()

    def _watch(self, event: str, arguments: tuple) -> None:
        if event == "socket.connect" and self.began is None and arguments[1][1] == self.port:
            self.began = time.monotonic()


def measure(clock: Clock, call: Callable[[], list[str]]) -> dict[str, float]:
    """Time the call and count its replies."""
    clock.start()
    began = time.monotonic()
    replies = call()
    ended = time.monotonic()
    answered = sum("<Answer>" in reply for reply in replies)
    return {"seconds": clock.last - clock.began, "call_seconds": ended - began, "replies": answered}


def sclite(url: str, work: Path, in_flight: int, model: str) -> dict[str, float]:
    """write_templates in full: every reply is recorded in the ledger, parsed, graded against the gold answer, written."""
    from sclite.config import Source
    from sclite.data.problems import load_problems
    from sclite.data.templates import write_templates
    from sclite.grading.grader import Grader
    from sclite.records import Template
    from sclite.run import Run
    from sclite.settings import load
    from sclite.teacher.client import Teacher
    from sclite.teacher.ledger import Ledger

    chosen = [f"teacher.model={model}", f"teacher.api_base={url}", f"teacher.concurrency={in_flight}"]
    settings = load(None, chosen, {}, own_file=False)
    problems = load_problems(Source(source=str(work / "problems.jsonl")))
    run, clock = Run(work / "run"), Clock(url)
    ledger = Ledger(run.path("ledger.sqlite"))
    with Grader() as grader, ledger, Teacher(settings.teacher, ledger) as teacher:
        teacher.price()  # imports LiteLLM

        def call() -> list[str]:
            given = {"teacher": teacher, "grader": grader, "problems": problems}
            write_templates(settings, run, progress=clock.reply, **given)
            return [row.trace for row in run.read("templates.jsonl", Template)]

        return measure(clock, call)


def curator(url: str, work: Path, in_flight: int, backend: str = "openai") -> dict[str, float]:
    """curator.LLM on a list of rows, with its backend for OpenAI-compatible endpoints (aiohttp)."""
    from bespokelabs import curator
    from litellm.litellm_core_utils import default_encoding  # noqa: F401 - provides tiktoken's file, else it is downloaded

    clock = Clock(url)

    class Templates(curator.LLM):
        def prompt(self, row):
            return row["messages"]

        def parse(self, row, reply):
            clock.reply()
            return {"id": row["id"], "reply": reply}

    parameters = {"base_url": url, "api_key": "none", "max_concurrent_requests": in_flight}
    parameters |= {"max_requests_per_minute": NO_LIMIT, "max_tokens_per_minute": NO_LIMIT}
    name = f"openai/{MODEL}" if backend == "litellm" else MODEL
    teacher = Templates(model_name=name, backend=backend, backend_params=parameters)
    if backend == "litellm":  # skip its test call "hi", which a server that replays known questions refuses
        teacher._request_processor._rate_limits_initialized = True
    rows = read_requests(work)

    def call() -> list[str]:
        found = teacher(rows, working_dir=str(work / "curator"))
        return list(found.dataset["reply"])

    return measure(clock, call)


def curator_litellm(url: str, work: Path, in_flight: int) -> dict[str, float]:
    """curator.LLM with its LiteLLM backend, which supports as many providers as sclite."""
    return curator(url, work, in_flight, "litellm")


def kit(url: str, work: Path, in_flight: int) -> dict[str, float]:
    """The client of synthetic-data-kit's commands, in batches of `in_flight`, without its half second between batches.

    The commands themselves take documents and build the messages; the one that rewrites a given conversation
    (`create --type cot-enhance`) sends one request at a time.
    """
    from synthetic_data_kit.models.llm_client import LLMClient

    teacher = LLMClient(provider="api-endpoint", api_base=url, api_key="none", model_name=MODEL)
    teacher.sleep_time = 0
    chats, clock = [row["messages"] for row in read_requests(work)], Clock(url)

    def call() -> list[str]:
        replies = teacher.batch_completion(chats, batch_size=in_flight)
        clock.reply()
        (work / "kit.json").write_text(json.dumps(replies))
        return replies

    return measure(clock, call)


def read_requests(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / "requests.jsonl").read_text(encoding="utf-8").splitlines()]


TOOLS = {"sclite": sclite, "curator": curator, "curator, LiteLLM": curator_litellm, "kit": kit}

if __name__ == "__main__":
    name, address, folder, most, *model = sys.argv[1:]
    print(json.dumps(TOOLS[name](address, Path(folder), int(most), *model)), flush=True)
