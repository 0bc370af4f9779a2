"""SFT on a CPU: seconds per step and peak memory, compared with plain transformers and PEFT on the same rows.

    python -m tests.benchmarks.bench_cpu_train --model FOLDER [--micro 4] [--steps 8] [--sides sclite@1,plain@1]

The rows are the bundled tutor's templates of word problems. Each side is its own process and they take a step each in
turn, so that a machine whose speed changes slows both alike. sclite chooses its micro-batch size; plain is transformers'
Trainer with a padding collator, at --micro; the number is that of threads, so `sclite@1,sclite@2` compares threads. Prints the
median seconds of a step (by the clock, and of the CPU), tokens per second, the peak memory of each process, and the ratios
of the second side to the first with 95 % intervals.
"""

import argparse
import resource
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from sclite.cores import wait_briefly
from tests.benchmarks.turns import Turn, argument_parser, median_ratio, take_turns

BATCH = 16


def train(side: str, folder: str, micro: int, steps: int) -> None:
    """Train one side for this many steps, in turns."""
    from sclite import prompts
    from sclite.config import Config
    from sclite.quickstart import grammar, stories, tutor
    from sclite.student.loader import load_student, load_tokenizer
    from sclite.student.tokenization import encode_solution
    from sclite.train.memory import choose_micro_batch
    from sclite.train.sft import supervised_task
    from sclite.train.stage import quiet_libraries
    from sclite.train.trainer import Checkpoints, train_adapter, training_order

    stage = {"batch_size": BATCH, "num_train_epochs": 1, "eval_share": 0, "checkpoints": 1}
    config = Config.model_validate({"student": {"model": folder, "backend": "plain"}, "sft": stage})
    quiet_libraries()
    rows, tokenizer = [], load_tokenizer(folder)
    for problem in stories.problem_set("train", steps * BATCH):
        trace = tutor.template(grammar.solve(problem.question))
        rows.append(encode_solution(tokenizer, prompts.solve_messages(problem.question), trace))
    chosen = choose_micro_batch(config, "sft", max(len(row.ids) for row in rows))
    model, tokenizer = load_student(config, "sft", train=True)
    order = training_order([len(row.ids) for row in rows], BATCH, 1, 0)
    sizes = [sum(len(rows[i].ids) for i in order[s : s + BATCH]) for s in range(0, len(order), BATCH)]
    turn = Turn()

    def step_done(step: int, total: int, **_) -> None:
        if total:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            turn.step_done(tokens=sizes[step - 1], peak_gb=peak)

    with TemporaryDirectory() as place:
        path = Path(place)
        if side.startswith("sclite"):
            train_adapter(
                model, supervised_task("sft", config.sft, 0, rows, tokenizer.pad_token_id),
                Checkpoints(path / "checkpoints"), path / "metrics.jsonl", chosen, progress=step_done,
            )  # fmt: skip
        else:
            plain(model, tokenizer, [rows[i] for i in order], micro, path, step_done)


def plain(model, tokenizer, rows, micro: int, path: Path, step_done) -> None:
    """The same rows in the same order with transformers' own Trainer."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            step_done(state.global_step, state.max_steps)

    labels = [[i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)] for row in rows]
    data = [{"input_ids": row.ids, "labels": own} for row, own in zip(rows, labels, strict=True)]
    half = next(model.parameters()).element_size() == 2
    arguments = TrainingArguments(
        output_dir=str(path), per_device_train_batch_size=micro, gradient_accumulation_steps=BATCH // micro,
        learning_rate=1e-4, num_train_epochs=1, train_sampling_strategy="sequential", save_strategy="no", bf16=half,
        use_cpu=True, report_to="none", disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    Trainer(model, arguments, collate, train_dataset=data, callbacks=[Report()]).train()


def compare(options: argparse.Namespace) -> None:
    """Run both sides' steps in turn, and print the table."""
    sides = options.sides.split(",")
    command = [sys.executable, "-m", "tests.benchmarks.bench_cpu_train", *sys.argv[1:], "--side"]
    threads = {side: f"OMP_NUM_THREADS={side.partition('@')[2]}" for side in sides}
    found, _ = take_turns({side: ["env", threads[side], *command, side] for side in sides}, options.steps - 1)
    for side, rows in found.items():
        timed = rows[1:]
        seconds, cpu = (statistics.median(row[key] for row in timed) for key in ("seconds", "cpu"))
        speed = statistics.median(row["tokens"] / row["seconds"] for row in timed)
        peak = max(row["peak_gb"] for row in rows)
        took = f"{side:8} {seconds:6.1f} s, {cpu:6.1f} s of CPU a step, {speed:5.0f} tokens/s"
        print(f"{took}, peak {peak:.2f} GB")
    for key in ("seconds", "cpu"):
        ours, theirs = ([row[key] for row in found[side][1:]] for side in sides)
        print(f"{sides[1]} over {sides[0]}, {key}: {median_ratio(theirs, ours)}")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face model")
    parser.add_argument("--micro", type=int, default=4, help="micro-batch size of the plain side")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sides", default="sclite@1,plain@1")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wait_briefly()
    if options.side:
        train(options.side, options.model, options.micro, options.steps)
    else:
        compare(options)


if __name__ == "__main__":
    main()
