"""Tests of signal handling in this process, and of which signal counts as the second one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from rlhf_jax.loop.signals import Signals


@pytest.fixture(autouse=True)
def default_hangup_handler() -> Iterator[None]:
    """The suite itself may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_second_hangup_is_ignored() -> None:
    """Kernel and shell both send SIGHUP when a terminal closes: the save must not be cut short."""
    with Signals() as signals:
        signals.in_loop = True
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == signal.SIGHUP == signals.agreed()


def test_hang_up_is_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signals.in_loop = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_outside_the_loop_a_signal_ends_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught, Signals():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number and signal.getsignal(number) == before
