"""Checkpoints: what comes back is what was saved, on any mesh, or it is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.run.checkpoint import Checkpoints, fingerprint
from rlhf_jax.saved import find_step, latest_step, layout, saved_steps
from rlhf_jax.types import InputError, RunStopped, TrainState


def make_state(offset: float = 0.0, dtype: Any = jnp.float32) -> TrainState:
    params = {
        "embed": {"embedding": jnp.arange(32, dtype=dtype).reshape(8, 4) + offset},
        "bias": jnp.ones(3, jnp.bfloat16),
    }
    return TrainState(jnp.int32(7), params, optax.adamw(1e-3).init(params), jax.random.key(5, impl="threefry2x32"))


def save(run_dir: Path, *steps: int, keep: int = 9, state: Any = None) -> None:
    with Checkpoints(run_dir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state if state is not None else make_state(step), {"row": step})


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def test_round_trip_with_typed_key_optimizer_and_host(tmp_path: Path) -> None:
    save(tmp_path, 3, 5)
    with Checkpoints(tmp_path, 9) as checkpoints:
        assert checkpoints.latest_step() == 5
        state, host = checkpoints.restore(make_state(100))
        assert_equal(state, make_state(5))
        assert host == {"row": 5}
        assert_equal(checkpoints.restore(make_state(), step=3)[0], make_state(3))
    np.testing.assert_array_equal(jax.random.bits(state.rng), jax.random.bits(jax.random.key(5, impl="threefry2x32")))


def test_saving_survives_donation_and_leaving_at_once(tmp_path: Path) -> None:
    state = make_state(1)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, state, {})
        jax.tree.map(lambda x: x.delete(), state)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert_equal(checkpoints.restore(make_state())[0], make_state(1))


def test_other_mesh(tmp_path: Path) -> None:
    four = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    two = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    values = jnp.arange(32.0).reshape(8, 4)
    save(tmp_path, 1, state={"w": jax.device_put(values, NamedSharding(four, PartitionSpec("fsdp", None)))})
    wanted = NamedSharding(two, PartitionSpec(None, "tensor"))
    with Checkpoints(tmp_path, 1) as checkpoints:
        restored, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=wanted)})
    assert restored["w"].sharding == wanted
    np.testing.assert_array_equal(restored["w"], values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["embed"].pop("embedding"), "params/embed/embedding is not expected"),
        (lambda p: p.update(new=jnp.zeros(2)), "params/new is missing"),
        (
            lambda p: p.update(bias=jnp.ones(4, jnp.bfloat16)),
            r"params/bias is bfloat16\[3\], expected bfloat16\[4\]",
        ),
        (lambda p: p.update(bias=jnp.ones(3)), r"params/bias is bfloat16\[3\], expected float32\[3\]"),
    ],
)
def test_restore_is_strict(tmp_path: Path, change: Any, message: str) -> None:
    save(tmp_path, 2)
    state = make_state()
    change(state.params)
    with Checkpoints(tmp_path, 1) as checkpoints, pytest.raises(InputError, match=message) as caught:
        checkpoints.restore(state)
    assert str(tmp_path / "checkpoints" / "2") in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_of_another_implementation_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2, state={"rng": jax.random.key(0, impl="threefry2x32")})
    with Checkpoints(tmp_path, 1) as checkpoints, pytest.raises(InputError, match=r"rng is key<fry>\[\].*key<rbg>"):
        checkpoints.restore({"rng": jax.random.key(0, impl="rbg")})


def test_incomplete_steps_do_not_count_and_do_not_block(tmp_path: Path) -> None:
    save(tmp_path, 1)
    directory = tmp_path / "checkpoints"
    (directory / "2").mkdir()  # a kill between mkdir and the first file
    shutil.copytree(directory / "1", directory / "3")
    (directory / "3" / "host" / "metadata").unlink()
    (directory / "4.orbax-checkpoint-tmp").mkdir()
    assert saved_steps(tmp_path) == [1] and latest_step(tmp_path) == 1
    save(tmp_path, 2)  # Orbax alone would skip it: its latest step is 3
    assert saved_steps(tmp_path) == [1, 2]
    assert {entry.name for entry in directory.iterdir()} == {"1", "2", "3.incomplete"}


def test_keeps_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert saved_steps(tmp_path) == [3, 4]


def test_saving_an_older_step_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(RunStopped, match="step 5 is already there"):
        save(tmp_path, 3)


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no complete checkpoint here"):
        find_step(tmp_path)
    save(tmp_path, 4)
    with pytest.raises(InputError, match=r"no checkpoint of step 3; there are \[4\]"):
        find_step(tmp_path, 3)


@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "host/metadata"])
def test_damage_is_one_clear_error(file: str, tmp_path: Path) -> None:
    save(tmp_path, 4)
    (tmp_path / "checkpoints" / "4" / file).write_bytes(b"{")
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(InputError, match="damaged checkpoint") as caught:
        checkpoints.restore(make_state())
    assert "\n" not in str(caught.value)


def test_fingerprint_sees_one_flipped_bit(tmp_path: Path) -> None:
    save(tmp_path, 4)
    before = fingerprint(tmp_path, 4)
    assert before == fingerprint(tmp_path, 4)
    largest = max((tmp_path / "checkpoints" / "4").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    assert fingerprint(tmp_path, 4) != before


def test_layout_is_json_and_names_fields_and_indices() -> None:
    found = layout(make_state())
    assert found["params/embed/embedding"] == [[8, 4], "float32"]
    assert found["opt_state/0/mu/bias"] == [[3], "bfloat16"]
    assert found["rng"] == [[], "key<fry>"]
    assert json.loads(json.dumps(found)) == found
