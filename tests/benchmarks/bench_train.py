"""Training on a card: speed beside a script of Unsloth and TRL and beside the plain path, peaks beside the memory model.

    python -m tests.benchmarks.bench_train --models FOLDER --out FILE            everything, one table
    python -m tests.benchmarks.bench_train --models FOLDER --only speed|memory   a part of it
    python -m tests.benchmarks.bench_train --embedded RUN --adapters FOLDER      a quickstart's three trainings on the card

Models are random ones of real geometry, written into FOLDER once. Each session is a process within 24 GB that loads its
student once for all its cases. The last form takes the rows of a quickstart's run folder; evaluate its adapters where
llama.cpp is.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tests.benchmarks.train_sides import Case, peak

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
"""(geometry, backend): peaks beside the memory model."""
SPEED = {
    "unsloth": {"sft": [Case("ours", "sft", 4), Case("script", "sft", 4)], "dpo": [Case("ours", "dpo", 2)]},
    "plain": {"sft": [Case("plain", "sft", 4)], "dpo": [Case("plain", "dpo", 2)]},
}
"""By backend and stage: those that take turns in one session."""


# -- all of them ---------------------------------------------------------------------------------------------------


def model_folder(models: Path, name: str) -> Path:
    """The random model of a geometry, written once, by a process of its own."""
    folder = models / name
    if not (folder / "model.safetensors.index.json").is_file():
        write = "import sys, pathlib; from tests.gpu.models import random_model; from tests.train.geometries import RECIPES"
        write += "; random_model(pathlib.Path(sys.argv[1]), RECIPES[sys.argv[2]], 'cuda')"
        subprocess.run([sys.executable, "-c", write, str(folder), name], check=True)
    return folder


def run_session(models: Path, geometry: str, backend: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The figures of a session; where it dies, the case that it died in, with its last word."""
    folder = model_folder(models, geometry)
    command = [sys.executable, "-m", "tests.benchmarks.train_sides", "--model", str(folder)]
    command += [
        "--geometry",
        geometry,
        "--backend",
        backend,
        "--cases",
        json.dumps([asdict(c) for c in cases]),
    ]
    rows = []
    with TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        for line in process.stdout:  # told as it comes: whoever stops this keeps what was measured
            if line.startswith('{"geometry"'):
                rows.append(json.loads(line))
                print(line, end="", file=sys.stderr, flush=True)
        if process.wait():
            said.seek(0)
            errors = said.read()
            print(errors[-4000:], file=sys.stderr, flush=True)
            last = (errors.strip().splitlines() or ["no word"])[-1][:300]
            rows.append({"geometry": geometry, **asdict(cases[len(rows)]), "error": last})
    return rows


def turns(cases: Sequence[Case], rounds: int) -> list[Case]:
    """Each case once, to be left out of the figures since kernels are compiled and loaded there; then every case in
    each round, every other round backwards, so that what gets faster with time favours none."""
    return [case for number in range(rounds + 1) for case in (cases[::-1] if number % 2 else cases)]


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every side in turn, `--rounds` times."""
    rows = []
    for backend, stages in SPEED.items():
        cases = [
            case for stage, cases in stages.items() if stage == (options.stage or stage) for case in cases
        ]
        if backend == (options.backend or backend):
            found = run_session(
                options.models, options.geometry or FIRST, backend, turns(cases, options.rounds)
            )
            rows += found[len(cases) :]
    return rows


def over_all_steps(rounds: Sequence[Sequence[float]]) -> float:
    """The median of all steps of all rounds."""
    return statistics.median(speed for steps in rounds for speed in steps)


def best_of_each_step(rounds: Sequence[Sequence[float]]) -> float:
    """The median over steps of the fastest round of each."""
    return statistics.median(max(speeds) for speeds in zip(*rounds, strict=True))


def show_speed(rows: Sequence[dict[str, Any]]) -> None:
    """Ratios of medians over the steps of all rounds; and of the best that each step did in any of them.

    The same step has the same rows in each round and on each side. What a busy host adds to a step is never negative, so
    that the second ratio is the steadier one where single rounds lie far apart.
    """
    found: dict[tuple[str, str], list[list[float]]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault((row["stage"], row["side"]), []).append(row["speeds"][2:])
    for (stage, side), theirs in found.items():
        if side == "ours" or (stage, "ours") not in found:
            continue
        told = []
        for name, figure in (("medians", over_all_steps), ("bests of each step", best_of_each_step)):
            mine, other = figure(found[stage, "ours"]), figure(theirs)
            told.append(f"{name}: ours {mine:,.0f} tokens/s, {side} {other:,.0f}: {mine / other:.3f}")
        print(f"{stage}, {len(theirs)} rounds; " + "; ".join(told))
    for row in rows:
        if "first_dpo_loss" in row:
            print(f"dpo_loss of the first step, {row['side']}: {row['first_dpo_loss']:.4f}")


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks of every session, or of those that `--geometry` and `--backend` leave."""
    rows = []
    for (geometry, backend), cases in MEMORY.items():
        if geometry == (options.geometry or geometry) and backend == (options.backend or backend):
            rows += run_session(options.models, geometry, backend, cases)
    return rows


def show_memory(rows: Sequence[dict[str, Any]]) -> None:
    """Peaks beside the memory model."""
    names = ("geometry", "stage", "side", "micro", "length", "peak GB", "model GB", "off by", "longest")
    print("{:<18}{:<6}{:<7}{:>6}{:>8}{:>9}{:>10}{:>8}{:>9}".format(*names))
    for row in rows:
        start = f"{row['geometry']:<18}{row['stage']:<6}{row['side']:<7}{row['micro']:>6}{row['length']:>8}"
        if "error" in row:
            print(start, row["error"])
            continue
        off = row["modelled_gb"] / row["peak_gb"] - 1
        longest = row["largest_length"] or 0
        print(f"{start}{row['peak_gb']:>9.2f}{row['modelled_gb']:>10.2f}{100 * off:>7.0f}%{longest:>9,}")


def embedded(run_folder: Path, adapters: Path, backend: str) -> None:
    """Train the embedded student's three stages on the card from a quickstart's rows; copy its adapters."""
    import shutil

    from sclite.config import load
    from sclite.records import Problem
    from sclite.run import Run
    from sclite.signature import digest
    from sclite.train.dpo import train_dpo
    from sclite.train.sft import train_sft
    from sclite.train.warm import train_warm

    run = Run(adapters / "run")
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in ("problems", "templates", "attempts", "reviews", "pairs"):
        shutil.copy(run_folder / f"{name}.jsonl", run.path(f"{name}.jsonl"))
    settings = [f"run={run_folder}", f"student.backend={backend}", "student.load_in_4bit=false"]
    config = load(settings=settings, environment={}, own_file=False)
    problems = run.read("problems.jsonl", Problem)
    unseen = frozenset(p.id for p in problems[len(problems) // 2 :])  # as the quickstart divides them
    inputs = Run(run_folder).finished("sft")["inputs"]
    assert inputs["problems kept for stage 2"] == digest(sorted(unseen))
    for stage in (train_sft, train_warm, train_dpo):
        print(json.dumps(stage(config, run, unseen=unseen).as_dict()))
    for name in ("sft", "dpo"):
        shutil.copytree(run.path(f"{name}/adapter"), adapters / name, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path, help="also write every figure there, as JSON")
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--stage", choices=("sft", "dpo"), help="of the speeds this one alone")
    parser.add_argument("--rounds", type=int, default=3, help="of the speeds, after one that is left out")
    parser.add_argument(
        "--geometry", help=f"of the memory table's sessions this one alone; for speed {FIRST}"
    )
    parser.add_argument("--backend", choices=("unsloth", "plain"), help="the same; for --embedded unsloth")
    parser.add_argument("--embedded", type=Path, metavar="RUN")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    options = parser.parse_args()
    if options.embedded:
        embedded(options.embedded, options.adapters, options.backend or "unsloth")
    else:
        found = []
        for name, part, show in (("speed", speed, show_speed), ("memory", memory, show_memory)):
            if options.only in (None, name):
                rows = part(options)
                show(rows)
                found += rows
        if options.out:
            options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
