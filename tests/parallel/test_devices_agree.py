"""One device and eight: equal losses, gradients, metrics and updated parameters, equal sampled tokens and scores.

By default on a few meshes; on every shape of eight devices that the tiny model divides into, in every phase, with
scripts/test.sh -m slow tests/parallel/test_devices_agree.py
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import learn, rollout
from rlhf_jax.algorithms.rollout_copy import rollout_copy
from rlhf_jax.algorithms.scoring import policy_and_values, score
from rlhf_jax.batches import RankedBatch, TokenBatch
from rlhf_jax.models import (
    Model,
    policy_logprobs,
    sequence_logprobs,
    sequence_logprobs_and_router_loss,
    sequence_scores,
)
from rlhf_jax.parallel import (
    ActivationConstraint,
    MeshConfig,
    batch_sharding,
    init_sharded,
    remake_mesh,
    to_global,
    tree_shardings,
)
from rlhf_jax.plan import parse_module
from rlhf_jax.testing import bytes_per_device, mesh_of, random_params, random_prompts, tiny_config
from rlhf_jax.types import Completions, PolicyBatch

ROWS, LENGTH, PROMPT = 16, 16, 8
EOS = tuple(range(2, 12))  # ten of 64 tokens: some rows end, some do not
SAMPLING = rollout.SamplingConfig(temperature=0.7, max_new_tokens=LENGTH - PROMPT)
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 16, "router_coefficient": 0.5}
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options without expensive passes, because nearly all of the time is compilation. The tested partitioning over devices
happens before those passes; both sides of a comparison are compiled with the same options."""
Sizes = tuple[int, ...]
"""(data, fsdp, tensor, sequence, expert) of a mesh."""


def meshes(slow_but: tuple[Sizes, ...], largest_expert: int = 8) -> list:
    """Return every shape of eight devices with tensor <= 2 (the model has two key/value heads), slow unless in ``slow_but``."""
    powers = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=5) if np.prod(sizes) == 8]
    fit = [sizes for sizes in powers if sizes[2] <= 2 and sizes[4] <= largest_expert]
    assert len(fit) == (30 if largest_expert == 8 else 29) and set(slow_but) <= set(fit)
    marks = {sizes: () if sizes in slow_but else (pytest.mark.slow,) for sizes in fit}
    return [pytest.param(sizes, marks=mark, id="x".join(map(str, sizes))) for sizes, mark in marks.items()]


def random_tokens(seed: int) -> TokenBatch:
    """Return rows of different lengths and with different numbers of targets, the worst case for means of means."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, LENGTH + 1, ROWS)
    real = np.arange(LENGTH) < lengths[:, None]
    targets = real & (np.arange(LENGTH) >= rng.integers(1, lengths)[:, None])
    tokens = np.where(real, rng.integers(3, 64, real.shape), 0).astype(np.int32)
    positions = np.where(real, np.arange(LENGTH), 0).astype(np.int32)
    return TokenBatch(tokens, positions, real.astype(np.int32), targets)


def model_of(mesh, head: str, **changes) -> Model:
    return Model(tiny_config(head=head, **changes), ActivationConstraint(mesh))


def sharded_params(model: Model, seed: int, mesh):
    return jax.device_put(random_params(model, seed), tree_shardings(model.abstract(), model.logical_axes(), mesh))


def sampled(mesh, **changes) -> Completions:
    """Return completions of a policy whose parameters are sharded over ``mesh``."""
    model = model_of(mesh, "lm", **changes)
    generate = functools.partial(rollout.generate, model, sampling=SAMPLING, eos_ids=EOS, pad_id=0)
    sample = jax.jit(generate, compiler_options=QUICKLY)
    prompts = to_global(random_prompts(0, ROWS, PROMPT, 64), mesh)
    return jax.device_get(sample(sharded_params(model, 0, mesh), prompts, jax.random.key(5)))


@functools.lru_cache
def completed(experts: bool = False) -> Completions:
    """Return completions of a policy on one device."""
    return sampled(mesh_of(), **(EXPERTS if experts else {}))


def policy_batch() -> PolicyBatch:
    completions, rng = completed(), np.random.default_rng(1)
    noise = {
        name: rng.standard_normal(completions.mask.shape).astype(np.float32) for name in ("old", "values", "adv", "ret")
    }
    return PolicyBatch(
        completions=completions,
        old_logprobs=np.where(completions.mask, completions.logprobs + 0.1 * noise["old"], 0),
        old_values=np.where(completions.mask, noise["values"], 0),
        advantages=np.where(completions.mask, noise["adv"], 0),
        returns=np.where(completions.mask, noise["ret"], 0),
        value_mask=completions.mask,
    )


def sft(mesh):
    model = model_of(mesh, "lm")
    loss = learn.make_sft_loss(functools.partial(sequence_logprobs, model))
    return loss, sharded_params(model, 0, mesh), random_tokens(0)


def reward(mesh):
    model = model_of(mesh, "scalar")
    loss = learn.make_reward_loss(functools.partial(sequence_scores, model), centring=0.1)
    margin = np.linspace(0, 1, ROWS, dtype=np.float32)
    return loss, sharded_params(model, 0, mesh), RankedBatch.of_pairs(random_tokens(0), random_tokens(1), margin)


def ppo(mesh):
    policy, value = model_of(mesh, "lm"), model_of(mesh, "scalar")
    models = {"policy": policy, "value": value}

    def policy_fn(params, completions):
        return policy_and_values(models, params, completions, temperature=0.7)

    loss = learn.make_ppo_loss(policy_fn, learn.PPOConfig(entropy_coefficient=0.01, dual_clip=3.0))
    return loss, {"policy": sharded_params(policy, 0, mesh), "value": sharded_params(value, 1, mesh)}, policy_batch()


def dpo(mesh):
    """Return DPO with a policy unlike its reference: else every implicit reward would be 0 at the first step."""
    model = model_of(mesh, "lm")

    def reference(frozen, tokens):
        return sequence_logprobs(model, frozen["reference"], tokens)[0]

    logprobs = functools.partial(sequence_logprobs, model)
    loss = learn.make_dpo_loss(logprobs, reference, learn.DPOConfig(sft_coefficient=0.1))
    pairs = RankedBatch.of_pairs(random_tokens(0), random_tokens(1))
    return loss, sharded_params(model, 0, mesh), pairs, {"reference": sharded_params(model, 1, mesh)}


def grpo(mesh):
    model, one = model_of(mesh, "lm"), policy_batch()

    def logprobs(params, completions):
        return policy_logprobs(model, params, completions, temperature=0.7)

    counts, reference = np.arange(ROWS) % 5 > 0, np.where(one.value_mask, one.old_logprobs - 0.1, 0)
    batch = learn.GroupBatch(one.completions, one.old_logprobs, reference, one.advantages[:, 0], counts)
    return learn.make_grpo_loss(logprobs, learn.GRPOConfig(kl_coefficient=0.1)), sharded_params(model, 0, mesh), batch


def sft_of_experts(mesh):
    model = model_of(mesh, "lm", **EXPERTS)
    loss = learn.make_sft_loss(functools.partial(sequence_logprobs_and_router_loss, model))
    return loss, sharded_params(model, 0, mesh), random_tokens(0)


ALGORITHMS = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "grpo": grpo, "experts": sft_of_experts}
"""mesh -> (loss, trained parameters, batch), and frozen parameters where there are some."""


@functools.lru_cache
def gradients(algorithm: str, sizes: Sizes, microbatches: int):
    mesh = mesh_of(*sizes)
    loss, params, batch, *frozen = ALGORITHMS[algorithm](mesh)
    call = jax.jit(
        lambda *arguments: learn.gradients(loss, *arguments, jax.random.key(0), microbatches), compiler_options=QUICKLY
    )
    return jax.device_get(call(params, frozen[0] if frozen else {}, to_global(batch, mesh)))


def agree(algorithm: str, sizes: Sizes, microbatches: int) -> None:
    """Check gradients within 1e-5 of the largest number of each array, losses and metrics within 1e-5."""
    (one, metrics), (eight, metrics_of_eight) = (
        gradients(algorithm, (1, 1, 1, 1, 1), 1),
        gradients(algorithm, sizes, microbatches),
    )
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(eight), strict=True):
        scale = np.abs(a).max()
        assert scale > 0, f"no gradient at {path}"
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * scale, err_msg=str(path))
    assert metrics.keys() == metrics_of_eight.keys()
    for name in metrics.keys() - {"identity_gap"}:  # a maximum, see learn.update
        np.testing.assert_allclose(
            metrics_of_eight[name].value(), metrics[name].value(), rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("sizes", meshes(((1, 8, 1, 1, 1), (2, 2, 2, 1, 1), (1, 2, 1, 2, 2))))
def test_sft_gradients(sizes: Sizes) -> None:
    agree("sft", sizes, microbatches=1 if sizes[0] * sizes[1] * sizes[4] == 8 else 2)


@pytest.mark.parametrize("sizes", meshes(((2, 2, 2, 1, 1),)))
def test_reward_gradients(sizes: Sizes) -> None:
    agree("reward", sizes, microbatches=2)


@pytest.mark.parametrize("sizes", meshes(((2, 2, 2, 1, 1),)))
def test_ppo_gradients(sizes: Sizes) -> None:
    agree("ppo", sizes, microbatches=2)


@pytest.mark.parametrize("sizes", meshes(((2, 2, 2, 1, 1),)))
def test_dpo_gradients(sizes: Sizes) -> None:
    agree("dpo", sizes, microbatches=2)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", meshes(()))
def test_grpo_gradients(sizes: Sizes) -> None:
    agree("grpo", sizes, microbatches=2)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", meshes((), largest_expert=4))
def test_gradients_of_experts(sizes: Sizes) -> None:
    """The routers' loss is a mean over the tokens of a microbatch, so there must be a single microbatch."""
    agree("experts", sizes, microbatches=1)


def same_completions(actual: Completions, expected: Completions) -> None:
    assert 0 < expected.ended.sum() < ROWS
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.mask, expected.mask)
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("sizes", meshes(((1, 8, 1, 1, 1), (2, 2, 2, 1, 1), (1, 1, 2, 4, 1))))
def test_rollouts_have_the_same_tokens(sizes: Sizes) -> None:
    same_completions(sampled(mesh_of(*sizes)), completed())


@pytest.mark.parametrize("sizes", meshes((), largest_expert=4))
def test_rollouts_of_experts_have_the_same_tokens(sizes: Sizes) -> None:
    same_completions(sampled(mesh_of(*sizes), **EXPERTS), completed(experts=True))


@functools.lru_cache
def scored(sizes: Sizes):
    """Return the outputs of policy, reference, value and reward model on the same completions."""
    mesh = mesh_of(*sizes)
    policy, scalar = model_of(mesh, "lm"), model_of(mesh, "scalar")
    models = {"policy": policy, "reference": policy, "value": scalar, "reward": scalar}
    params = {role: sharded_params(model, seed, mesh) for seed, (role, model) in enumerate(models.items())}
    call = jax.jit(functools.partial(score, models, temperature=0.7), compiler_options=QUICKLY)
    return jax.device_get(call(params, to_global(completed(), mesh)))


@pytest.mark.parametrize("sizes", meshes(((1, 2, 2, 2, 1),)))
def test_scores(sizes: Sizes) -> None:
    actual, expected = scored(sizes), scored((1, 1, 1, 1, 1))
    for name in ("logprobs", "ref_logprobs", "values", "scores"):
        one, eight = getattr(expected, name), getattr(actual, name)
        if name == "scores":
            one, eight = one["reward"], eight["reward"]
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=name)


@pytest.mark.parametrize("sampled_on", [(8, 1, 1), (4, 1, 2), (2, 2, 2)])
def test_rollouts_on_another_mesh_have_the_same_tokens(sampled_on):
    """Parameters split eight ways over fsdp are resharded on the devices; completions return to the mesh of training."""
    mesh, model = mesh_of(1, 8, 1), model_of(mesh_of(1, 8, 1), "lm")
    rollout_mesh = remake_mesh(MeshConfig(*sampled_on), mesh)

    def sample(params, prompts, rng):
        return rollout.generate(
            *rollout_copy(model, params, rollout_mesh), prompts, rng, sampling=SAMPLING, eos_ids=EOS, pad_id=0
        )

    call = jax.jit(sample, out_shardings=batch_sharding(mesh))
    actual = call(
        sharded_params(model, 0, mesh), to_global(random_prompts(0, ROWS, PROMPT, 64), mesh), jax.random.key(5)
    )
    assert actual.tokens.sharding.mesh == mesh
    same_completions(jax.device_get(actual), completed())


def test_the_rollout_copy_has_the_numbers_of_the_products():
    """bfloat16 products of float32 parameters: rounding a matrix once or at every product gives the same number."""
    mesh = mesh_of(2, 2, 2)
    model = Model(tiny_config(compute_dtype="bfloat16"), ActivationConstraint(mesh))
    params, rollout_mesh = sharded_params(model, 0, mesh), remake_mesh(MeshConfig(8, 1, 1), mesh)
    copy = jax.jit(lambda tree: rollout_copy(model, tree, rollout_mesh)[1])(params)
    assert copy["layers"]["attention"]["query"]["kernel"].dtype == jnp.bfloat16
    assert copy["layers"]["attention_norm"]["scale"].dtype == jnp.float32
    assert copy["embed"]["embedding"].is_fully_replicated
    call, tokens = jax.jit(Model(model.config).apply), random_tokens(0).tokens
    np.testing.assert_array_equal(call(jax.device_get(copy), tokens), call(jax.device_get(params), tokens))


def test_the_rollout_copy_never_holds_a_whole_stack():
    """fsdp 8 to data 4, tensor 2: no array of the program is larger than a device's part of the largest array in the end."""
    mesh = mesh_of(fsdp=8)
    model = Model(tiny_config(hidden_size=64, ffn_size=256, num_layers=4), ActivationConstraint(mesh))
    params, rollout_mesh = sharded_params(model, 0, mesh), remake_mesh(MeshConfig(4, 1, 2), mesh)
    text = jax.jit(lambda tree: rollout_copy(model, tree, rollout_mesh)[1]).lower(params).compile().as_text()
    arrays = [a for body in parse_module(text).computations.values() for one in body.values() for a in one.arrays]
    assert max(array.elements for array in arrays) == 4 * 64 * 256 // 2


def test_the_state_keeps_its_shardings_over_donated_steps():
    """Parameters and moments keep their shardings: a state that ends up replicated is not sharded."""
    mesh = mesh_of(2, 2, 2)
    loss, params, batch = sft(mesh)
    optimizer = learn.make_optimizer(learn.OptimizerConfig(learning_rate=1e-2), steps=10)
    step = learn.make_train_step(loss, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    state = init_sharded(lambda p: learn.initial_state(p, optimizer, jax.random.key(0)), shardings, mesh, params)
    before = jax.tree.map(lambda leaf: (leaf.sharding, leaf.ndim), state)
    initial_bytes = bytes_per_device(state)
    placed_batch = to_global(batch, mesh)
    compiled = (
        jax.jit(lambda state, batch: step(state, {}, batch), donate_argnums=0).lower(state, placed_batch).compile()
    )
    # The work is split, too. On one device the matrices alone (one layer is counted, the loop body; and the table) are
    # 6 x (2*16*32 + 2*16*16 + 3*16*32 + 64*16) x 256 tokens = 6.3e6 operations, forward and backward.
    assert compiled.cost_analysis()["flops"] < 6.3e6 / 4
    for expected_step in (1, 2):
        state, metrics = compiled(state, placed_batch)
        assert int(state.step) == expected_step and jnp.isfinite(metrics["loss"].value())
    assert bytes_per_device(state) == initial_bytes
    after = jax.tree.map(lambda leaf, was: leaf.sharding.is_equivalent_to(*was), state, before)
    assert all(jax.tree.leaves(after))
