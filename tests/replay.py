"""A teacher for tests: an HTTP server with OpenAI's chat completions, whose replies come from a function.

    with TeacherServer(lambda request, nth: say("<Step1>..")) as server:
        server.url, server.requests, server.counts

`request` is the parsed body, `nth` counts (from 1) the requests with these messages. A request for a stream gets the text
word by word. Ollama's list of models is `models`, {name: digest}.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sclite import config
from sclite.records import Problem
from sclite.run import Run
from sclite.teacher.client import Job, Teacher
from sclite.teacher.ledger import Ledger


@dataclass(frozen=True)
class Answer:
    """The response: a status with a body after `seconds`, or a connection that breaks in the middle of the body."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    broken: bool = False
    pause: threading.Event | None = None  # awaited after the first word of a stream


def say(
    text: str | None, finish_reason: str = "stop", seconds: float = 0.0, tokens: tuple[int, int] = (11, 7)
) -> Answer:
    """A chat completion with this text."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "replay",
        "choices": [{"index": 0, "finish_reason": finish_reason, "message": message}],
        "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
    }
    return Answer(body=body, seconds=seconds)


TWO = "<Step1>Add: 1 + 1 = 2\n</Step1>\n<Generalized>Add.</Generalized>\n<Answer>2</Answer>"
"""The teacher's solution of 1 + 1."""


def fail(status: int, message: str = "no", **headers: str) -> Answer:
    """An error in OpenAI's form; `retry_after="1"` becomes a header."""
    body = {"error": {"message": message, "type": "test", "code": status}}
    return Answer(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def job(number: int, check=lambda reply: None, **more: Any) -> Job:
    """A job whose message is `question NUMBER.`, followed by the error of the last reply."""

    def messages(error: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"question {number}. {error}".strip()}]

    return Job(str(number), messages, check, **more)


def question(request: dict) -> str:
    """The first message of a request."""
    return request["messages"][0]["content"]


def sums(count: int, solution: str | None = "Count on.") -> list[Problem]:
    """Problems p0, p1 ..: `What is 0 + 1?` and so on."""
    asked = ((f"p{i}", f"What is {i} + 1?", str(i + 1)) for i in range(count))
    return [Problem(id=id, question=text, answer=answer, solution=solution) for id, text, answer in asked]


def number_of(request: dict) -> int:
    """The number in the last message's `What is NUMBER + 1?`."""
    return int(re.search(r"What is (\d+) \+ 1", request["messages"][-1]["content"])[1])


def template(answer: object, step: str = "Count on by one.", rule: str = "Count on.") -> str:
    """A thought trace that ends in this answer."""
    return f"<Step1>{step}\n</Step1>\n<Generalized>{rule}</Generalized>\n<Answer>{answer}</Answer>"


@contextmanager
def client(run: Run, settings: config.Teacher) -> Iterator[Teacher]:
    """A teacher's client over the run's ledger."""
    with Ledger(run.path("ledger.sqlite")) as ledger, Teacher(settings, ledger) as teacher:
        yield teacher


HTML = Answer(200, b"<html><body>Bad gateway</body></html>")
BROKEN = Answer(broken=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        owner: TeacherServer = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.requests.append(body)
            messages = json.dumps(body["messages"])
            owner.counts[messages] += 1
            nth = owner.counts[messages]
            owner.keys.add(self.headers.get("Authorization", ""))
            owner.in_flight += 1
            owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
        try:
            answer = owner.answer(body, nth)
            streamed = body.get("stream") and answer.status == 200 and isinstance(answer.body, dict)
            (self.stream if streamed else self.respond)(answer)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with owner.lock:
                owner.in_flight -= 1

    def do_GET(self):
        models = [{"name": name, "digest": digest} for name, digest in self.server.owner.models.items()]
        self.respond(Answer(200 if self.path == "/api/tags" else 404, {"models": models}))

    def stream(self, answer: Answer):
        choice = answer.body["choices"][0]
        words = re.findall(r"\s*\S+|\s+", choice["message"]["content"])
        deltas = [({"content": word}, None) for word in words[: len(words) // 2 if answer.broken else None]]
        deltas += [] if answer.broken else [({}, choice["finish_reason"])]
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "replay"}
        chunks = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": f}]} for d, f in deltas]
        chunks += [] if answer.broken else [{**head, "choices": [], "usage": answer.body["usage"]}]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, data in enumerate([*map(json.dumps, chunks), *([] if answer.broken else ["[DONE]"])]):
            event = f"data: {data}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            if number == 0 and answer.pause is not None:
                answer.pause.wait(10)
        if not answer.broken:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = answer.broken

    def respond(self, answer: Answer):
        time.sleep(answer.seconds)
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "text/html" if data.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(data) + (1000 if answer.broken else 0)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        if answer.broken:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True
    owner: "TeacherServer"

    def handle_error(self, request, client_address):
        """No traceback when a client disconnects; tests do that on purpose."""


class TeacherServer:
    """The server, as a context manager. `requests` are the bodies in order of arrival."""

    def __init__(self, answer, models=None):
        self.answer, self.models = answer, models or {}
        self.requests: list[dict] = []
        self.counts: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def __enter__(self) -> "TeacherServer":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        # the same address, but not that of a loopback interface: calls are not free
        self.remote_url = self.url.replace("127.0.0.1", "0.0.0.0")
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
