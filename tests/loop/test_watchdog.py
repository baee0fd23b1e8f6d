"""Tests of the watchdog: time while the process is suspended does not count as a hang."""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.loop.watchdog import Watchdog


def make_watchdog(tmp_path: Path, since: float = 0.0) -> Watchdog:
    watchdog = Watchdog(tmp_path, {"train": 5.0, "step": 60.0}, 10.0, lambda: since)
    watchdog._checked, watchdog._computed = 100.0, 1.0
    watchdog._phase, watchdog._phase_began, watchdog._step, watchdog._step_began = "train", 100.0, 3, 100.0
    return watchdog


def test_a_stopped_process_does_not_hang(tmp_path: Path) -> None:
    """SIGSTOP for 800 s after the check at 100.25: no CPU time passes. 4 s later the phase has run 4.25 s of its 5."""
    watchdog = make_watchdog(tmp_path)
    assert watchdog.look(100.25, 1.01) == ""
    assert watchdog.look(900.25, 1.02) == ""
    assert watchdog.look(904.25, 4.0) == ""
    assert watchdog.look(905.5, 5.0).startswith("step 3: train took longer than 5 s")


def test_a_long_call_that_holds_the_lock_is_a_hang(tmp_path: Path) -> None:
    """The thread made no check for 50 s, but the process used CPU time."""
    assert "train took longer" in make_watchdog(tmp_path).look(150.0, 51.0)


def test_small_gaps_count(tmp_path: Path) -> None:
    """The thread may wait a second on a busy machine; waiting for a device takes no CPU time but is checked."""
    watchdog = make_watchdog(tmp_path)
    words = [watchdog.look(100.0 + second, 1.0) for second in range(1, 8)]
    assert words[:5] == [""] * 5 and words[6]


def test_stop_within_excludes_a_suspension(tmp_path: Path) -> None:
    watchdog = make_watchdog(tmp_path, since=100.0)
    watchdog._deadlines = {}
    assert watchdog.look(101.0, 1.1) == "" and watchdog.look(701.0, 1.2) == ""
    assert watchdog.look(702.0, 1.3) == "" and [watchdog.look(702.0 + n, 2.0) for n in range(1, 12)][-1].startswith(
        "not stopped"
    )
