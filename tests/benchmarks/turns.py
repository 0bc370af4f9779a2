"""Programs that take a step each in turn, so that changes in the machine's speed affect all of them alike."""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any


def argument_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with this text, as it is."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


class Turn:
    """A program's part: after each step it prints {"turn": {"seconds", "cpu", ..}}, and waits for a line on stdin.

    A step is timed from the end of the one before, without the wait; the GPU is done before the clock is read. The first
    `skip` steps take no turn.
    """

    def __init__(self, skip: int = 0):
        self.skip, self._began = skip, (time.monotonic(), time.process_time())

    def step_done(self, **figures: float) -> None:
        """Print the step's seconds, with other figures of it, and wait."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.skip:
            self.skip -= 1
        else:
            seconds, cpu = time.monotonic() - self._began[0], time.process_time() - self._began[1]
            took = {"seconds": seconds, "cpu": cpu}
            print(json.dumps({"turn": {**took, **figures}}), flush=True)
            sys.stdin.readline()
        self._began = time.monotonic(), time.process_time()


def take_turns(
    commands: Mapping[str, Sequence[str]], turns: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[dict[str, Any]]]]:
    """(the turns of each program, what else it printed as JSON). One that dies takes no further part.

    The first turn of each is that in which it says that it is ready: it shares the machine with the others' loading.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    running = {name: subprocess.Popen(command, **pipes) for name, command in commands.items()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    others: dict[str, list[dict[str, Any]]] = {name: [] for name in running}

    def next_turn(name: str, go: bool = True) -> bool:
        """Let a program take its next step; False if it ended instead."""
        with suppress(OSError):
            if go:
                running[name].stdin.write("\n")
            for line in running[name].stdout:
                found = json.loads(line) if line.startswith('{"') else {}
                if "turn" in found:
                    taken[name].append(found["turn"])
                    return True
                others[name] += [found] if found else []
        return False

    try:
        alive = [name for name in running if next_turn(name, go=False)]
        for number in range(turns):
            for name in alive[:: 1 if number % 2 else -1]:
                if not next_turn(name):
                    alive.remove(name)
            print({name: round(taken[name][-1]["seconds"], 2) for name in alive}, file=sys.stderr)
        for name in alive:
            next_turn(name)  # to the end
    finally:
        for process in running.values():
            with suppress(OSError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
    return taken, others


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """The median of the ratios of each turn, with its 95 % interval: 1.152 [1.061, 1.253]."""
    ratios, draw = [one / other for one, other in zip(theirs, ours, strict=True)], random.Random(0)
    drawn = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} [{drawn[50]:.3f}, {drawn[1949]:.3f}]"
