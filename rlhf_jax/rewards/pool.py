"""Reward functions in separate processes, with a time limit, so that a verifier that hangs cannot hang the run."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler

from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.processes import Parent, end_with_parent, this_process
from rlhf_jax.records import Failed, Response
from rlhf_jax.rewards.gate import CheckedReward, Reward, Scores, check_reward

Answer = dict[str, float | Failed]
"""The scores of one response."""


@dataclass
class _Worker:
    """A process of the pool.

    place: the index of the response that it scores; None when it is idle. deadline: the monotonic time, in seconds, at which
    its time limit ends.
    """

    process: BaseProcess
    pipe: Connection
    place: int | None = None
    deadline: float = 0.0


class RewardPool:
    """A `Reward` that scores every response by itself in one of ``workers`` processes, started at the first call.

    score: a function that a new process can import (no closure, no lambda).
    seconds: the time limit of one response; the first response of a process may take ``starting`` seconds more (imports).

    Raises RunStopped, with the id of the prompt, when a response has no score in time, when the function raises or returns no
    number, and when a process dies; all processes then end, and new ones start at the next call. The processes also end when
    the process that started them ends, for whatever reason. Raises InputError for settings and functions that cannot work.
    """

    def __init__(self, score: Reward, *, workers: int, seconds: float, starting: float = 120.0) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InputError(f"in_processes.workers = {workers!r}: give a whole number >= 1")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise InputError(f"in_processes.seconds = {seconds!r}: give a number > 0")
        check_reward(score, "in_processes.score")
        try:
            ForkingPickler.dumps(score)  # as the start of a process does
        except Exception as error:
            raise InputError(
                f"in_processes.score: {error}; give a function of a module, which a process can import"
            ) from error
        self._score, self._count, self._seconds, self._starting = score, workers, float(seconds), starting
        self._workers: list[_Worker] = []

    def __call__(self, responses: Sequence[Response]) -> dict[str, list[float | Failed]]:
        """Return the scores in the order of the responses."""
        allowed = self._seconds if self._workers else self._seconds + self._starting
        if not self._workers:
            self._workers = [_start_worker(self._score) for _ in range(min(self._count, max(1, len(responses))))]
        try:
            scores = self._score_all(responses, allowed)
        except BaseException:
            self.close()
            raise
        names = list(scores[0]) if scores else []
        for response, answer in zip(responses, scores, strict=True):
            if answer.keys() != set(names):
                raise RunStopped(f"reward of prompt {response.id!r}: scores {list(answer)}, others have {names}")
        return {name: [answer[name] for answer in scores] for name in names}

    def close(self) -> None:
        """End the processes, at once."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _score_all(self, responses: Sequence[Response], allowed: float) -> list[Answer]:
        scores: list[Answer] = [{} for _ in responses]
        waiting, missing = iter(range(len(responses))), len(responses)
        for worker in self._workers:
            self._assign(worker, waiting, responses, allowed)
        while missing:
            busy: dict[object, _Worker] = {w.pipe: w for w in self._workers if w.place is not None}
            first = min(worker.deadline for worker in busy.values())
            for pipe in wait([w.pipe for w in busy.values()], timeout=max(0.0, first - time.monotonic())):
                worker = busy[pipe]
                assert worker.place is not None
                scores[worker.place] = _receive(worker, responses[worker.place].id)
                missing -= 1
                self._assign(worker, waiting, responses, self._seconds)
            for worker in self._workers:
                if worker.place is not None and time.monotonic() > worker.deadline and not worker.pipe.poll():
                    raise RunStopped(
                        f"reward of prompt {responses[worker.place].id!r}: no score within {self._seconds:g} s "
                        "(in_processes.seconds)"
                    )
        return scores

    def _assign(self, worker: _Worker, waiting: Iterator[int], responses: Sequence[Response], allowed: float) -> None:
        worker.place = next(waiting, None)
        if worker.place is not None:
            worker.deadline = time.monotonic() + allowed
            response = responses[worker.place]
            try:
                worker.pipe.send(response)
            except OSError as error:
                raise _process_ended(worker, response.id) from error


def _start_worker(score: Reward) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, _pickle(score), this_process()), daemon=True)
    process.start()
    child_end.close()
    return _Worker(process, parent_end)


def _pickle(score: Reward) -> bytes:
    return bytes(ForkingPickler.dumps(score))


def _serve(pipe: Connection, score: bytes, parent: Parent) -> None:
    """Score one response after the other in the worker process, and send the scores or an error message.

    score: the pickled reward. The process unpickles it, and so imports the reward's module, only after it is set to end with
    its parent.
    """
    end_with_parent(parent)
    _ignore_signals()
    checked = CheckedReward(ForkingPickler.loads(score), "in_processes.score")
    while True:
        try:
            response = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = checked([response])
            pipe.send({name: _score_or_failure(scores) for name, scores in answer.items()})
        except InputError as error:
            pipe.send(str(error))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _score_or_failure(scores: Scores) -> float | Failed:
    return float(scores.values[0]) if scores.scored[0] else Failed(scores.reason)


def _ignore_signals() -> None:
    """Ignore the signals that a terminal or a scheduler sends to the parent and its workers alike.

    The parent saves a checkpoint first and then ends its workers. This sets a handler, not SIG_IGN, so that programs that a
    reward starts have the default behaviour.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


def _receive(worker: _Worker, prompt: str) -> Answer:
    try:
        answer = worker.pipe.recv()
    except (EOFError, OSError) as error:  # a reset: the process ended before it read
        raise _process_ended(worker, prompt) from error
    if isinstance(answer, str):
        raise RunStopped(f"reward of prompt {prompt!r}: {' '.join(answer.split())}")
    scores: Answer = answer
    return scores


def _process_ended(worker: _Worker, prompt: str) -> RunStopped:
    worker.process.join()
    return RunStopped(f"reward of prompt {prompt!r}: its process ended with code {worker.process.exitcode}")
