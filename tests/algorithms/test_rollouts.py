"""The policy that samples each prompt, and the content of a checkpoint, with one_step_off and without."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import data, learn
from rlhf_jax.algorithms.rollouts import Ahead, Rollouts, check_one_step_off, row_lengths, step_keys
from rlhf_jax.algorithms.text_rewards import TextRewards
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.records import Failed
from rlhf_jax.testing import byte_tokenizer, completions, prompt_batch
from rlhf_jax.types import Completions

RNG = jax.random.key(5, impl="threefry2x32")
NO_TEXTS, TEXTS = TextRewards(None, "", None), TextRewards.beside(None, lambda _: {}, "gold", None)


@jax.jit
def generate(params: Any, frozen: Any, prompts: Any, rng: Any) -> Completions:
    """Every token is the number of the policy; the log-probability comes from the key, so that it can be told."""
    del frozen
    rows = prompts.tokens.shape[0]
    tokens = jnp.full((rows, 2), params["version"], jnp.int32)
    samples = jax.random.uniform(rng, (rows, 2))
    return Completions(prompts, tokens, jnp.ones((rows, 2), jnp.bool_), samples, jnp.ones(rows, jnp.bool_))


def rollouts(one_step_off: bool) -> tuple[Rollouts, Any]:
    items = [[7 + index] for index in range(8)]
    batches = data.prompt_batches(items, batch_size=2, length=3, seed=0, pad_id=0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Rollouts(generate, batches, mesh, RNG, version(0), {}, one_step_off=one_step_off), batches


def version(number: int) -> dict[str, Any]:
    return {"version": jnp.int32(number)}


def prompts_of(count: int) -> list[list[int]]:
    """The prompts of the first ``count`` batches."""
    _, batches = rollouts(False)
    return [next(batches).prompt_id.tolist() for _ in range(count)]


@pytest.mark.parametrize("one_step_off", [False, True])
def test_prompts_keys_and_policies(one_step_off):
    """Policy k samples rollout k + 1, or, one step off, k + 2; prompts and keys are the same in both."""
    actual, _ = rollouts(one_step_off)
    sampled_by, stale, prompts = [], [], []
    for step in range(1, 5):
        completions = actual.take(step, version(step - 1))
        stale.append(actual.stale)
        actual.begin(step + 1, version(step - 1))
        sampled_by.append(int(completions.tokens[0, 0]))
        prompts.append(completions.prompts.prompt_id.tolist())
        np.testing.assert_array_equal(completions.logprobs, jax.random.uniform(step_keys(RNG, step)[0], (2, 2)))
    assert sampled_by == ([0, 0, 1, 2] if one_step_off else [0, 1, 2, 3])
    assert stale == ([False, True, True, True] if one_step_off else [False] * 4)
    assert prompts == prompts_of(4)


def test_what_is_saved_and_taken_up_again():
    actual, batches = rollouts(True)
    empty = actual.packed("state")
    assert {leaf.shape for leaf in jax.tree.leaves(empty.completions)} == {(2, 3), (2, 2), (2,)}
    assert batches.get_state()["next_batch"] == 0  # a batch was looked at, not taken
    assert actual.unpacked(empty, keep=False) == "state" and not actual.take(1, version(0)).prompts.seed
    actual.begin(2, version(0))
    saved, place = actual.packed("later"), batches.get_state()

    other, reference = rollouts(True)  # a process that resumes
    reference.set_state(place)
    assert other.unpacked(saved, keep=True) == "later"
    for own_value in (actual, other):
        assert own_value.take(2, version(1)).tokens.tolist() == [[0, 0]] * 2 and own_value.stale
        assert own_value.take(3, version(2)).prompts.prompt_id.tolist() == prompts_of(3)[2]

    actual.begin(5, version(3))  # a rollback: the rollout that had begun is dropped, with its prompts
    assert actual.unpacked(Ahead("back", saved.completions), keep=False) == "back"
    assert actual.take(2, version(1)).tokens.tolist() == [[1, 1]] * 2 and not actual.stale


def test_without_it_states_are_saved_as_they_are():
    actual, _ = rollouts(False)
    assert actual.packed("state") == actual.unpacked("state", keep=True) == "state"
    assert actual.within("params/policy") == "params/policy" and rollouts(True)[0].within("a") == "state/a"


def test_row_lengths():
    outcome = completions(prompt_batch([[5, 5], [5]]), [(7, 2), (7,)], length=4)
    lengths, columns, new, most = row_lengths(outcome)
    assert (lengths.tolist(), columns, new.tolist(), most) == ([4, 2], 6, [2, 1], 4)


def test_one_step_off_needs_a_correction_and_text_rewards():
    weighted = learn.PPOConfig(importance=learn.ImportanceConfig())
    for config in (weighted, learn.GRPOConfig(old_logprobs="sampler")):
        check_one_step_off(True, config, TEXTS)
        with pytest.raises(InputError, match="run.one_step_off: without run.reward_texts or run.monitor"):
            check_one_step_off(True, config, NO_TEXTS)
    for config in (learn.PPOConfig(), learn.GRPOConfig()):
        check_one_step_off(False, config, NO_TEXTS)
        with pytest.raises(
            InputError, match=rf"weigh them with {type(config).__name__}.importance = @ImportanceConfig\(\)"
        ):
            check_one_step_off(True, config, TEXTS)
    with pytest.raises(InputError, match="run.one_step_off = 1: give True or False"):
        check_one_step_off(1, weighted, TEXTS)


def test_rewards_and_monitor_see_the_columns_of_the_prompt():
    """What the answer is compared with stands in the prompt's row; a failure is left out and counted."""
    tokenizer = byte_tokenizer()
    records = [data.Prompt(f"q{n}", (data.Message("user", "?"),), {"answer": [str(n)]}) for n in range(3)]
    outcome = completions(
        prompt_batch([[5]] * 3, prompt_ids=[2, 0, 1]), [tokenizer(x)["input_ids"] for x in "203"], length=1
    )

    def verifier(responses):
        return {"correct": [response.text in response.extra["answer"] for response in responses]}

    def judge(responses):
        return {"kind": [Failed("busy") if response.id == "q2" else 4.0 for response in responses], "sure": [0.5] * 3}

    judged = TextRewards.beside(None, verifier, "correct", judge)(outcome, records, tokenizer)
    assert judged.scores["correct"].tolist() == [1.0, 1.0, 0.0] and judged.scores["correct"].dtype == np.float32
    assert judged.scored.tolist() == [True] * 3
    assert judged.metrics == {"monitor/kind": 4.0, "monitor/sure": 0.5, "monitor_failed": 1}
    judged = TextRewards.beside(None, judge, "kind", None)(outcome, records, tokenizer)
    assert judged.scores["kind"].tolist() == [0.0, 4.0, 4.0] and judged.scored.tolist() == [False, True, True]
    assert judged.metrics == {"reward_failed": 1}
    judged = TextRewards.beside("model", None, "", judge)(outcome, records, tokenizer)
    assert judged.scores == {} and judged.scored.all() and judged.metrics["monitor_failed"] == 1


def test_rewards_of_texts_name_what_is_missing():
    with pytest.raises(InputError, match="run.reward, run.reward_texts: give exactly one"):
        TextRewards.beside(None, None, "gold", None)
    with pytest.raises(InputError, match="run.reward, run.reward_texts: give exactly one"):
        TextRewards.beside("model", lambda _: {}, "gold", None)
