"""How the worker threads of torch and llama.cpp wait for each other; to be set before either is loaded."""

import os


def wait_briefly() -> None:
    """Let waiting threads spin for some microseconds and then sleep, unless the environment says otherwise.

    OpenMP's default, spinning for milliseconds, is up to 100 times slower next to another busy process (measured on
    2 cores). Sleeping immediately makes a training step a sixth slower on an idle machine, and more on a busy one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
