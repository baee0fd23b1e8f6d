"""Samples of another policy than the scored one: the weights make the update that of the scored policy's own samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.learn import GRPOConfig, ImportanceConfig, PPOConfig
from rlhf_jax.testing import completions, prompt_batch
from rlhf_jax.types import Rollout

SAMPLER, POLICY, SCORES = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3]), np.array([1.0, -0.5, 2.0])
ARMS = [0] * 5 + [1] * 3 + [2] * 2
"""Ten responses of one token, as often as the sampler draws each: a mean over them is its expectation, exactly."""
KEY = jax.random.key(0)
PLAIN = {"missing_eos_penalty": None, "whiten_advantages": "none", "lam": 1.0, "kl_coefficient": 0.0}


def bandit() -> Rollout:
    """Sampled by SAMPLER, scored by POLICY."""
    logs = np.log(SAMPLER)[ARMS][:, None].astype(np.float32)
    prompts = prompt_batch([[1]] * 10, prompt_ids=[0] * 10, sample_ids=range(10))
    eos = (3, 4, 5)
    outcome = completions(prompts, [[3 + arm] for arm in ARMS], length=1, eos_ids=eos, logprobs=logs)
    old, zeros = np.log(POLICY)[ARMS][:, None].astype(np.float32), np.zeros((10, 1), np.float32)
    return Rollout(outcome, old, old, zeros, {"gold": np.float32(SCORES[ARMS])}, np.ones(len(ARMS), bool))


def gradient(kind: str, importance: ImportanceConfig | None) -> np.ndarray:
    """In the policy's logits, before anything has been learned."""
    params = {"logits": jnp.log(jnp.float32(POLICY))}

    def logprobs(params, completions):
        return jax.nn.log_softmax(params["logits"])[completions.tokens - 3], jnp.zeros(completions.tokens.shape)

    if kind == "ppo":
        ppo = PPOConfig(**PLAIN, importance=importance)
        batch, _ = learn.prepare(bandit(), ppo, 0.0)
        loss = learn.make_ppo_loss(
            lambda p, completions: (*logprobs(p, completions), jnp.zeros(completions.tokens.shape)), ppo
        )
    else:
        grpo = GRPOConfig(advantages="centred", importance=importance)
        batch, _ = learn.prepare_groups(bandit(), grpo, 10)
        loss = learn.make_grpo_loss(logprobs, grpo)
    return np.asarray(learn.gradients(loss, params, {}, batch, KEY, 1)[0]["logits"])


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_weighted_samples_give_the_gradient_of_the_policy(kind):
    """The policy gradient is -p(a) (A(a) - mean A), mean A = .2 - .25 + .6 = .55: -[.2 x .45, .5 x -1.05, .3 x 1.45]. Weights
    .4, 1.667, 1.5: within the bounds. GRPO's baseline is the same for all arms and drops out of the expectation."""
    np.testing.assert_allclose(gradient(kind, ImportanceConfig()), [-0.09, 0.525, -0.435], atol=1e-6)
    # Without them sampler(a) stands for p(a): -(sampler(a) A(a) - p(a) mean), e.g. PPO -(.5 - .2 x .75) for the first.
    assert np.abs(gradient(kind, None) - [-0.09, 0.525, -0.435]).max() > 0.05


@pytest.mark.parametrize(("outside", "second"), [("clip", 1.5), ("drop", 0.0)])
def test_bounds_reach_the_update(outside, second):
    """high 1.5: the second arm's 1.667 becomes 1.5 or 0. Gradient: -(sampler w A (a) - p(a) sum of sampler w A)."""
    weights = np.array([0.4, second, 1.5])
    value = SAMPLER * weights * SCORES
    actual = gradient("ppo", ImportanceConfig(outside=outside, high=1.5 + 1e-6))
    np.testing.assert_allclose(actual, -(value - POLICY * value.sum()), atol=1e-6)


def test_what_is_told_of_the_weights():
    """Ten tokens of weights .4 (5), 5/3 (3), 1.5 (2): mean (2 + 5 + 3) / 10 = 1; outside 0 ... 1.6: 3 of 10. Clipped at 1.6:
    sum 9.8, squares .8 + 7.68 + 4.5 = 12.98, sample size 96.04 / 129.8 = .739908."""
    config = PPOConfig(**PLAIN, importance=ImportanceConfig(high=1.6))
    batch, metrics = learn.prepare(bandit(), config, 0.0)
    actual = {name: float(mean.value()) for name, mean in metrics.items() if name.startswith("importance")}
    expected = {"importance": 1.0, "importance_outside": 0.3, "importance_sample_size": 0.739908}
    assert actual == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(batch.importance[:, 0], [0.4] * 5 + [1.6] * 3 + [1.5] * 2, rtol=1e-6)
    unweighted, silent = learn.prepare(bandit(), PPOConfig(**PLAIN), 0.0)
    assert unweighted.importance is None and not any(name.startswith("importance") for name in silent)


def test_weights_below_the_bounds_and_padding():
    """Bounds .5 ... 1.6: below lie 5 weights of .4, above 3 of 5/3: 8 of 10 outside. Clipped: .5 x 5 + 1.6 x 3 + 1.5 x 2 =
    10.3, squares 1.25 + 7.68 + 4.5 = 13.43, sample size 106.09 / 134.3 = .789948. A column of padding beside every token
    changes none of it, whatever it holds."""
    config = PPOConfig(**PLAIN, importance=ImportanceConfig(low=0.5, high=1.6))

    def padded(x):
        return np.pad(np.asarray(x), ((0, 0), (0, 1)), constant_values=np.asarray(9, np.asarray(x).dtype))

    short = bandit()
    completions = short.completions
    mask = np.pad(np.asarray(completions.mask), ((0, 0), (0, 1)))
    wide = completions.replace(tokens=padded(completions.tokens), mask=mask, logprobs=padded(completions.logprobs))
    fields = {name: padded(getattr(short, name)) for name in ("logprobs", "ref_logprobs", "values")}
    for rollout in (short, short.replace(completions=wide, **fields)):
        batch, metrics = learn.prepare(rollout, config, 0.0)
        actual = {name: float(mean.value()) for name, mean in metrics.items() if name.startswith("importance")}
        expected = {"importance": 1.0, "importance_outside": 0.8, "importance_sample_size": 0.789948}
        assert actual == pytest.approx(expected, abs=1e-6)
        np.testing.assert_allclose(batch.importance[:, 0], [0.5] * 5 + [1.6] * 3 + [1.5] * 2, rtol=1e-6)
        assert not batch.importance[:, 1:].any()


@pytest.mark.parametrize("config", [PPOConfig, GRPOConfig])
def test_weights_beside_a_ratio_that_holds_them_are_refused(config):
    with pytest.raises(InputError, match=f"{config.__name__}.importance: .* it would count twice"):
        config(importance=ImportanceConfig(), old_logprobs="sampler")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit": "word"}, "ImportanceConfig.unit = 'word': one of 'token'"),
        ({"outside": "mask"}, "ImportanceConfig.outside = 'mask': one of 'clip'"),
        ({"low": 1.5}, "ImportanceConfig.low = 1.5: "),
        ({"high": 0.9}, "ImportanceConfig.high = 0.9: "),
        ({"high": float("nan")}, "ImportanceConfig.high = nan: "),
    ],
)
def test_bad_bounds_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        ImportanceConfig(**fields)


def test_guards_of_rollouts_by_an_older_policy():
    """A gap between sampler and scorer is then what was learned since; the first ratio is still 1, unless it begins there."""
    scorer, sampler = PPOConfig(), PPOConfig(old_logprobs="sampler")
    learn.stop_if_sampler_differs(3, 0.5, scorer, stale=True)
    learn.stop_if_not_identity(3, 0.5, sampler, stale=True)
    with pytest.raises(RunStopped, match="before the first update"):
        learn.stop_if_not_identity(3, 0.5, scorer, stale=True)
