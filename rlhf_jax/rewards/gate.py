"""Checks of the scores that rewards, monitors and judges return: one finite number, or `Failed`, per response and name."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.records import Failed, Response

Reward = Callable[[Sequence[Response]], Mapping[str, Sequence[float | Failed]]]
"""responses -> {name: one number per response, in their order}. docs/rewards.md states the contract."""
SIGNATURE = "def reward(responses: Sequence[Response]) -> dict[str, list[float]]"


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """A reward that is built when a run starts, because it reads files or starts processes; a plan does not build it."""

    make: Callable[[], Reward]


def open_reward(source: Reward | RewardSource) -> Reward:
    """Return the reward of a source; a function, which a user's own builder may return, is returned unchanged."""
    return source.make() if isinstance(source, RewardSource) else source


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of N responses under one name.

    values: float64 [N], 0 where scoring failed. scored: bool [N], False where scoring failed. reason: why the first failed.
    """

    values: np.ndarray
    scored: np.ndarray
    reason: str = ""

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Scores:
        """Return the scores of a measurement that cannot fail."""
        return cls(np.asarray(values, np.float64), np.ones(len(values), bool))

    @property
    def failed(self) -> int:
        """The number of responses without a score."""
        return int((~self.scored).sum())

    @property
    def mean(self) -> float | None:
        """The mean over the responses that have a score; None when none has."""
        return float(np.mean(self.values[self.scored])) if self.scored.any() else None

    def to_list(self) -> list[float | None]:
        """Return the scores for a JSON file, None where scoring failed."""
        pairs = zip(self.values.tolist(), self.scored.tolist(), strict=True)
        return [value if scored else None for value, scored in pairs]


class CheckedReward:
    """A `Reward` whose return values are checked and become `Scores` under each name.

    setting: the key that the user set ("run.reward_texts"), for messages.
    key: a name that the scores must have, and under which at least one response must have a score.

    The constructor raises InputError for a reward that cannot be called with a list of responses. A call raises InputError
    for anything but one finite number, or `Failed`, per response under the same names as in the first call, and RunStopped
    when every response failed under ``key``.
    """

    def __init__(self, reward: Reward, setting: str, key: str | None = None) -> None:
        check_reward(reward, setting)
        self._reward, self._setting, self._key = reward, setting, key
        self._names: list[str] | None = None

    def __call__(self, responses: Sequence[Response]) -> dict[str, Scores]:
        """Return the scores under each name, in the order of the responses.

        The reward gets a copy, so that changes it makes reach no other reward and no later call: a resumed run would not have
        them.
        """
        answer = self._reward(copy.deepcopy(list(responses)))
        names = self._check_names(answer)
        scores = {name: self._check_column(name, answer[name], responses) for name in names}
        if self._key is not None and responses and not scores[self._key].scored.any():
            raise RunStopped(
                f"{self._setting}: the score {self._key!r} failed for all {len(responses)} responses; prompt "
                f"{responses[0].id!r}: {scores[self._key].reason}"
            )
        return scores

    def _check_names(self, answer: Any) -> list[str]:
        if not isinstance(answer, Mapping):
            raise InputError(
                f"{self._setting}: gave {_describe(answer)}, not a mapping of names to scores; write {SIGNATURE}"
            )
        names = list(answer)
        if wrong := [name for name in names if not isinstance(name, str) or not name]:
            raise InputError(f"{self._setting}: {wrong[0]!r} is no name of a score; give a text")
        if not names:
            raise InputError(f"{self._setting}: gave no scores; give at least one name")
        if self._key is not None and self._key not in names:
            raise InputError(
                f"run.reward_key = {self._key!r}: {self._setting.removeprefix('run.')} gives {', '.join(sorted(names))}"
            )
        self._names = self._names or sorted(names)
        if sorted(names) != self._names:
            raise InputError(
                f"{self._setting}: gave {', '.join(sorted(names))}, and {', '.join(self._names)} before; give the same names "
                "in every call"
            )
        return names

    def _check_column(self, name: str, column: Any, responses: Sequence[Response]) -> Scores:
        place, first = f"{self._setting}: {name!r}", f"the first prompt is {responses[0].id!r}" if responses else ""
        entries = _entries(column)
        if entries is None:
            raise InputError(
                f"{place} is {_describe(column)} for {len(responses)} responses ({first}); give a list with one number for each"
            )
        if len(entries) != len(responses):
            raise InputError(
                f"{place} has {len(entries)} scores for {len(responses)} responses ({first}); give one number for each"
            )
        values, scored = np.zeros(len(entries)), np.ones(len(entries), bool)
        reason = ""
        for index, (entry, response) in enumerate(zip(entries, responses, strict=True)):
            if isinstance(entry, Failed):
                scored[index] = False
                reason = reason or " ".join(str(entry.reason).split())
            else:
                values[index] = _to_float(
                    entry, f"{place} of prompt {response.id!r} (response {index} of {len(entries)})"
                )
        return Scores(values, scored, reason)


def check_reward(reward: Any, setting: str) -> None:
    """Check that a reward can be called with one list of responses. Raises InputError, with the signature, when it cannot."""
    if not callable(reward):
        raise InputError(f"{setting}: {_describe(reward)} is no function; give {SIGNATURE}")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):
        return  # a function in C without a signature
    try:
        signature.bind([])
    except TypeError:
        name = getattr(reward, "__name__", type(reward).__name__)
        builder = f", or bind @{name}() when it builds the reward" if not signature.parameters else ""
        raise InputError(
            f"{setting}: {name}{signature} cannot be called with one list of responses; write {SIGNATURE}{builder} "
            "(Response: prompt, text, ended, extra, id)"
        ) from None


def _entries(column: Any) -> list[Any] | None:
    """Return the scores of a list, tuple or one-dimensional array; None for anything else."""
    if isinstance(column, list | tuple):
        return list(column)
    if isinstance(column, str | bytes | Mapping) or not hasattr(column, "__array__"):
        return list(column) if isinstance(column, Sequence) and not isinstance(column, str | bytes) else None
    array = _as_array(column)
    if array is None or array.ndim != 1:
        return None
    return (
        array.tolist() if array.dtype != object else list(array)
    )  # exact, also for bfloat16; None where an entry is masked


def _as_array(value: Any) -> np.ndarray | None:
    """Convert an array of numpy, JAX, torch, ... to numpy.

    None for an array that cannot be read (a torch tensor with a gradient, or on a device) and for durations.
    """
    try:
        array = np.asanyarray(value)
    except Exception:  # each library raises its own
        return None
    return None if array.dtype.kind == "m" else array


def _to_float(entry: Any, place: str) -> float:
    """Convert an entry to a float; True and False are 1 and 0. Raises InputError for anything that float32 cannot hold."""
    array = _as_array(entry) if hasattr(entry, "__array__") else None
    plain = array[()] if array is not None and array.ndim == 0 else entry
    remedy = "give a finite number, or Failed(reason) when scoring itself failed"
    if not isinstance(plain, numbers.Real | np.bool_):
        raise InputError(f"{place} is {_describe(entry)}; {remedy}")
    try:
        value = float(plain)
    except OverflowError:
        value = float("inf")
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(np.float32(value)))
    if not finite:
        beyond = ", which float32 cannot hold" if np.isfinite(value) else ""
        raise InputError(f"{place} is {value}{beyond}; {remedy}")
    return value


def _describe(value: Any) -> str:
    """Describe a value in a message: itself when it is short, else its type with its shape or its beginning."""
    if getattr(value, "shape", ()):
        return f"an array of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}..."
