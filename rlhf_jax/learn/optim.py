"""Optimisers: AdamW with a schedule and global-norm clipping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rlhf_jax.errors import InputError, require_number, require_one_of, require_whole
from rlhf_jax.types import Params

SCHEDULES = ("constant", "linear", "cosine")
Warmup = Literal["from_above_zero", "from_zero"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The settings of the optimizer. Moments are float32 in any dtype of the parameters.

    learning_rate: peak.
    schedule: shape of the learning rate after the warm-up, over the rest of the run.
    warmup_steps: steps of a linear warm-up.
    warmup: "from_above_zero" has (k + 1) / (w + 1) of the peak at step k of w, so that no step has a rate of 0; "from_zero" has
    k / w, as the schedules of transformers.
    final_fraction: the share of the peak at which "linear" and "cosine" end.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: added to the root of the second moment.
    adam: "optax" adds epsilon after the bias correction (PyTorch, optax), "tf" before it (TensorFlow, as in Ziegler et al.
    2019; with epsilon 1e-5 the early steps differ up to 16-fold).
    weight_decay: decoupled, on matrices only (embeddings, experts, routers and adapters among them).
    max_grad_norm: clip by global norm; None = no clipping.
    spike: refuse an update whose loss or gradient norm is more than that many standard deviations above its running mean (6 is
    usual); None = accept all.
    spike_memory: updates of the running mean of ``spike``.
    """

    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup: Warmup = "from_above_zero"
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    adam: Literal["optax", "tf"] = "optax"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    spike: float | None = None
    spike_memory: int = 100

    def __post_init__(self) -> None:
        bounds = {
            "learning_rate": (0, 10),
            "final_fraction": (0, 1),
            "epsilon": (0, 1),
            "weight_decay": (0, 10),
        }
        for name, (low, high) in bounds.items():
            require_number(f"OptimizerConfig.{name}", getattr(self, name), low, high)
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require_number(f"OptimizerConfig.{name}", value, 0, 1)
            if value >= 1 - 2.0**-25:  # 1 in float32, which never forgets: 0 / 0
                raise InputError(f"OptimizerConfig.{name} = {value!r}: give a number in [0, 1)")
        if self.schedule not in SCHEDULES:
            raise InputError(f"OptimizerConfig.schedule = {self.schedule!r}: one of {', '.join(SCHEDULES)}")
        require_one_of("OptimizerConfig.warmup", self.warmup, get_args(Warmup))
        if self.adam not in ("optax", "tf"):
            raise InputError(f"OptimizerConfig.adam = {self.adam!r}: 'optax' or 'tf'")
        require_whole("OptimizerConfig.warmup_steps", self.warmup_steps, 0)
        for name in ("max_grad_norm", "spike"):
            value = getattr(self, name)
            if value is not None:
                require_number(f"OptimizerConfig.{name}", value, 0)
            if value == 0:
                raise InputError(f"OptimizerConfig.{name} = {value!r}: give a number above 0, or None")
        require_whole("OptimizerConfig.spike_memory", self.spike_memory, 2)


def make_schedule(config: OptimizerConfig, steps: int, updates_per_step: int = 1) -> optax.Schedule:
    """Return the learning rate as a function of the update count. steps: of the run; updates_per_step: optimiser updates in each
    (PPO: epochs x
    minibatches), during which the rate stands still (lm-human-preferences steps it per rollout batch).

    Linear over 4 steps without warm-up: 1, .75, .5, .25 of the peak.
    """
    require_whole("run.steps", steps, 1)
    require_whole("make_schedule: updates_per_step", updates_per_step, 1)
    decay = max(steps - config.warmup_steps, 1)

    def schedule(count: Any) -> Any:
        step = (jnp.asarray(count) // updates_per_step).astype(jnp.float32)
        progress = jnp.clip((step - config.warmup_steps) / decay, 0.0, 1.0)
        if config.schedule == "linear":
            shape = 1.0 - progress
        elif config.schedule == "cosine":
            shape = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            shape = jnp.ones(())
        if config.schedule != "constant":
            shape = config.final_fraction + (1.0 - config.final_fraction) * shape
        if config.warmup == "from_zero":
            warmup = jnp.minimum(1.0, step / max(config.warmup_steps, 1)) if config.warmup_steps else jnp.ones(())
        else:
            warmup = jnp.minimum(1.0, (step + 1.0) / (config.warmup_steps + 1.0))
        return config.learning_rate * shape * warmup

    return schedule


def scale_by_adam_tf(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    """Make Adam as TensorFlow 1 computes it: ``sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + epsilon)``.

    First step with g = 1e-5, epsilon 1e-5: 0.0306534 of the learning rate, where optax.adam gives 0.5 of it.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        t = count.astype(jnp.float32)
        scale = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        return jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + epsilon), mu, nu), optax.ScaleByAdamState(
            count, mu, nu
        )

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def make_optimizer(
    config: OptimizerConfig, steps: int, updates_per_step: int = 1, *, matrices: Params | None = None
) -> optax.GradientTransformation:
    """Make clip, Adam, decoupled weight decay, learning rate. See `make_schedule` for steps and updates_per_step.

    matrices: which parameters are matrices, a tree of bools with a leaf for every trained parameter and perhaps others
    (`Model.matrices`). Raises InputError for a weight decay without it.
    """
    if config.weight_decay and matrices is None:
        raise InputError("make_optimizer: weight_decay acts on matrices: say which parameters are (Model.matrices)")
    if config.adam == "tf":
        adam = scale_by_adam_tf(config.b1, config.b2, config.epsilon)
    else:
        adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    parts = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm is not None else []
    parts.append(optax.GradientTransformation(lambda params: adam.init(_as_float32(params)), adam.update))
    if config.weight_decay and matrices is not None:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_flags_of(matrices)))
    adamw = optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(config, steps, updates_per_step)))
    return adamw if config.spike is None else check_spikes(adamw, config.spike, config.spike_memory)


class SpikeState(NamedTuple):
    """inner: of the optimiser. accepted: int32 [], updates so far. mean, variance: float32 [2], of loss and gradient norm.
    refused: bool [], whether the last update was."""

    inner: Any
    accepted: Array
    mean: Array
    variance: Array
    refused: Array


def check_spikes(
    optimizer: optax.GradientTransformation, sigmas: float, memory: int
) -> optax.GradientTransformationExtraArgs:
    """Wrap ``optimizer`` so that it changes nothing when loss or gradient norm is a spike; ``update`` takes ``loss``.

    A spike: above ``mean + sigmas * max(deviation, |mean| / 100)`` of what was accepted, once min(memory, 20) updates
    were. The first ``memory`` values are averaged plainly, later ones with weight 1 / memory. A refused update does not
    enter the mean: a loss that stays high is refused until somebody looks.
    """

    def init(params: Any) -> SpikeState:
        zeros = jnp.zeros(2, jnp.float32)
        return SpikeState(optimizer.init(params), jnp.zeros((), jnp.int32), zeros, zeros, jnp.zeros((), bool))

    def update(grads: Any, state: SpikeState, params: Any = None, *, loss: Array, **_: Any) -> tuple[Any, SpikeState]:
        observed = jnp.stack([loss, optax.global_norm(grads)]).astype(jnp.float32)
        deviation = jnp.maximum(jnp.sqrt(state.variance), jnp.abs(state.mean) / 100)
        refused = (state.accepted >= min(memory, 20)) & (observed > state.mean + sigmas * deviation).any()
        updates, inner = optimizer.update(grads, state.inner, params)
        weight = jnp.maximum(1.0 / (state.accepted + 1), 1.0 / memory)
        away = observed - state.mean
        new = SpikeState(
            inner,
            state.accepted + 1,
            state.mean + weight * away,
            (1 - weight) * (state.variance + weight * away**2),
            jnp.zeros((), bool),
        )
        following = jax.tree.map(lambda before, after: jnp.where(refused, before, after), state, new)
        zeros = jax.tree.map(lambda u: jnp.where(refused, jnp.zeros_like(u), u), updates)
        return zeros, following._replace(refused=refused)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_float32(params: Any) -> Any:
    """Keep moments in float32.

    Moments of bfloat16 parameters in their own dtype would lose a decay of 0.999 to rounding, and the state would change dtype in
    its
    first step (gradients are float32).
    """
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def _flags_of(tree: Params) -> Callable[[Any], Any]:
    """Return the function params -> bools that `optax` calls with a part of the parameters: adapters, or one model of several."""
    flags = dict(jax.tree_util.tree_leaves_with_path(tree))

    def flag(path: Any, _: Any) -> bool:
        if path not in flags:
            raise InputError(f"make_optimizer: matrices has no leaf {jax.tree_util.keystr(path)}, which is trained")
        return bool(flags[path])

    return lambda params: jax.tree_util.tree_map_with_path(flag, params)
