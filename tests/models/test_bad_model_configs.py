# ruff: noqa: E501  (tables)
"""Every field of every family's config.json with values of every kind is read or rejected in one line, and never crashes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import ModelConfig
from rlhf_jax.models.families import config_from_hf, config_to_hf
from rlhf_jax.models.families.table import FAMILIES
from rlhf_jax.testing import tiny_config

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 10**30, 0.0, 0.5, -0.5, 1e308, 1e-320, "", "text", "3", [], [1], [None], [[1]], {}, {"a": 1}, {"rope_type": 3},
    {"rope_type": ["yarn"]}, {"rope_type": "yarn"}, {"rope_type": "yarn", "factor": 0}, {"rope_type": "yarn", "factor": "x"},
    {"rope_type": "longrope", "short_factor": 3, "long_factor": "x", "factor": 2.0}, {"rope_theta": 0}, {"rope_type": "linear", "factor": -1.0},
    {"full_attention": 3, "sliding_attention": None}, {"full_attention": {"rope_theta": "x"}, "sliding_attention": {}},
]  # fmt: skip
EXTRA = ("rope_scaling", "rope_parameters", "layer_types", "sliding_window", "num_labels", "id2label", "architectures", "head_dim",
         "num_experts", "decoder_sparse_step", "mlp_only_layers", "max_window_layers", "use_sliding_window", "no_rope_layers",
         "no_rope_layer_interval", "original_max_position_embeddings", "query_pre_attn_scalar", "rope_local_base_freq")  # fmt: skip


def valid_fields(family: str) -> dict[str, Any] | None:
    """Return the config.json of a tiny model of that family; None for a family that a plain decoder cannot be written as."""
    try:
        return config_to_hf(tiny_config(family=family))
    except InputError:
        return None


CONFIGS = {name: fields for name in FAMILIES if (fields := valid_fields(name)) is not None}


def test_the_table_has_several_families() -> None:
    assert {"llama", "mistral"} <= CONFIGS.keys()


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_any_value_of_any_field(family: str) -> None:
    fields, crashed, count = CONFIGS[family], [], 0
    for name in [*fields, *(extra for extra in EXTRA if extra not in fields)]:
        for value in VALUES:
            count += 1
            try:
                assert isinstance(config_from_hf(fields | {name: value}, "config.json"), ModelConfig)
            except InputError as error:
                if not re.match("config.json: [^\n]+$", str(error)):
                    crashed.append(f"{name} = {value!r}: {error}")
                if "not a configuration of" in str(error):  # the last resort; a specific check gives a better message
                    crashed.append(f"{name} = {value!r}: {error}")
            except Exception as error:
                crashed.append(f"{name} = {value!r}: {type(error).__name__}: {error}")
    assert count > 500 and "\n".join(crashed) == ""


@pytest.mark.parametrize("value", [0, 0.0, -1, "10000", True, [], 10**400])
@pytest.mark.parametrize("place", ["rope_theta", "rope_parameters"])
def test_a_base_of_zero_is_not_the_default(value: Any, place: str) -> None:
    fields = {key: entry for key, entry in CONFIGS["llama"].items() if key != "rope_theta"}
    fields[place] = value if place == "rope_theta" else {"rope_type": "default", "rope_theta": value}
    with pytest.raises(InputError, match="rope_theta"):
        config_from_hf(fields, "config.json")
