"""How many CPU cores this process may use, and how worker threads on them wait for each other."""

import math
import os
from contextlib import suppress
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """The number of cores that the process may run on, capped by its container's CPU quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, QUOTA.read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def wait_briefly() -> None:
    """Let waiting threads spin for some microseconds and then sleep, unless the environment says otherwise.

    To be called before torch or llama.cpp is loaded. OpenMP's default, spinning for milliseconds, is up to 100 times
    slower next to another busy process (measured on 2 cores). Sleeping immediately makes a training step a sixth slower
    on an idle machine, and more on a busy one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
