"""How the worker threads of torch and llama.cpp wait for each other. To be set before either is loaded."""

import os
from collections.abc import MutableMapping


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads spin for some microseconds and then sleep, unless the environment says otherwise.

    OpenMP's own way, to spin for milliseconds, costs a factor of up to 100 beside any other busy process (measured on
    2 cores); to sleep at once makes a training step longer by a sixth on an idle machine, by more on a busy one.
    """
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("GOMP_SPINCOUNT", "1000")
