"""Tests of checkpoints: restoring on any mesh, strictness, damage, retention, failed saves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.checkpoint_files.manifest import DamagedCheckpoint, find_step, layout, manifest_text, saved_steps, verify
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.loop.faults import Fault, Faults, flip_bit
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention, fingerprint, newest_verified
from rlhf_jax.storage.hashing import hash_file
from rlhf_jax.storage.names import MANIFEST
from rlhf_jax.types import TrainState


def make_state(offset: float = 0.0, dtype: Any = jnp.float32) -> TrainState:
    params = {
        "embed": {"embedding": jnp.arange(32, dtype=dtype).reshape(8, 4) + offset},
        "bias": jnp.ones(3, jnp.bfloat16),
    }
    return TrainState(jnp.int32(7), params, optax.adamw(1e-3).init(params), jax.random.key(5, impl="threefry2x32"))


def save(run_dir: Path, *steps: int, keep: int = 9, state: Any = None) -> None:
    with Checkpoints(run_dir, Retention(keep)) as checkpoints:
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
    with Checkpoints(tmp_path, Retention(9)) as checkpoints:
        assert checkpoints.latest_step() == 5
        state, host = checkpoints.restore(make_state(100))
        assert_equal(state, make_state(5))
        assert host == {"row": 5}
        assert_equal(checkpoints.restore(make_state(), step=3)[0], make_state(3))
    np.testing.assert_array_equal(jax.random.bits(state.rng), jax.random.bits(jax.random.key(5, impl="threefry2x32")))


def test_save_survives_donation_and_an_immediate_close(tmp_path: Path) -> None:
    state = make_state(1)
    with Checkpoints(tmp_path, Retention(2)) as checkpoints:
        checkpoints.save(1, state, {})
        jax.tree.map(lambda x: x.delete(), state)
    with Checkpoints(tmp_path, Retention(2)) as checkpoints:
        assert_equal(checkpoints.restore(make_state())[0], make_state(1))


def test_other_mesh(tmp_path: Path) -> None:
    four = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    two = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    values = jnp.arange(32.0).reshape(8, 4)
    save(tmp_path, 1, state={"w": jax.device_put(values, NamedSharding(four, PartitionSpec("fsdp", None)))})
    target = NamedSharding(two, PartitionSpec(None, "tensor"))
    with Checkpoints(tmp_path, Retention(1)) as checkpoints:
        restored, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=target)})
    assert restored["w"].sharding == target
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
    with Checkpoints(tmp_path, Retention(1)) as checkpoints, pytest.raises(InputError, match=message) as caught:
        checkpoints.restore(state)
    assert str(tmp_path / "checkpoints" / "2") in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_of_another_implementation_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2, state={"rng": jax.random.key(0, impl="threefry2x32")})
    with (
        Checkpoints(tmp_path, Retention(1)) as checkpoints,
        pytest.raises(InputError, match=r"rng is key<fry>\[\].*key<rbg>"),
    ):
        checkpoints.restore({"rng": jax.random.key(0, impl="rbg")})


# ---- damage


def flip_a_bit(step: Path) -> None:
    files = [path for path in (step / "state").rglob("*") if path.is_file()]
    flip_bit(max(files, key=lambda path: path.stat().st_size))


def data_file(step: Path) -> Path:
    return next(path for path in (step / "state").rglob("*") if path.is_file() and path.parent.name == "d")


def flip_every_kind_of_file(name: str) -> Callable[[Path], None]:
    return lambda step: flip_bit(step / name)


def change_the_manifest(step: Path) -> None:
    """Change the row in the manifest, which stays readable."""
    file = step / MANIFEST
    file.write_text(file.read_text().replace('"row": 2', '"row": 1'))


def point_outside(step: Path) -> None:
    """Write a consistent manifest that names a file outside the step."""
    body = json.loads((step / MANIFEST).read_text())["manifest"]
    outside = step.parent.parent / "secret"
    outside.write_text("x")
    body["files"] = {"../../secret": {"bytes": 1, "sha256": hash_file(outside)}}
    (step / MANIFEST).write_text(manifest_text(body))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit in the largest file": (flip_a_bit, "has another sha256"),
    "bit in _METADATA": (flip_every_kind_of_file("state/_METADATA"), "_METADATA has another sha256"),
    "bit in manifest.ocdbt": (flip_every_kind_of_file("state/manifest.ocdbt"), "manifest.ocdbt has another sha256"),
    "bit in the manifest": (flip_every_kind_of_file(MANIFEST), "manifest.json is not"),
    "another number in the manifest": (change_the_manifest, "manifest.json is not what was written"),
    "file cut": (lambda step: data_file(step).write_bytes(data_file(step).read_bytes()[:-1]), "were written"),
    "file emptied": (lambda step: data_file(step).write_bytes(b""), "has 0 bytes"),
    "file gone": (lambda step: data_file(step).unlink(), "is missing"),
    "manifest gone": (lambda step: (step / MANIFEST).unlink(), "manifest.json is missing"),
    "manifest emptied": (lambda step: (step / MANIFEST).write_bytes(b""), "manifest.json is not readable"),
    "manifest of another kind": (lambda step: (step / MANIFEST).write_text("[1]"), "manifest.json is not readable"),
    "state gone": (lambda step: shutil.rmtree(step / "state"), "is missing"),
    "state emptied": (lambda step: (shutil.rmtree(step / "state"), (step / "state").mkdir()), "is missing"),
    "step emptied": (lambda step: (shutil.rmtree(step), step.mkdir()), "manifest.json is missing"),
    "step under another number": (
        lambda step: (shutil.rmtree(step), shutil.copytree(step.with_name("1"), step)),
        "manifest.json is not what was written",
    ),
    "files elsewhere": (point_outside, "which lies elsewhere"),
}


@pytest.fixture(scope="module")
def steps_1_and_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    save(directory, 1, 2)
    return directory / "checkpoints"


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_step_is_set_aside_and_an_older_one_restored(
    name: str, steps_1_and_2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(steps_1_and_2, tmp_path / "checkpoints")
    step = tmp_path / "checkpoints" / "2"
    damage, message = DAMAGE[name]
    damage(step)
    with Checkpoints(tmp_path, Retention(2)) as checkpoints, pytest.raises(DamagedCheckpoint, match=message) as caught:
        checkpoints.restore(make_state())
    assert str(caught.value).startswith(f"{step}: damaged checkpoint: ") and "\n" not in str(caught.value)
    assert newest_verified(tmp_path) == 1
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0].startswith(f"warning: {step}: damaged checkpoint: ") and warnings[0].endswith(
        "moved to 2.damaged"
    )
    assert warnings[1].endswith("going on from step 1; 2.damaged set aside")
    assert saved_steps(tmp_path) == [1] and (tmp_path / "checkpoints" / "2.damaged").is_dir()
    with Checkpoints(tmp_path, Retention(2)) as checkpoints:
        assert_equal(checkpoints.restore(make_state())[0], make_state(1))


def test_only_damaged_steps_are_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip_a_bit(tmp_path / "checkpoints" / step)
    for _ in range(2):  # it stays refused
        with pytest.raises(
            InputError, match=r"no checkpoint is whole \(1\.damaged, 2\.damaged\): put a good copy back"
        ):
            newest_verified(tmp_path)
    for entry in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(entry)
    assert newest_verified(tmp_path) == 0


def test_the_same_step_damaged_twice(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for _ in range(2):
        save(tmp_path, 2)
        flip_a_bit(tmp_path / "checkpoints" / "2")
        assert newest_verified(tmp_path) == 1
    assert {entry.name for entry in (tmp_path / "checkpoints").iterdir()} == {"1", "2.damaged", "2.damaged-2"}


def test_half_written_steps_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    directory = tmp_path / "checkpoints"
    shutil.copytree(directory / "1", directory / "3.saving")
    (directory / "2.deleting").mkdir()
    assert saved_steps(tmp_path) == [1]  # a reader sees whole steps only
    assert newest_verified(tmp_path) == 1
    assert [entry.name for entry in directory.iterdir()] == ["1"]


def test_manifest_describes_the_save(tmp_path: Path) -> None:
    facts = {"config": "c" * 64, "inputs": {"data": "d" * 64}, "versions": {"jax": jax.__version__}}
    with Checkpoints(tmp_path, Retention(1), facts=facts) as checkpoints:
        checkpoints.save(4, make_state(), {"row": 4}, {"loss": 0.5, "bad": float("nan"), "none": None})
    body = verify(tmp_path / "checkpoints" / "4")
    assert body["step"] == 4 and body["host"] == {"row": 4} and body["metrics"] == {"loss": 0.5}
    assert body["layout"] == layout(make_state())
    assert {name: body[name] for name in facts} == facts
    on_disk = {p.relative_to(tmp_path / "checkpoints" / "4").as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert set(body["files"]) | {MANIFEST} == on_disk
    assert body["files"]["state/_METADATA"]["sha256"] == hash_file(tmp_path / "checkpoints" / "4" / "state/_METADATA")


# ---- retention


def test_best_and_newest_steps_are_kept() -> None:
    """Orbax's own retention ranked NaN best and removed the good steps."""
    steps: dict[int, dict[str, float | None]] = {1: {"l": 5.0}, 2: {"l": 3.0}, 3: {"l": 4.0}, 4: {"l": float("nan")}}
    assert Retention(1, 1, "l").steps_to_keep(steps) == {2, 4}
    assert Retention(2, 2, "l").steps_to_keep(steps) == {2, 3, 4}
    assert Retention(1, 1, "l", "highest").steps_to_keep(steps) == {1, 4}
    assert Retention(1, 2, "m").steps_to_keep({**steps, 5: {}, 6: {"m": None}}) == {6}  # no step has this metric
    assert Retention(3).steps_to_keep(steps) == {2, 3, 4}


def test_best_step_stays_on_disk(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, Retention(2, 1, "loss")) as checkpoints:
        for step, loss in enumerate((5.0, 3.0, 4.0, float("nan"), 6.0, 7.0), 1):
            checkpoints.save(step, make_state(step), {}, {"loss": loss})
    assert saved_steps(tmp_path) == [2, 5, 6]
    assert all(verify(tmp_path / "checkpoints" / str(step)) for step in (2, 5, 6))


# ---- saves that fail


@pytest.mark.parametrize("point", ["write", "hash", "commit"])
def test_a_full_disk_stops_the_run_and_leaves_no_step(point: str, tmp_path: Path) -> None:
    faults = Faults([Fault(point, "disk_full", step=2)])
    with (
        pytest.raises(RunStopped, match="No space left on device"),
        Checkpoints(tmp_path, Retention(9), at=faults.at) as checkpoints,
    ):
        checkpoints.save(1, make_state(1), {})
        checkpoints.save(2, make_state(2), {})
    assert saved_steps(tmp_path) == [1] and newest_verified(tmp_path) == 1


def test_corruption_between_hashing_and_renaming_is_detected(tmp_path: Path) -> None:
    faults = Faults([Fault("commit", "corrupt", step=2)])
    with Checkpoints(tmp_path, Retention(9), at=faults.at) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.save(2, make_state(2), {})
    assert newest_verified(tmp_path) == 1


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


def test_fingerprint_sees_one_flipped_bit(tmp_path: Path) -> None:
    save(tmp_path, 4)
    before = fingerprint(tmp_path, 4)
    assert before == fingerprint(tmp_path, 4)
    flip_a_bit(tmp_path / "checkpoints" / "4")
    assert fingerprint(tmp_path, 4) != before


def test_layout_is_json_and_names_fields_and_indices() -> None:
    leaves = layout(make_state())
    assert leaves["params/embed/embedding"] == [[8, 4], "float32"]
    assert leaves["opt_state/0/mu/bias"] == [[3], "bfloat16"]
    assert leaves["rng"] == [[], "key<fry>"]
    assert json.loads(json.dumps(leaves)) == leaves
