"""Cores: those of the process or of its container's quota; waiting threads spin briefly."""

import os

import pytest

from sclite import cores


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), (None, 8)],
)
def test_a_containers_quota_limits_the_cores(monkeypatch, tmp_path, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores.usable_cores() == expected


def test_threads_spin_for_microseconds_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    cores.wait_briefly()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert 0 < int(os.environ["GOMP_SPINCOUNT"]) <= 10_000  # 100,000 stalled on a busy machine
    os.environ["GOMP_SPINCOUNT"] = "7"
    cores.wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
