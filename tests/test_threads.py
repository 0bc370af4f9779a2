"""Waiting threads spin briefly, unless the user says otherwise."""

from sclite.threads import wait_briefly


def test_threads_spin_for_microseconds_unless_the_environment_says_otherwise():
    environment: dict[str, str] = {}
    wait_briefly(environment)
    assert environment["OMP_WAIT_POLICY"] == "passive"
    assert 0 < int(environment["GOMP_SPINCOUNT"]) <= 10_000  # 100,000 stood still beside busy processes
    environment["GOMP_SPINCOUNT"] = "7"
    wait_briefly(environment)
    assert environment["GOMP_SPINCOUNT"] == "7"
