"""`sclite serve` and the engine under the chat: throughput with many clients, and one stream against llama-cpp-python.

    python tests/benchmarks/bench_serve.py MODEL.gguf [CLIENTS] [TOKENS]

Prints, as medians of alternating pairs, in wall time and in CPU time (which a busy machine does not distort): CLIENTS
requests at once over one at a time, and what llama.cpp alone gains by decoding as many at once; tokens/s of one streamed sequence and the time to its first text against
`Llama.create_chat_completion(stream=True)`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from sclite import prompts
from sclite.quickstart.stories import problem_set
from sclite.student.base import Request
from sclite.student.llama_cpp.engine import Engine

PAIRS = 5


def print_medians(name: str, wall: list[float], cpu: list[float]) -> None:
    """One line of ratios."""
    print(f"{name}: wall {statistics.median(wall):.2f}, CPU {statistics.median(cpu):.2f}", flush=True)


def measure_server(model: str, clients: int, tokens: int) -> None:
    """The server's throughput with all clients at once, relative to one request at a time."""
    command = [sys.executable, "-m", "sclite", "serve", "--model", model, "--port", "0", "--json"]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        served = json.loads(process.stdout.readline())

        def cpu_seconds() -> float:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        def ask(question: str) -> None:
            messages = [{"role": "user", "content": question}]
            body = {"model": f"{served['model']}:raw", "messages": messages, "max_tokens": tokens}
            http.post(f"{served['url']}/chat/completions", json=body).raise_for_status()

        def answer(workers: int) -> tuple[float, float]:
            wall, cpu = time.monotonic(), cpu_seconds()
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(ask, [problem.question for problem in problem_set("test", 2 * clients)]))
            return time.monotonic() - wall, cpu_seconds() - cpu

        with httpx.Client(timeout=600) as http:
            answer(clients)
            pairs = [(answer(1), answer(clients)) for _ in range(PAIRS)]
        process.terminate()
    wall, cpu = ([one[i] / many[i] for one, many in pairs] for i in (0, 1))
    print_medians(f"{clients} clients over one at a time", wall, cpu)


def measure_decoding(model: str, clients: int, prefix: int = 128) -> None:
    """Tokens/s of llama.cpp's batches relative to single tokens: what a server can gain, prompts aside."""
    with Engine(model, parallel=clients, context=512) as engine:
        scheduler, marks = engine.scheduler, list[tuple[float, float]]()  # its thread is idle

        def decode(count: int, place: int, sequence: int | None = None) -> tuple[float, float]:
            """Wall and CPU seconds per token of one token in each of `count` sequences, or as many in one `sequence`."""
            one = sequence is not None
            batch = scheduler.batch
            for n in range(count):
                batch.token[n], batch.pos[n] = 100 + n, place + n if one else place
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence if one else n
                batch.logits[n] = not one
            scheduler.batch.n_tokens = count
            wall, cpu = time.monotonic(), time.process_time()
            assert scheduler.api.llama_decode(scheduler.context, scheduler.batch) == 0
            return (time.monotonic() - wall) / count, (time.process_time() - cpu) / count

        for sequence in range(clients):
            decode(prefix, 0, sequence)
        for place in range(prefix, prefix + 64, 2):  # one sequence, which is then ahead by a token, and all
            single = decode(1, place)
            scheduler.api.llama_memory_seq_rm(scheduler.memory, 0, place, -1)
            many = decode(clients, place)
            decode(clients, place + 1)
            marks.append((single[0] / many[0], single[1] / many[1]))
    wall, cpu = (list(column) for column in zip(*marks, strict=True))
    print_medians(f"llama.cpp alone, {clients} tokens at once over one", wall, cpu)


def measure_stream(model: str, tokens: int) -> None:
    """One streamed sequence of the engine against llama-cpp-python's high-level API."""
    import llama_cpp

    theirs = llama_cpp.Llama(model, n_ctx=1024, n_gpu_layers=-1, verbose=False)

    def timed(pieces: Iterable[str]) -> tuple[float, float, float, float]:
        """Wall and CPU seconds to the first text, and from there per character: one piece may hold several tokens."""
        wall, cpu, marks, written = time.monotonic(), time.process_time(), [], ""
        for piece in pieces:
            written += piece
            marks.append((time.monotonic() - wall, time.process_time() - cpu, len(written)))
        (first_wall, first_cpu, begun), (last_wall, last_cpu, ended) = marks[0], marks[-1]
        count = max(1, ended - begun)
        return first_wall, first_cpu, (last_wall - first_wall) / count, (last_cpu - first_cpu) / count

    ratios = []
    with Engine(model, parallel=2, context=1024) as engine:
        for problem in problem_set("test", PAIRS + 1):
            messages = prompts.solve_messages(problem.question)
            ours = timed(p for p in engine.stream(Request(messages, max_tokens=tokens)) if isinstance(p, str))
            sampling = {"max_tokens": tokens, "temperature": 0, "repeat_penalty": 1.0}
            chunks = theirs.create_chat_completion([*map(dict, messages)], stream=True, **sampling)
            other = timed(text for c in chunks if (text := c["choices"][0]["delta"].get("content")))
            ratios.append([a / b for a, b in zip(ours, other, strict=True)])
    first_wall, first_cpu, wall, cpu = (list(column) for column in zip(*ratios[1:], strict=True))
    print_medians("time to the first text over llama-cpp-python", first_wall, first_cpu)
    print_medians("tokens/s over llama-cpp-python", [1 / r for r in wall], [1 / r for r in cpu])


def main() -> None:
    """Measure and print."""
    model, clients, tokens = (*sys.argv[1:], *("", "16", "24")[len(sys.argv) - 1 :])
    measure_stream(model, int(tokens))
    measure_decoding(model, int(clients))
    measure_server(str(Path(model).resolve()), int(clients), int(tokens))


if __name__ == "__main__":
    main()
