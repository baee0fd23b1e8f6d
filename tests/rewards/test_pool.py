"""Rewards in processes: the same scores in the same order, and an error with the prompt's id instead of a hang."""

from __future__ import annotations

import os
import time

import pytest

from rlhf_jax.rewards import RewardPool
from rlhf_jax.types import InputError, RunStopped


def obedient(rows, responses, ended):
    """What the response says: a number, or how to fail."""
    (row,), (response,), (end,) = rows, responses, ended
    if response == "hang":
        time.sleep(600)
    if response == "die":
        os._exit(7)
    if response == "raise":
        raise ValueError("cannot\nread this")
    return {"score": [float(response)], "process": [os.getpid()], "id": [float(row["id"]) + 0.5 * end]}


def run(pool, responses):
    return pool([{"id": str(index)} for index in range(len(responses))], responses, [True] * len(responses))


def test_scores_come_in_order_from_several_processes_and_failures_name_the_prompt():
    pool = RewardPool(obedient, workers=2, seconds=5)
    try:
        numbers = [float(index % 7) for index in range(40)]
        found = run(pool, [str(number) for number in numbers])
        assert found["score"] == numbers and found["id"] == [index + 0.5 for index in range(40)]
        assert len(set(found["process"])) == 2 and os.getpid() not in found["process"]
        with pytest.raises(RunStopped, match=r"reward of prompt '2': ValueError: cannot read this"):
            run(pool, ["1", "1", "raise", "1"])
        assert run(pool, ["3"])["score"] == [3.0]  # new processes
        with pytest.raises(RunStopped, match=r"reward of prompt '1': its process ended with code 7"):
            run(pool, ["1", "die"])
        run(pool, ["0", "0"])
        pool._seconds = 1.0
        began = time.monotonic()
        with pytest.raises(RunStopped, match=r"reward of prompt '0': no score within 1 s"):
            run(pool, ["hang", "1", "1"])
        assert time.monotonic() - began < 60
        assert pool._workers == []
    finally:
        pool.close()


def test_what_no_process_can_import_is_refused():
    with pytest.raises(InputError, match=r"in_processes\.score: .*which a process can import"):
        RewardPool(lambda rows, responses, ended: {}, workers=1, seconds=1)
    with pytest.raises(InputError, match=r"in_processes\.workers = 0"):
        RewardPool(obedient, workers=0, seconds=1)
    with pytest.raises(InputError, match=r"in_processes\.seconds = 0"):
        RewardPool(obedient, workers=1, seconds=0)
