"""Waiting threads spin briefly, unless the user says otherwise."""

from sclite.threads import wait_briefly


def test_what_the_environment_says_stays():
    environment = {"GOMP_SPINCOUNT": "7"}
    wait_briefly(environment)
    assert environment == {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "passive"}


def test_otherwise_threads_spin_for_microseconds_and_then_sleep():
    environment: dict[str, str] = {}
    wait_briefly(environment)
    assert 0 < int(environment["GOMP_SPINCOUNT"]) <= 10_000  # 100,000 stood still beside busy processes
