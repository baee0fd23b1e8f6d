"""The tables of --show_sharding: the rules on every strategy's mesh, and the sharding of parameters."""

from __future__ import annotations

from rlhf_jax.models import Model
from rlhf_jax.parallel import RULES, abstract_arrays, tree_shardings
from rlhf_jax.plan import PlannedPhase, sharding_tables, strategies
from rlhf_jax.testing import mesh_of, tiny_config


def on_mesh(table) -> dict[str, tuple[str, str]]:
    """{logical axis: (mesh axes, parts)}; the last row holds all that are whole."""
    *split, (whole, *remaining) = table.rows
    assert remaining == ["whole", "1"]
    return {name: (axes, parts) for name, axes, parts in split} | dict.fromkeys(whole.split(", "), ("whole", "1"))


def test_every_strategy_has_a_table_of_all_rules() -> None:
    """16 chips; 2 key/value heads and 4 experts: tensor 2, expert 4."""
    model = Model(tiny_config(num_experts=4, experts_per_token=2, expert_ffn_size=32))
    actual = sharding_tables(PlannedPhase("none", None, (), {}, 0, 0, {}), model, strategies(16, model.config))
    tables = [on_mesh(table) for table in actual[:-1]]
    assert all(table.keys() == RULES.keys() for table in tables)
    data, fsdp, tensor, sequence, expert, slices = tables
    assert data["act_batch"] == ("data 16", "16") and data["embed"] == ("whole", "1")
    assert fsdp["act_batch"] == fsdp["embed"] == fsdp["vocab"] == ("fsdp 16", "16")
    assert tensor["vocab"] == ("fsdp 8 x tensor 2", "16") and tensor["heads"] == ("tensor 2", "2")
    assert sequence["act_length"] == ("sequence 2", "2") and sequence["embed"] == ("fsdp 8", "8")
    assert expert["experts"] == ("expert 4", "4") and expert["act_batch"] == ("fsdp 4 x expert 4", "16")
    assert slices["act_batch"] == ("data 2 x fsdp 16", "32") and slices["embed"] == ("fsdp 16", "16")


def test_a_strategy_that_the_model_does_not_divide_over_says_why() -> None:
    model = Model(tiny_config(vocab_size=66))
    titles = [
        t.title
        for t in sharding_tables(PlannedPhase("none", None, (), {}, 0, 0, {}), model, strategies(4, model.config))
    ]
    assert "refused: " in titles[1] and "dimension of 66" in titles[1]
    assert "GiB of the model's parameters a chip" in titles[0]


def test_where_every_parameter_lies() -> None:
    mesh = mesh_of(fsdp=4, tensor=2)
    model = Model(tiny_config())
    shapes = model.abstract()
    params = abstract_arrays(shapes, tree_shardings(shapes, model.logical_axes(), mesh))
    table = sharding_tables(PlannedPhase("none", None, (), {"parameters": params}, 0, 0, {}), model, {"here": mesh})[-1]
    (row,) = [row for row in table.rows if row[1] == "layers/attention/query/kernel"]
    assert row == ("parameters", row[1], "float32 [2, 16, 4, 8]", "[2, 4, 2, 8]", "P(None, 'fsdp', 'tensor', None)")
