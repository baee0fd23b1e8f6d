"""Reward functions in processes of their own, with a time limit: a verifier that hangs must not hang the run."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from rlhf_jax.types import InputError, RunStopped

Score = Callable[[Sequence[Mapping[str, Any]], Sequence[str], Sequence[bool]], dict[str, list[float]]]
"""(prompt rows with "id", responses, ended) -> named scores, one number per response."""


@dataclass
class _Worker:
    """A process and what it is at: ``place`` of a response and the moment when its time is up (None: idle)."""

    process: BaseProcess
    pipe: Connection
    place: int | None = None
    deadline: float = 0.0


class RewardPool:
    """A `Score` that scores every response by itself in one of ``workers`` processes, started at the first call.

    score: a function that a new process can import (no closure, no lambda). seconds: for one response; the first one of
    a process may take ``starting`` seconds more (imports). A response without a score in time, a function that raises
    or gives no number and a process that dies are RunStopped with the id of the prompt; the processes are then gone,
    and new ones start at the next call. Raises InputError for settings and functions that cannot work.
    """

    def __init__(self, score: Score, *, workers: int, seconds: float, starting: float = 120.0) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise InputError(f"in_processes.workers = {workers!r}: give a whole number >= 1")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise InputError(f"in_processes.seconds = {seconds!r}: give a number > 0")
        try:
            ForkingPickler.dumps(score)  # what starting a process will do with it
        except Exception as error:
            raise InputError(
                f"in_processes.score: {error}; give a function of a module, which a process can import"
            ) from error
        self._score, self._count, self._seconds, self._starting = score, workers, float(seconds), starting
        self._workers: list[_Worker] = []

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], responses: Sequence[str], ended: Sequence[bool]
    ) -> dict[str, list[float]]:
        """The scores in the order of the responses."""
        samples = [(dict(row), response, bool(end)) for row, response, end in zip(rows, responses, ended, strict=True)]
        allowed = self._seconds if self._workers else self._seconds + self._starting
        if not self._workers:
            self._workers = [_start(self._score) for _ in range(min(self._count, max(1, len(samples))))]
        try:
            scores = self._all(samples, allowed)
        except BaseException:
            self.close()
            raise
        names = list(scores[0]) if scores else []
        for sample, one in zip(samples, scores, strict=True):
            if list(one) != names:
                raise RunStopped(f"reward of prompt {sample[0]['id']!r}: scores {list(one)}, others have {names}")
        return {name: [one[name] for one in scores] for name in names}

    def close(self) -> None:
        """End the processes, at once."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _all(self, samples: list[tuple[dict[str, Any], str, bool]], allowed: float) -> list[dict[str, float]]:
        scores: list[dict[str, float]] = [{} for _ in samples]
        waiting, missing = iter(range(len(samples))), len(samples)
        for worker in self._workers:
            self._give(worker, waiting, samples, allowed)
        while missing:
            busy = {worker.pipe: worker for worker in self._workers if worker.place is not None}
            first = min(worker.deadline for worker in busy.values())
            for pipe in wait(list(busy), timeout=max(0.0, first - time.monotonic())):
                worker = busy[pipe]  # type: ignore[index]
                assert worker.place is not None
                scores[worker.place] = _answer(worker, samples[worker.place][0]["id"])
                missing -= 1
                self._give(worker, waiting, samples, self._seconds)
            for worker in self._workers:
                if worker.place is not None and time.monotonic() > worker.deadline and not worker.pipe.poll():
                    raise RunStopped(
                        f"reward of prompt {samples[worker.place][0]['id']!r}: no score within {self._seconds:g} s "
                        "(in_processes.seconds)"
                    )
        return scores

    def _give(self, worker: _Worker, waiting: Any, samples: Sequence[Any], allowed: float) -> None:
        worker.place = next(waiting, None)
        if worker.place is not None:
            worker.deadline = time.monotonic() + allowed
            try:
                worker.pipe.send(samples[worker.place])
            except OSError as error:
                prompt = samples[worker.place][0]["id"]
                raise RunStopped(f"reward of prompt {prompt!r}: its process had ended before ({error})") from error


def _start(score: Score) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, score), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection, score: Score) -> None:
    """In the process: scores of one response after the other, or what went wrong."""
    while True:
        try:
            row, response, ended = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({name: float(value) for name, (value,) in score([row], [response], [ended]).items()})
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _answer(worker: _Worker, prompt: str) -> dict[str, float]:
    try:
        answer = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        raise RunStopped(
            f"reward of prompt {prompt!r}: its process ended with code {worker.process.exitcode}"
        ) from None
    if isinstance(answer, str):
        raise RunStopped(f"reward of prompt {prompt!r}: {' '.join(answer.split())}")
    scores: dict[str, float] = answer
    return scores
