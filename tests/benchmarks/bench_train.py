"""Training on a GPU: speed compared with an Unsloth and TRL script and the plain path; peaks compared with the memory model.

    python -m tests.benchmarks.bench_train --models FOLDER --out FILE            everything, one table
    python -m tests.benchmarks.bench_train --models FOLDER --only speed|memory|longest   a part of it

Models are random ones of real geometry, written into FOLDER once; each process stays within 24 GB. For the memory table a
process loads its student once for all its cases. For the speeds every side is its own process, all on the GPU at
once (about 10 to 16 GB each for 7B), and they take a step each in turn, so that a host whose speed changes slows all
alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tests.benchmarks.train_sides import CAP_BYTES, FREE, RANK, Case, peak
from tests.benchmarks.turns import argument_parser, median_ratio, take_turns

FIRST, SECOND = "qwen2.5-math-7b", "llama-3.1-8b"
MEMORY = {
    (FIRST, "unsloth"): [
        *(peak("ours", "sft", micro) for micro in (1, 2, 4)),
        *(peak("ours", "dpo", micro) for micro in (1, 2)),
        peak("ours", "sft", 1, 4096),
    ],
    (SECOND, "unsloth"): [peak("ours", "sft", 2), peak("ours", "dpo", 2), peak("ours", "dpo", 1, 4096)],
    (FIRST, "plain"): [peak("plain", "sft", 2), peak("plain", "dpo", 1)],
}
"""(geometry, backend): cases whose peaks are compared with the memory model."""
SPEED = {
    "sft": {side: Case(side, "sft", 4) for side in ("ours", "script", "plain")},
    "dpo": {"ours": Case("ours", "dpo", 2), "plain": Case("plain", "dpo", 2)},
}
"""By stage: the cases that take turns."""
LONGEST = [(SECOND, "sft"), (SECOND, "dpo")]
"""Trained on the longest row that fits according to the memory model."""


# -- all of them ---------------------------------------------------------------------------------------------------


def model_folder(models: Path, name: str) -> Path:
    """The random model of a geometry, written once, by a separate process."""
    folder = models / name
    if not (folder / "model.safetensors.index.json").is_file():
        write = "import sys, pathlib; from tests.gpu.models import random_model; from tests.train.architectures import RECIPES"
        write += "; random_model(pathlib.Path(sys.argv[1]), RECIPES[sys.argv[2]], 'cuda')"
        subprocess.run([sys.executable, "-c", write, str(folder), name], check=True)
    return folder


def side_command(models: Path, geometry: str, backend: str, cases: Sequence[Case]) -> list[str]:
    """The process that measures these cases; its model is written where it is missing."""
    command = [sys.executable, "-m", "tests.benchmarks.train_sides", "--geometry", geometry]
    command += ["--backend", backend, "--model", str(model_folder(models, geometry))]
    return [*command, "--cases", json.dumps([asdict(case) for case in cases])]


def run_session(models: Path, geometry: str, backend: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The figures of a session; if it dies, the case that it died in, with its last line."""
    command = side_command(models, geometry, backend, cases)
    rows = []
    with TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        for line in process.stdout:  # shown as it comes: whoever stops this keeps what was measured
            if line.startswith('{"geometry"'):
                rows.append(json.loads(line))
                print(line, end="", file=sys.stderr, flush=True)
        if process.wait():
            said.seek(0)
            errors = said.read()
            print(errors[-4000:], file=sys.stderr, flush=True)
            last = (errors.strip().splitlines() or ["no output"])[-1][:300]
            rows.append({"geometry": geometry, **asdict(cases[len(rows)]), "error": last})
    return rows


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each stage's sides, a step each in turn."""
    rows = []
    for sides in SPEED.values():
        cases = {name: replace(case, steps=options.steps, full=options.full) for name, case in sides.items()}
        rows += in_turns(options.models, FIRST, cases)
        show_turns(rows[-len(cases) :])
    return rows


def in_turns(models: Path, geometry: str, sides: Mapping[str, Case]) -> list[dict[str, Any]]:
    """The figures of each side, with the seconds of each of its steps as `turns`."""
    commands = {}
    for name, case in sides.items():
        backend = "plain" if name == "plain" else "unsloth"
        commands[name] = [*side_command(models, geometry, backend, [case]), "--turns"]
    taken, others = take_turns(commands, min(case.steps for case in sides.values()) - FREE)
    rows = []
    for name, case in sides.items():
        figures = others[name][-1] if others[name] else {"error": "it ended before its last step"}
        turns = [turn["seconds"] for turn in taken[name][1:]]
        rows.append({**asdict(case), **figures, "side": name, "turns": turns})
    return rows


def show_turns(rows: Sequence[dict[str, Any]]) -> None:
    """Medians over steps, and for each other side the median of the per-step ratios to ours, with its interval."""
    rates = {}
    for row in rows:
        if "error" in row:
            print(f"{row['stage']}, {row['side']}: {row['error']}")
            continue
        tokens = row["tokens"][FREE : FREE + len(row["turns"])]
        rates[row["side"]] = [n / s for n, s in zip(tokens, row["turns"], strict=True)]
    for name, speeds in rates.items():
        line = f"{rows[0]['stage']}, {name}: {statistics.median(speeds):,.0f} tokens/s, median of {len(speeds)} steps"
        if name != "ours" and "ours" in rates:
            whole = statistics.median(rates["ours"]) / statistics.median(speeds)
            line += f"; ours over it {whole:.3f}, step by step {median_ratio(rates['ours'], speeds)}"
        print(line, flush=True)
    for row in rows:
        if "first_dpo_loss" in row:
            print(f"dpo_loss of the first step, {row['side']}: {row['first_dpo_loss']:.4f}")


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The peaks of every session."""
    sessions = (run_session(options.models, *key, cases) for key, cases in MEMORY.items())
    return [row for rows in sessions for row in rows]


def longest(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two steps of one row, as long as 24 GB allow according to the memory model; if that fails, of shorter ones."""
    from sclite.train.memory import Setting, largest_length
    from tests.train.architectures import recipe_architecture

    rows = []
    for name, stage in LONGEST:
        setting = Setting(stage, 1, 2048, RANK, backend="unsloth")
        length = largest_length(recipe_architecture(name), setting, int(CAP_BYTES))
        for share in (1.0, 0.94, 0.88) if length else ():
            case = replace(peak("ours", stage, 1, int(share * length)), batch=1, steps=2)
            rows += run_session(options.models, name, "unsloth", [case])
            if "error" not in rows[-1]:
                break
    return rows


def show_memory(rows: Sequence[dict[str, Any]]) -> None:
    """Peaks and reserved memory, compared with the memory model."""
    print("geometry          stage side    micro  length  peak GB  held GB  model GB  off by  longest")
    for row in rows:
        start = f"{row['geometry']:<18}{row['stage']:<6}{row['side']:<7}{row['micro']:>6}{row['length']:>8}"
        if "error" in row:
            print(start, row["error"])
            continue
        off = row["modelled_gb"] / row["peak_gb"] - 1
        longest = row["largest_length"] or 0
        print(
            f"{start}{row['peak_gb']:>9.2f}{row['reserved_gb']:>9.2f}{row['modelled_gb']:>10.2f}{100 * off:>7.0f}%{longest:>9,}"
        )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path, help="also write every figure there, as JSON")
    parser.add_argument("--only", choices=("speed", "memory", "longest"))
    parser.add_argument("--steps", type=int, default=40, help="of the speeds, for each side")
    parser.add_argument("--full", action="store_true", help="of the speeds, every row of 2,048 tokens")
    options = parser.parse_args()
    if options.steps <= FREE:
        parser.error(f"--steps {options.steps}: the first {FREE} are not timed")
    found = []
    if options.only in (None, "speed"):
        found += speed(options)
    for name, measured in (("memory", memory), ("longest", longest)):
        if options.only in (None, name):
            rows = measured(options)
            show_memory(rows)
            found += rows
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
