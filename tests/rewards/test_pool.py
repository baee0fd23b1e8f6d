"""Rewards in processes: the same scores in the same order, and an error with the prompt's id instead of a hang."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.records import Failed, Response
from rlhf_jax.rewards import RewardPool


def obedient(responses):
    """What the response says: a number, or how to fail."""
    (response,) = responses
    text = response.text
    if text == "hang":
        time.sleep(600)
    if text == "die":
        os._exit(7)
    if text == "raise":
        raise ValueError("cannot\nread this")
    score = {"lost": Failed("no\nsandbox"), "nan": math.nan}.get(text)
    identity = {"process": [os.getpid()], "id": [float(response.id) + response.extra["half"]]}
    return {"score": [float(text) if score is None else score], **identity}


def run(pool, texts):
    return pool([Response((), text, extra={"half": 0.5}, id=str(index)) for index, text in enumerate(texts)])


def test_scores_keep_their_order_and_failures_name_the_prompt():
    pool = RewardPool(obedient, workers=2, seconds=5)
    try:
        numbers = [float(index % 7) for index in range(40)]
        actual = run(pool, [str(number) for number in numbers])
        assert actual["score"] == numbers and actual["id"] == [index + 0.5 for index in range(40)]
        assert len(set(actual["process"])) == 2 and os.getpid() not in actual["process"]
        with pytest.raises(RunStopped, match=r"reward of prompt '2': ValueError: cannot read this"):
            run(pool, ["1", "1", "raise", "1"])
        assert run(pool, ["3"])["score"] == [3.0]  # new processes
        with pytest.raises(RunStopped, match=r"reward of prompt '1': its process ended with code 7"):
            run(pool, ["1", "die"])
        with pytest.raises(RunStopped, match=r"reward of prompt '0': in_processes\.score: 'score' .* is nan"):
            run(pool, ["nan"])
        assert run(pool, ["0", "lost"])["score"] == [0.0, Failed("no sandbox")]
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
        RewardPool(lambda responses: {}, workers=1, seconds=1)
    with pytest.raises(InputError, match=r"in_processes\.workers = 0"):
        RewardPool(obedient, workers=0, seconds=1)
    with pytest.raises(InputError, match=r"in_processes\.seconds = 0"):
        RewardPool(obedient, workers=1, seconds=0)


ORPHANS = """
import os, sys
from rlhf_jax.records import Response
from rlhf_jax.rewards import RewardPool
import hanging

if __name__ == "__main__":
    pool = RewardPool(hanging.score, workers=2, seconds=600)
    pool([Response((), "a"), Response((), "b")])
    print(*(worker.process.pid for worker in pool._workers), flush=True)
    pool([Response((), "hang"), Response((), "hang")])
"""
HANGING = """
import re


def score(responses):
    if responses[0].text == "hang":
        re.match(r"(a+)+$", "a" * 60 + "b")  # holds Python's lock for years
    return {"r": [1.0 for _ in responses]}
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """A busy verifier would go on at full load, without end."""
    (tmp_path / "hanging.py").write_text(HANGING)
    (tmp_path / "parent.py").write_text(ORPHANS)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    workers = [int(number) for number in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while (remaining := [pid for pid in workers if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert remaining == []


IMPORTING = """
import os
from pathlib import Path

if "WORKERS" in os.environ:
    with Path(os.environ["WORKERS"]).open("a") as file:
        file.write(f"{os.getpid()} ")
    while True:
        pass


def score(responses):
    return {"r": [1.0 for _ in responses]}
"""
STARTING = """
if __name__ == "__main__":
    import os, sys
    from rlhf_jax.records import Response
    from rlhf_jax.rewards import RewardPool
    import importing

    os.environ["WORKERS"] = sys.argv[1]
    RewardPool(importing.score, workers=2, seconds=600)([Response((), "a"), Response((), "b")])
"""


def test_workers_that_still_import_end_with_the_parent_too(tmp_path):
    """What a module does when it is imported may hang as well as what it scores."""
    (tmp_path / "importing.py").write_text(IMPORTING)
    (tmp_path / "starting.py").write_text(STARTING)
    pids = tmp_path / "pids"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, str(tmp_path / "starting.py"), str(pids)]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while (not pids.exists() or len(pids.read_text().split()) < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    workers, deadline = [int(pid) for pid in pids.read_text().split()], time.monotonic() + 10
    while (remaining := [pid for pid in workers if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in remaining:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and remaining == []


def running(pid):
    """Neither gone nor waiting to be collected by whoever inherits it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_killed_before_it_reads_names_the_prompt():
    """As by the killer of processes when memory is short; the pipe is then reset, not at its end."""
    pool = RewardPool(obedient, workers=1, seconds=30)

    def kill():
        while not pool._workers or pool._workers[0].place is None:
            time.sleep(0.001)
        pool._workers[0].process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunStopped, match=r"reward of prompt '0': its process ended with code -9"):
        run(pool, ["1"])
    killer.join()
    assert pool._workers == []
