"""The rollouts of PPO and GRPO, one an iteration; with one_step_off each is sampled while the texts of the one before it are
judged on the hosts, by the policy before that one's update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from rlhf_jax.algorithms.text_rewards import TextRewards
from rlhf_jax.data import Batches
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import abstract_arrays, batch_sharding, to_global
from rlhf_jax.types import Completions, Params, Rng


@struct.dataclass
class Ahead:
    """What a checkpoint of a run with one_step_off holds. state: as without. completions: the next iteration's rollout, which
    the policy that sampled it is gone for: a resumed run could not sample it again."""

    state: Any
    completions: Completions


class Correction(Protocol):
    """What is read of PPOConfig and GRPOConfig."""

    @property
    def importance(self) -> Any: ...
    @property
    def old_logprobs(self) -> str: ...


def step_keys(rng: Rng, step: int) -> Rng:
    """(key to sample with, key that orders the update's minibatches) of an iteration. rng: the run's."""
    return jax.random.split(jax.random.fold_in(rng, step))


def row_lengths(replies: Completions) -> tuple[np.ndarray, int, np.ndarray, int]:
    """(tokens of each row, columns of a row, tokens of each response, columns of a response): what `BatchConfig.fold` needs.
    replies: numpy."""
    mask, prompts = np.asarray(replies.mask), np.asarray(replies.prompts.mask)
    new, most = mask.sum(axis=1), mask.shape[1]
    return prompts.sum(axis=1) + new, prompts.shape[1] + most, new, most


class Rollouts:
    """Draws prompts and samples. stale: the rollout taken last is of an older policy than the present one.

    generate: (params, frozen, prompts, rng) -> Completions. rng: the run's key. params: what is trained, for its shapes.
    """

    def __init__(
        self,
        generate: Callable[..., Completions],
        batches: Batches[Any],
        mesh: Mesh,
        rng: Rng,
        params: Params,
        frozen: Params,
        *,
        one_step_off: bool,
    ) -> None:
        self.stale = False
        self.one_step_off = one_step_off
        self._generate, self._batches, self._mesh, self._rng, self._frozen = generate, batches, mesh, rng, frozen
        self._next: Completions | None = None
        self._shape: Any = self._shapes(params) if one_step_off else None

    def _shapes(self, params: Params) -> Completions:
        before = self._batches.get_state()
        made = jax.eval_shape(self._generate, params, self._frozen, next(self._batches), self._rng)
        self._batches.set_state(before)
        shapes: Completions = abstract_arrays(made, jax.tree.map(lambda _: batch_sharding(self._mesh), made))
        return shapes

    def _sample(self, step: int, params: Params) -> Completions:
        prompts = to_global(next(self._batches), self._mesh)
        return self._generate(params, self._frozen, prompts, step_keys(self._rng, step)[0])

    def take(self, step: int, params: Params) -> Completions:
        """The rollout of ``step``: what `begin` sampled, else sampled now. Waits for it."""
        self.stale = self._next is not None
        found = self._sample(step, params) if self._next is None else self._next
        self._next = None
        jax.block_until_ready(found)
        return found

    def begin(self, step: int, params: Params) -> None:
        """With one_step_off the devices begin the rollout of ``step``; does not wait for them."""
        if self.one_step_off:
            self._next = self._sample(step, params)

    def packed(self, state: Any) -> Any:
        """``state`` as it is saved: with one_step_off `Ahead`, with shapes for a rollout that is not there yet."""
        if not self.one_step_off:
            return state
        return Ahead(state, self._shape if self._next is None else self._next)

    def unpacked(self, saved: Any, *, keep: bool) -> Any:
        """The state of what `packed` gave or a checkpoint of that. keep: go on with its rollout; else the next one is of the
        policy that then is (at a run's beginning, and after a rollback, whose prompts are passed over)."""
        if not self.one_step_off:
            return saved
        self._next = saved.completions if keep else None
        return saved.state

    def within(self, subtree: str) -> str:
        """Where a part of the state, ``subtree``, lies in a checkpoint."""
        return f"state/{subtree}" if self.one_step_off else subtree


def check_one_step_off(one_step_off: bool, algorithm: Correction, texts: TextRewards) -> None:
    """Raises InputError for one_step_off without a correction for samples of an older policy, or without anything to
    overlap."""
    if not isinstance(one_step_off, bool):
        raise InputError(f"run.one_step_off = {one_step_off!r}: give True or False")
    if not one_step_off:
        return
    name = type(algorithm).__name__
    if algorithm.importance is None and algorithm.old_logprobs != "sampler":
        raise InputError(
            f"run.one_step_off: rollouts are of an older policy; weigh them with {name}.importance = @ImportanceConfig(), or let "
            f"the clipped ratio begin at the sampler with {name}.old_logprobs = 'sampler'"
        )
    if not texts.read_texts:
        raise InputError(
            "run.one_step_off: without run.reward_texts or run.monitor there is no work on the hosts to sample beside; remove it"
        )
