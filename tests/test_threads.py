"""Waiting threads spin briefly, unless the user says otherwise."""

import os

from sclite.threads import wait_briefly


def test_threads_spin_for_microseconds_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    wait_briefly()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert 0 < int(os.environ["GOMP_SPINCOUNT"]) <= 10_000  # 100,000 stalled on a busy machine
    os.environ["GOMP_SPINCOUNT"] = "7"
    wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
