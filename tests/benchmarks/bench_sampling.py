"""Sampling attempts: llama.cpp, as in `sclite train`, compared with the same model in batches with transformers.

    python -m tests.benchmarks.bench_sampling --model FOLDER [--adapter FOLDER] [--requests 32] [--turns 3] [--tokens 128]

Both sides get the same word problems at the same temperature and take a turn each, so that a machine whose speed changes slows
both alike. Prints the tokens per second of each, by the clock and of CPU time, and the ratios of each turn. On a GPU that
llama.cpp's build can use, its file has 8-bit weights, otherwise 16-bit; the time to write it is printed too.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from sclite.cores import wait_briefly
from tests.benchmarks.turns import argument_parser, median_ratio


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face model")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter")
    parser.add_argument("--requests", type=int, default=32, help="per turn, one batch in transformers")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="the longest answer")
    options = parser.parse_args()
    wait_briefly()

    import torch

    from sclite import prompts
    from sclite.config import Config
    from sclite.export.model import write_sampling_gguf
    from sclite.quickstart.stories import problem_set
    from sclite.student.base import Request, Student
    from sclite.student.hf_model import HFModel
    from sclite.student.llama_cpp.engine import Engine
    from sclite.student.loader import load_student
    from sclite.train.stage import quiet_libraries

    config = Config.model_validate({"student": {"model": options.model, "backend": "plain"}})
    quiet_libraries()
    count, on_gpu = options.requests, torch.cuda.is_available()
    chats = [prompts.solve_messages(p.question) for p in problem_set("train", count * options.turns)]
    sampling = {"max_tokens": options.tokens, "temperature": 1.0}
    asked = [Request(chat, seed=number, **sampling) for number, chat in enumerate(chats)]
    with TemporaryDirectory() as work:
        began = time.monotonic()
        path = write_sampling_gguf(config, options.adapter, Path(work) / "gguf", small=on_gpu)
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, written in {time.monotonic() - began:.1f} s")
        model, tokenizer = load_student(config, "sft", options.adapter)
        with Engine(path, context=config.eval.context) as engine:
            sides: dict[str, Student] = {"llama.cpp": engine}
            sides["transformers"] = HFModel(model, tokenizer, count)
            speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            for turn in range(options.turns):
                requests = asked[turn * count : (turn + 1) * count]
                for name in list(sides)[:: 1 if turn % 2 else -1]:
                    began, cpu = time.monotonic(), time.process_time()
                    tokens = sum(reply.tokens for reply in sides[name].generate(requests))
                    took = time.monotonic() - began, time.process_time() - cpu
                    speeds[name].append((tokens / took[0], tokens / took[1]))
                    print(f"{name:12} {tokens} tokens, {took[0]:.1f} s, {took[1]:.1f} s of CPU", flush=True)
    for number, by in enumerate(("by the clock", "of CPU time")):
        columns = {name: [speed[number] for speed in found] for name, found in speeds.items()}
        shown = ", ".join(f"{name} {statistics.median(column):.0f}" for name, column in columns.items())
        print(f"tokens per second {by}: {shown}; ratio {median_ratio(*columns.values())}")


if __name__ == "__main__":
    main()
