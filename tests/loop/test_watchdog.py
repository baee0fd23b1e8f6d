"""What counts as a hang: time that passes while the process runs, not while it is stopped."""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.loop.watchdog import Watchdog


def watched(tmp_path: Path, since: float = 0.0) -> Watchdog:
    dog = Watchdog(tmp_path, {"train": 5.0, "step": 60.0}, 10.0, lambda: since)
    dog._looked, dog._computed = 100.0, 1.0
    dog._phase, dog._phase_began, dog._step, dog._step_began = "train", 100.0, 3, 100.0
    return dog


def test_a_stopped_process_does_not_hang(tmp_path: Path) -> None:
    """Looks at 100.25 ... then SIGSTOP for 800 s: no CPU time passes. 4 s later the phase has run for 4.25 s of its 5."""
    dog = watched(tmp_path)
    assert dog.look(100.25, 1.01) == ""
    assert dog.look(900.25, 1.02) == ""
    assert dog.look(904.25, 4.0) == ""
    assert dog.look(905.5, 5.0).startswith("step 3: train took longer than 5 s")


def test_a_long_call_that_holds_the_lock_is_a_hang(tmp_path: Path) -> None:
    """The thread did not look for 50 s, but the process computed all the time."""
    assert "train took longer" in watched(tmp_path).look(150.0, 51.0)


def test_small_gaps_count(tmp_path: Path) -> None:
    """A busy machine lets the thread wait for a second; a wait for a device takes no CPU time and is looked at."""
    dog = watched(tmp_path)
    words = [dog.look(100.0 + second, 1.0) for second in range(1, 8)]
    assert words[:5] == [""] * 5 and words[6]


def test_stop_within_does_not_count_a_stop_either(tmp_path: Path) -> None:
    dog = watched(tmp_path, since=100.0)
    dog._deadlines = {}
    assert dog.look(101.0, 1.1) == "" and dog.look(701.0, 1.2) == ""
    assert dog.look(702.0, 1.3) == "" and [dog.look(702.0 + n, 2.0) for n in range(1, 12)][-1].startswith("not stopped")
