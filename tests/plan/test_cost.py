"""Costs of compiled programs, against numbers worked by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax import rollout
from rlhf_jax.models import Model
from rlhf_jax.parallel import ActivationConstraint
from rlhf_jax.plan import count, parse_module
from rlhf_jax.plan.analytic import generate_flops
from rlhf_jax.plan.cost import BETWEEN, convolution_flops, group_of, replica_groups
from rlhf_jax.plan.hlo import Trips, arrays_of, trips
from rlhf_jax.plan.memory import cache_bytes
from rlhf_jax.testing import mesh_of, random_params, random_prompts, tiny_config


def module_of(body: str) -> str:
    return f"HloModule m, num_partitions=4\n\nENTRY %main (p: f32[2]) -> f32[2] {{\n{body}\n}}\n"


def only(text: str):
    """The last instruction of a program and its computation."""
    module = parse_module(module_of(text))
    body = module.computations["main"]
    return body, list(body.values())[-1]


def compiled_count(function, *arguments, axes=None):
    return count(parse_module(jax.jit(function).lower(*arguments).compile().as_text()), axes or {"x": 1})


def test_types() -> None:
    (array,) = arrays_of("bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)}")
    assert (array.bytes, array.hbm, array.near) == (4194304, 0, True)
    assert [a.bytes for a in arrays_of("(f32[], s4[3]{0}, pred[7]{0}, token[])")] == [4, 2, 7, 0]


def test_a_loop_counts_as_often_as_it_runs() -> None:
    """Five layers of [4, 8] x [8, 8]: 2 x 4 x 8 x 8 x 5 = 2560. XLA's own count says 512."""

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    cost = compiled_count(layers, jnp.ones((4, 8)), jnp.ones((5, 8, 8)))
    assert cost.flops == 2560 and not cost.bounded and cost.unknown == 0


def test_loops_inside_loops() -> None:
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)

    cost = compiled_count(
        lambda x, ws: jax.lax.scan(lambda x, w: (inner(x, w), None), x, ws)[0], jnp.ones((4, 8)), jnp.ones((5, 8, 8))
    )
    assert cost.flops == 2 * 4 * 8 * 8 * 5 * 3


def test_a_loop_that_may_stop_early_counts_at_its_bound() -> None:
    def decode(x, w):
        def running(state):
            return (state[0] < 7) & (state[1].sum() < 1e9)

        return jax.lax.while_loop(running, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]

    cost = compiled_count(decode, jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert cost.flops == 7 * 512 and dict(cost.bounded) == {7: 1} and cost.unknown == 0


def test_an_unbounded_loop_counts_as_its_caller_says() -> None:
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: jnp.tanh(x @ w), x)

    cost = compiled_count(until, jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert (cost.flops, cost.unknown) == (512, 0) and dict(cost.bounded) == {1: 1}


@pytest.mark.parametrize("slots", [0, 4])
def test_sampling_counts_at_its_bound(slots: int) -> None:
    """16 rows, at most 7 tokens: the whole batch decodes 7 times, four slots 4 x 7 times; what is decoded is the same."""
    model = Model(tiny_config())
    settings = {"sampling": rollout.SamplingConfig(max_new_tokens=7), "eos_ids": (2,), "pad_id": 0}
    sample = functools.partial(rollout.generate, model, **settings, slots=rollout.SlotConfig(slots=slots))
    arguments = (random_params(model, 0), random_prompts(0, 16, 5, 64), jax.random.key(0))
    module = parse_module(jax.jit(sample).lower(*arguments).compile().as_text())
    actual, expected = count(module, {"x": 1}, decoding=7).flops, generate_flops(model.config, 16, 5, 7)
    assert expected <= actual <= 1.05 * expected


def test_trips_count_from_the_start_by_the_step() -> None:
    """From 2 to below 9 by 3: 2, 5, 8."""
    text = """HloModule m

%cond (c: (s32[], f32[2])) -> pred[] {
  %c = (s32[], f32[2]{0}) parameter(0)
  %limit = s32[] constant(9)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[2])) -> (s32[], f32[2]) {
  %b = (s32[], f32[2]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %x = f32[2]{0} get-tuple-element(%b), index=1
  %three = s32[] constant(3)
  %next = s32[] add(%i.1, %three)
  ROOT %out = (s32[], f32[2]{0}) tuple(%next, %x)
}

ENTRY %main (p: f32[2]) -> (s32[], f32[2]) {
  %p = f32[2]{0} parameter(0)
  %two = s32[] constant(2)
  %start = (s32[], f32[2]{0}) tuple(%two, %p)
  ROOT %loop = (s32[], f32[2]{0}) while(%start), condition=%cond, body=%body
}
"""
    module = parse_module(text)
    main = module.computations["main"]
    assert trips(module, main, main["loop"]) == Trips(3, True)


def test_a_batched_product_written_as_a_convolution() -> None:
    """A TPU writes [16, 128, 64] x [16, 64, 32] with a dilated spatial dimension of 16 in which only the diagonal is real:
    2 x 16 x 128 x 64 x 32, not 16 times that."""
    body, conv = only("""  %a = bf16[16,128,64]{2,1,0} parameter(0)
  %b = bf16[16,64,32]{2,1,0} parameter(1)
  ROOT %c = bf16[16,128,32]{2,1,0} convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf""")
    assert convolution_flops(body, conv) == 2 * 16 * 128 * 64 * 32


def test_a_plain_product_written_as_a_convolution() -> None:
    body, conv = only("""  %a = bf16[1024,2048]{1,0} parameter(0)
  %b = bf16[512,2048]{1,0} parameter(1)
  ROOT %c = bf16[1024,512]{1,0} convolution(%a, %b), dim_labels=bf_oi->bf""")
    assert convolution_flops(body, conv) == 2 * 1024 * 2048 * 512


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'a'}", [[0, 1], [2, 3]]),
        ("channel_id=1", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups(text: str, groups: list[list[int]]) -> None:
    np.testing.assert_array_equal(replica_groups(text, 4), groups)


@pytest.mark.parametrize(
    ("attributes", "size", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2, "tensor"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2, "data"),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", 4, "data+fsdp"),
        ("source_target_pairs={{0,2},{2,0}}", 2, "fsdp"),
    ],
)
def test_mesh_axes_of_a_collective(attributes: str, size: int, axes: str) -> None:
    _, one = only(f"  ROOT %a = f32[2]{{0}} all-reduce(%p), {attributes}")
    assert (actual := group_of(one, {"data": 2, "fsdp": 2, "tensor": 2})).size == size and actual.axes == axes


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        # 4 chips, 400 bytes each: every chip sends its part to three others.
        ("f32[400]{0} all-gather(%p), dimensions={0}, replica_groups=[1,4]<=[4]", "all-gather", 1200),
        # A ring sends (g - 1) / g of the array twice: reduce-scatter, then all-gather.
        ("f32[100]{0} all-reduce(%p), replica_groups=[1,4]<=[4]", "all-reduce", 600),
        ("f32[25]{0} reduce-scatter(%p), dimensions={0}, replica_groups=[1,4]<=[4]", "reduce-scatter", 300),
        ("f32[100]{0} all-to-all(%p), dimensions={0}, replica_groups=[1,4]<=[4]", "all-to-all", 300),
        (
            "f32[100]{0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "collective-permute",
            400,
        ),
    ],
)
def test_bytes_that_a_collective_sends(line: str, kind: str, sent: int) -> None:
    module = parse_module(module_of(f"  %p = f32[100]{{0}} parameter(0)\n  ROOT %a = {line}"))
    assert dict(count(module, {"fsdp": 4}).moved) == {(kind, "fsdp"): sent}


def test_collectives_of_a_program_by_axis() -> None:
    """x [8, 16] split over fsdp and summed: along fsdp the devices add up their half [8] of the columns."""
    mesh = mesh_of(2, 4, 1)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "data")))
    call = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec("data")))
    cost = count(parse_module(call.lower(x).compile().as_text()), dict(mesh.shape))
    assert dict(cost.moved) == {("all-reduce", "fsdp"): 2 * 32 * 3 / 4}


def test_an_overlapped_collective_counts_once() -> None:
    """As the TPU compiler writes it: fusions that start it, compute meanwhile (in a loop of 9) and end it, all with the same
    all-gather; in a loop of 5 it runs 5 times. A chip sends its 64 x 4 bytes to three others each time; the entry gathers
    once more."""
    part = """%NAME (q: f32[64]) -> f32[256] {
  %q = f32[64] parameter(0)
  ROOT %all-gather.NAME = f32[256] all-gather(%q), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

"""
    text = "HloModule m, num_partitions=4\n\n" + "".join(
        part.replace("NAME", name) for name in ("begin", "middle", "end")
    )
    text += """%inside (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]) parameter(0)
  %x = f32[64] get-tuple-element(%s), index=1
  %b = f32[256] fusion(%x), kind=kCustom, calls=%middle
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %t = (s32[], f32[64]) tuple(%i, %x)
}

%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]) parameter(0)
  %x = f32[64] get-tuple-element(%s), index=1
  %a = f32[256] fusion(%x), kind=kCustom, calls=%begin
  %more = (s32[], f32[64]) while(%s), condition=%condition, body=%inside, backend_config={"known_trip_count":{"n":"9"}}
  %c = f32[256] fusion(%x), kind=kCustom, calls=%end
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %t = (s32[], f32[64]) tuple(%i, %x)
}

%condition (s: (s32[], f32[64])) -> pred[] {
  %s = (s32[], f32[64]) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64]) tuple(%zero, %p)
  %loop = (s32[], f32[64]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %first = f32[256] fusion(%p), kind=kCustom, calls=%begin
  ROOT %out = f32[64] get-tuple-element(%loop), index=1
}
"""
    cost = count(parse_module(text), {"x": 4})
    assert cost.counts == {("all-gather", "x"): 6} and cost.moved_bytes == 6 * 3 * 256


def test_collectives_may_share_a_channel() -> None:
    """Two fusions with an all-reduce of another shape each, and one outside of fusions that is run twice: all four count."""
    text = "HloModule m, num_partitions=4\n\n"
    for size in (64, 32):
        text += f"""%sum.{size} (q: f32[{size}]) -> f32[{size}] {{
  %q = f32[{size}] parameter(0)
  ROOT %r = f32[{size}] all-reduce(%q), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
}}

"""
    text += """ENTRY %main (p: f32[64], s: f32[32]) -> f32[64] {
  %p = f32[64] parameter(0)
  %s = f32[32] parameter(1)
  %a = f32[64] fusion(%p), kind=kCustom, calls=%sum.64
  %b = f32[32] fusion(%s), kind=kCustom, calls=%sum.32
  %c = f32[64] all-reduce(%a), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %d = f32[64] all-reduce(%c), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
}
"""
    cost = count(parse_module(text), {"x": 4})
    assert cost.counts == {("all-reduce", "x"): 4} and cost.moved_bytes == 2 * 3 / 4 * 4 * (3 * 64 + 32)


def test_memory_traffic() -> None:
    """[100] floats read and written; a slice reads only what it takes; what lies near the core is no traffic."""
    plain = module_of("  %p = f32[100]{0} parameter(0)\n  ROOT %n = f32[100]{0} negate(%p)")
    assert count(parse_module(plain), {"x": 1}).hbm_bytes == 800
    part = module_of("  %p = f32[100]{0} parameter(0)\n  ROOT %n = f32[10]{0} slice(%p), slice={[0:10]}")
    assert count(parse_module(part), {"x": 1}).hbm_bytes == 80
    near = module_of("  %p = f32[100]{0:S(1)} parameter(0)\n  ROOT %n = f32[100]{0} negate(%p)")
    assert count(parse_module(near), {"x": 1}).hbm_bytes == 400


def test_a_fusion_counts_its_slice_and_its_updated_row() -> None:
    text = """HloModule m

%fused (a: f32[8,100], i: s32[], u: f32[1,100]) -> f32[8,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,100}
  %u = f32[1,100]{1,0} parameter(2)
  %sum = f32[1,100]{1,0} add(%row, %u)
  ROOT %out = f32[8,100]{1,0} dynamic-update-slice(%a, %sum, %i, %zero)
}

ENTRY %main (p: f32[8,100], j: s32[], v: f32[1,100]) -> f32[8,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %v = f32[1,100]{1,0} parameter(2)
  ROOT %f = f32[8,100]{1,0} fusion(%p, %j, %v), kind=kLoop, calls=%fused
}
"""
    # The row of a, v, the index (4 bytes, twice a user), and the row written.
    assert count(parse_module(text), {"x": 1}).hbm_bytes == 400 + 400 + 4 + 400


def test_kernels_give_their_own_cost() -> None:
    """A Pallas kernel is a black box to XLA: its own estimate counts, and one without is named."""
    message = '"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"5","bytes_accessed":"70"}}'
    call = 'f32[100]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={TOLD}'
    cost = count(
        parse_module(module_of("  %p = f32[100]{0} parameter(0)\n  ROOT %k = " + call.replace("TOLD", message))),
        {"x": 1},
    )
    assert (cost.flops, cost.hbm_bytes, dict(cost.kernels), dict(cost.silent)) == (1000, 70, {"k": 1}, {})
    cost = count(
        parse_module(module_of("  %p = f32[100]{0} parameter(0)\n  ROOT %k = " + call.replace("TOLD", ""))), {"x": 1}
    )
    assert (cost.flops, cost.hbm_bytes, dict(cost.silent)) == (0, 800, {"k": 1})


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_module("hello")


def test_sampling_leaves_the_cache_where_it_is() -> None:
    """Eight devices with a row each and the whole model: nothing is sent but a number a step and the rows of results."""
    mesh = mesh_of(8, 1, 1)
    model = Model(tiny_config(), ActivationConstraint(mesh))
    settings = {"sampling": rollout.SamplingConfig(max_new_tokens=7), "eos_ids": (2,), "pad_id": 0}
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    sample = jax.jit(functools.partial(rollout.generate, model, **settings), out_shardings=rows)
    params = jax.device_put(random_params(model, 0), everywhere)
    prompts = jax.device_put(random_prompts(0, 8, 5, 64), rows)
    text = sample.lower(params, prompts, jax.random.key(0)).compile().as_text()
    moved = count(parse_module(text), dict(mesh.shape), decoding=7).moved
    one_row = cache_bytes(model.config, 1, 5)
    assert sum(moved.values()) < one_row


def test_what_goes_to_other_slices_is_counted_apart() -> None:
    """As libtpu writes it: 8 x 128 float32 to the host, in a loop of three; the token's send of another handler is none."""
    text = """HloModule jit_f, num_partitions=16

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]) parameter(0)
  %x = f32[8,128] get-tuple-element(%p), index=1
  %t = token[] after-all()
  %send = (f32[8,128], u32[], token[]) send(%x, %t), channel_id=4, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %other = (f32[8,128], u32[]{:S(2)}, token[]) send(%x, %t), channel_id=5, is_host_transfer=true
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %out = (s32[], f32[8,128]) tuple(%i, %x)
}

%condition (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[], f32[8,128]) parameter(0)
  ROOT %w = (s32[], f32[8,128]) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""
    actual = count(parse_module(text), {"data": 2, "fsdp": 8})
    assert actual.moved == {("all-reduce", BETWEEN): 3 * 8 * 128 * 4} and actual.counts == {("all-reduce", BETWEEN): 3}
    assert actual.moved_bytes == 0
