"""Training on a GPU: speed beside a script of Unsloth and TRL and beside the plain path, peaks beside the memory model.

    python -m tests.benchmarks.bench_train --models FOLDER --out FILE            everything, one table
    python -m tests.benchmarks.bench_train --models FOLDER --only speed|memory|longest   a part of it

Models are random ones of real geometry, written into FOLDER once; each process stays within 24 GB. For the memory table a
process loads its student once for all its cases. For the speeds every side is a process of its own, all on the GPU at
once (about 10 to 16 GB each for 7B), and they take a step each in turn, so that a host whose speed changes slows all
alike.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tests.benchmarks.train_sides import CAP_BYTES, FREE, RANK, TURN_LINE, Case, peak

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
    "sft": {
        "ours": Case("ours", "sft", 4),
        "script": Case("script", "sft", 4),
        "plain": Case("plain", "sft", 4),
    },
    "dpo": {"ours": Case("ours", "dpo", 2), "plain": Case("plain", "dpo", 2)},
}
"""By stage: those that take turns."""
LONGEST = [(SECOND, "sft"), (SECOND, "dpo")]
"""Whose longest row, by the memory model, is trained on."""


# -- all of them ---------------------------------------------------------------------------------------------------


def model_folder(models: Path, name: str) -> Path:
    """The random model of a geometry, written once, by a process of its own."""
    folder = models / name
    if not (folder / "model.safetensors.index.json").is_file():
        write = "import sys, pathlib; from tests.gpu.models import random_model; from tests.train.architectures import RECIPES"
        write += "; random_model(pathlib.Path(sys.argv[1]), RECIPES[sys.argv[2]], 'cuda')"
        subprocess.run([sys.executable, "-c", write, str(folder), name], check=True)
    return folder


def side_command(models: Path, geometry: str, backend: str, cases: Sequence[Case]) -> list[str]:
    """The process that measures these cases; its model is written where it is missing."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.train_sides",
        "--geometry",
        geometry,
        "--backend",
        backend,
    ]
    command += ["--model", str(model_folder(models, geometry))]
    return [*command, "--cases", json.dumps([asdict(case) for case in cases])]


def run_session(models: Path, geometry: str, backend: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The figures of a session; where it dies, the case that it died in, with its last line."""
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
    for stage, sides in SPEED.items():
        if stage == (options.stage or stage):
            given = {"steps": options.steps, "full": options.full}
            asked = {name: replace(case, **given) for name, case in sides.items()}
            if options.sides:
                asked = {name: case for name, case in asked.items() if name in options.sides.split(",")}
            if asked:
                rows += in_turns(options.models, options.geometry or FIRST, asked)
                show_turns(rows[-len(asked) :])
    return rows


def in_turns(models: Path, geometry: str, sides: Mapping[str, Case]) -> list[dict[str, Any]]:
    """The figures of each side, with the seconds of each of its steps as `turns`. One that dies takes no further part."""
    found = {name: {"side": name, **asdict(case), "turns": []} for name, case in sides.items()}
    processes: dict[str, Any] = {}
    try:
        for name, case in sides.items():
            command = side_command(models, geometry, "plain" if name == "plain" else "unsloth", [case])
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
            processes[name] = subprocess.Popen([*command, "--turns"], **pipes)
        alive = [name for name in sides if next_turn(processes[name], found[name], go=False)]
        for number in range(min(case.steps for case in sides.values()) - FREE):
            for name in alive[:: 1 if number % 2 else -1]:
                if not next_turn(processes[name], found[name]):
                    alive.remove(name)
            print(json.dumps({name: found[name]["turns"][-1] for name in alive}), file=sys.stderr)
        for name in alive:
            next_turn(processes[name], found[name])  # to the end
    finally:
        for name, process in processes.items():
            with suppress(OSError):
                process.stdin.close()
            if "geometry" not in found[name]:
                process.kill()
                found[name].setdefault("error", f"ended with {process.wait()}")
            process.wait()
    return list(found.values())


def next_turn(process: Any, figures: dict[str, Any], go: bool = True) -> bool:
    """Let a side take its step, which it has taken already without `go`; False where it ended instead.

    The step's seconds, or the side's last figures, are put into `figures`.
    """
    with suppress(OSError):
        if go:
            process.stdin.write("\n")
        for line in process.stdout:
            if line.startswith('{"geometry"'):
                figures |= json.loads(line)
            if line.startswith(TURN_LINE):
                if go:
                    figures["turns"].append(float(line.removeprefix(TURN_LINE)))
                return True
    return False


def show_turns(rows: Sequence[dict[str, Any]]) -> None:
    """Medians over steps; and of ours to each other side, the median of each step's own ratio with its interval."""
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
            ratios = [mine / other for mine, other in zip(rates["ours"], speeds, strict=True)]
            draw = random.Random(0)
            boot = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
            whole = statistics.median(rates["ours"]) / statistics.median(speeds)
            line += f"; ours over it {whole:.3f}, step by step {statistics.median(ratios):.3f} "
            line += f"[{boot[50]:.3f}, {boot[1949]:.3f}]"
        print(line, flush=True)
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


def longest(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two steps of one row, as long as the memory model says that 24 GB hold; where it fails, of shorter ones."""
    from sclite.train.memory import Setting
    from sclite.train.micro_batch import largest_length
    from tests.train.architectures import recipe_architecture

    rows = []
    for name, stage in LONGEST:
        if stage != (options.stage or stage):
            continue
        length = largest_length(
            recipe_architecture(name), Setting(stage, 1, 2048, RANK, backend="unsloth"), int(CAP_BYTES)
        )
        for share in (1.0, 0.94, 0.88) if length else ():
            case = replace(peak("ours", stage, 1, int(share * length)), batch=1, steps=2)
            rows += run_session(options.models, name, "unsloth", [case])
            if "error" not in rows[-1]:
                break
    return rows


def show_memory(rows: Sequence[dict[str, Any]]) -> None:
    """Peaks, and what the allocator held, beside the memory model."""
    names = (
        "geometry",
        "stage",
        "side",
        "micro",
        "length",
        "peak GB",
        "held GB",
        "model GB",
        "off by",
        "longest",
    )
    print("{:<18}{:<6}{:<7}{:>6}{:>8}{:>9}{:>9}{:>10}{:>8}{:>9}".format(*names))
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--out", type=Path, help="also write every figure there, as JSON")
    parser.add_argument("--only", choices=("speed", "memory", "longest"))
    parser.add_argument("--stage", choices=("sft", "dpo"), help="of speeds and longest rows this one alone")
    parser.add_argument("--steps", type=int, default=40, help="of the speeds, for each side")
    parser.add_argument("--full", action="store_true", help="of the speeds, every row of 2,048 tokens")
    parser.add_argument("--sides", help="of the speeds, of ours,script,plain")
    parser.add_argument(
        "--geometry", help=f"of the memory table's sessions this one alone; for speed {FIRST}"
    )
    parser.add_argument("--backend", choices=("unsloth", "plain"), help="of the memory table")
    options = parser.parse_args()
    if options.steps <= FREE:
        parser.error(f"--steps {options.steps}: the first {FREE} are not timed")
    if unknown := set((options.sides or "ours").split(",")) - set(SPEED["sft"]):
        parser.error(f"--sides: {', '.join(sorted(unknown))} is none of {', '.join(SPEED['sft'])}")
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
