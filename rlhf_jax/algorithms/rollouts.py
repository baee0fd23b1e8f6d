"""The rollouts of PPO and GRPO, one an iteration.

With one_step_off, a rollout is sampled by the policy before the update of the preceding one, while the hosts judge the preceding
texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from rlhf_jax.algorithms.rollout_fields import Limits
from rlhf_jax.algorithms.text_rewards import TextRewards
from rlhf_jax.data import Batches
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import abstract_arrays, batch_sharding, to_global
from rlhf_jax.types import Completions, Params, Rng


@struct.dataclass
class Ahead:
    """The content of a checkpoint of a run with one_step_off.

    state: as without. completions: the rollout of the next iteration. A resumed run could not sample it again, because the policy
    that sampled it no longer exists.
    """

    state: Any
    completions: Completions


def step_keys(rng: Rng, step: int) -> Rng:
    """Return the keys of an iteration: (for sampling, for the order of the minibatches). rng: the run's key."""
    return jax.random.split(jax.random.fold_in(rng, step))


def row_lengths(completions: Completions) -> tuple[np.ndarray, int, np.ndarray, int]:
    """Return (tokens of each row, columns of a row, tokens of each response, columns of a response) for `folds.row_fold`.

    completions: numpy.
    """
    mask, prompts = np.asarray(completions.mask), np.asarray(completions.prompts.mask)
    new, most = mask.sum(axis=1), mask.shape[1]
    return prompts.sum(axis=1) + new, prompts.shape[1] + most, new, most


class Rollouts:
    """A source of rollouts, which draws prompts and samples.

    stale: whether an older policy sampled the last rollout. generate: (params, frozen, prompts, rng) -> Completions. rng: the
    run's key.
    params: trained parameters, for their shapes.
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
        completions = jax.eval_shape(self._generate, params, self._frozen, next(self._batches), self._rng)
        self._batches.set_state(before)
        shapes: Completions = abstract_arrays(
            completions, jax.tree.map(lambda _: batch_sharding(self._mesh), completions)
        )
        return shapes

    def _sample(self, step: int, params: Params) -> Completions:
        prompts = to_global(next(self._batches), self._mesh)
        return self._generate(params, self._frozen, prompts, step_keys(self._rng, step)[0])

    def take(self, step: int, params: Params) -> Completions:
        """Return the rollout of ``step``: the one that `begin` sampled, else a new one. Waits for the devices."""
        self.stale = self._next is not None
        completions = self._sample(step, params) if self._next is None else self._next
        self._next = None
        jax.block_until_ready(completions)
        return completions

    def begin(self, step: int, params: Params) -> None:
        """Start the rollout of ``step`` with one_step_off, without waiting for the devices; do nothing without it."""
        if self.one_step_off:
            self._next = self._sample(step, params)

    def packed(self, state: Any) -> Any:
        """Return ``state`` as a checkpoint holds it: with one_step_off an `Ahead`.

        Shapes stand in place of a rollout that is not sampled yet.
        """
        if not self.one_step_off:
            return state
        return Ahead(state, self._shape if self._next is None else self._next)

    def unpacked(self, saved: Any, *, keep: bool) -> Any:
        """Return the state inside the result of `packed` or of its checkpoint.

        keep: continue with its rollout; otherwise the next rollout is sampled by the policy of its iteration (at the start of a
        run, and
        after a rollback, whose prompts are skipped).
        """
        if not self.one_step_off:
            return saved
        self._next = saved.completions if keep else None
        return saved.state

    def within(self, subtree: str) -> str:
        """Return the path in a checkpoint of ``subtree``, a part of the state."""
        return f"state/{subtree}" if self.one_step_off else subtree


def check_one_step_off(one_step_off: bool, algorithm: Limits, texts: TextRewards) -> None:
    """Check that one_step_off corrects for samples of an older policy and has something to overlap. Raises InputError otherwise."""
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
