"""Tests of fingerprints, provenance.json and lineage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rundir import fingerprint, fingerprint_path, lineage, read_provenance
from rlhf_jax.rundir.checkpoints import Checkpoints, Retention
from rlhf_jax.rundir.outputs import changed_outputs, record_outputs
from rlhf_jax.rundir.provenance import changed_content, changed_inputs, describe, write_provenance
from rlhf_jax.rundir.resume import check_changes
from rlhf_jax.storage.inputs import Input


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_fingerprint_of_file_and_directory(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    assert fingerprint_path(tmp_path / "a") == sha(b"one")
    assert fingerprint_path(tmp_path) == sha(f"a\0{sha(b'one')}\nb/x\0{sha(b'two')}\n".encode())
    before = fingerprint_path(tmp_path)
    (tmp_path / "a").rename(tmp_path / "c")  # the same bytes under another name
    assert fingerprint_path(tmp_path) != before


def test_inputs(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"input 'data': .*no such file or directory; an input that is not local needs"
    ):
        describe(Input("data", str(tmp_path / "absent")))
    remote = Input("data", "hub/name", fingerprint="revision 12")
    assert describe(remote) == {"name": "data", "path": "hub/name", "fingerprint": "revision 12"}


def make_run(run_dir: Path, stage: str, *inputs: Input) -> None:
    run_dir.mkdir()
    (run_dir / "operative_config.gin").write_text(f"run.stage = {stage!r}\n")
    with Checkpoints(run_dir, Retention(1)) as checkpoints:
        checkpoints.save(2, {"params": {"w": jnp.ones(2)}}, {})
    entries = [describe(source) for source in inputs]
    write_provenance(run_dir, stage=stage, seed=3, inputs=entries, resumed_step=0)


def test_lineage_tree(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    data = Input("data", str(tmp_path / "data.jsonl"))
    make_run(tmp_path / "sft", "sft", data)
    make_run(tmp_path / "rm", "reward", Input("initial", str(tmp_path / "sft")), data)
    make_run(tmp_path / "ppo", "ppo", Input("policy", str(tmp_path / "sft")), Input("reward", str(tmp_path / "rm")))
    tree = lineage(tmp_path / "ppo", verify=True)
    policy, reward = tree["inputs"]
    assert (tree["stage"], tree["seed"]) == ("ppo", 3)
    assert policy["fingerprint"] == fingerprint(tmp_path / "sft", 2) and policy["step"] == 2
    assert [entry["run"]["stage"] for entry in (policy, reward)] == ["sft", "reward"]
    assert reward["run"]["inputs"][0]["run"]["inputs"][0] == {
        "name": "data",
        "path": str(tmp_path / "data.jsonl"),
        "fingerprint": sha(b"{}\n"),
        "state": "same",
    }
    (tmp_path / "data.jsonl").write_text("{ }\n")
    assert lineage(tmp_path / "sft", verify=True)["inputs"][0]["state"] == "changed"
    assert lineage(tmp_path / "sft")["inputs"][0]["state"] == "recorded"
    (tmp_path / "data.jsonl").unlink()
    assert lineage(tmp_path / "sft", verify=True)["inputs"][0]["state"] == "missing"
    with pytest.raises(InputError, match="give the directory of a run"):
        lineage(tmp_path)


def test_lineage_of_a_file_that_a_run_wrote(tmp_path: Path) -> None:
    """Comparisons link a reward model to the policy that wrote the responses."""
    make_run(tmp_path / "sft", "sft")
    make_run(tmp_path / "replies", "generate", Input("model", str(tmp_path / "sft")))
    file = tmp_path / "replies" / "comparisons.jsonl"
    file.write_text("{}\n")
    make_run(tmp_path / "rm", "reward", Input("data", str(file)))
    (entry,) = (read_provenance(tmp_path / "rm") or {})["inputs"]
    config = sha(b"run.stage = 'generate'\n")
    made_by = str(tmp_path / "replies")
    assert entry == {
        "name": "data",
        "path": str(file),
        "made_by": made_by,
        "config": config,
        "fingerprint": sha(b"{}\n"),
    }
    (node,) = lineage(tmp_path / "rm", verify=True)["inputs"]
    assert (node["state"], node["run"]["stage"]) == ("same", "generate")
    assert node["run"]["inputs"][0]["run"]["stage"] == "sft"


def test_incomplete_step_is_not_the_newest(tmp_path: Path) -> None:
    make_run(tmp_path / "sft", "sft")
    half = tmp_path / "sft" / "checkpoints" / "7.saving" / "state"
    half.mkdir(parents=True)
    (half / "part").write_text("x")
    entry = describe(Input("policy", str(tmp_path / "sft")))
    assert (entry["step"], entry["fingerprint"]) == (2, fingerprint(tmp_path / "sft", 2))


def test_facts_and_launches(tmp_path: Path) -> None:
    write_provenance(tmp_path, stage="sft", seed=1, inputs=[], resumed_step=0)
    write_provenance(tmp_path, stage="sft", seed=1, inputs=[], resumed_step=40)
    content = read_provenance(tmp_path)
    assert content is not None
    assert [launch["resumed_step"] for launch in content["launches"]] == [0, 40]
    facts = content["launches"][0]
    assert facts["random_bits"]["implementation"] == "threefry2x32"
    assert facts["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert facts["versions"]["jax"] is not None and facts["command"]
    write_provenance(tmp_path, stage="sft", seed=1, inputs=[], resumed_step=0)  # a fresh start: nothing was saved
    assert len((read_provenance(tmp_path) or {})["launches"]) == 1


def test_reward_normalisation_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    make_run(tmp_path / "rm", "reward")
    (tmp_path / "rm" / "reward_normalisation.json").write_text('{"gain": 2.0, "bias": 0.0}')
    make_run(tmp_path / "ppo", "ppo", Input("reward", str(tmp_path / "rm")))
    assert lineage(tmp_path / "ppo", verify=True)["inputs"][0]["state"] == "same"
    (tmp_path / "rm" / "reward_normalisation.json").write_text('{"gain": 3.0, "bias": 0.0}')
    assert lineage(tmp_path / "ppo", verify=True)["inputs"][0]["state"] == "changed"
    (tmp_path / "rm" / "reward_normalisation.json").unlink()
    assert lineage(tmp_path / "ppo", verify=True)["inputs"][0]["state"] == "changed"


def test_changed_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    make_run(tmp_path / "sft", "sft", Input("data", str(tmp_path / "data.jsonl")))
    assert changed_inputs(tmp_path / "sft") == [] and changed_inputs(tmp_path / "absent") == []
    assert changed_inputs(tmp_path) == []  # as a pipeline: its stages
    (tmp_path / "data.jsonl").write_text("{ }\n")
    assert changed_inputs(tmp_path / "sft") == ["data"] and changed_inputs(tmp_path) == ["sft/data"]
    (tmp_path / "data.jsonl").unlink()
    assert changed_inputs(tmp_path / "sft") == ["data"]


def make_model(run_dir: Path, *inputs: Input) -> None:
    """Make a finished run that other runs read as a model."""
    make_run(run_dir, "sft", *inputs)
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    (run_dir / "model.json").write_text('{"config": {"rope_theta": 10000.0}, "template": {"style": "plain"}}')
    (run_dir / "evaluation.json").write_text('{"prompts": 4}')
    (run_dir / "status.json").write_text("{}")
    record_outputs(run_dir)


CHANGES = {
    "model.json": lambda file: file.write_text(file.read_text().replace("10000", "20000")),
    "tokenizer/tokenizer.json": lambda file: file.unlink(),
    "tokenizer/added_tokens.json": lambda file: file.write_text("{}"),
    "reward_normalisation.json": lambda file: file.write_text('{"gain": NaN}'),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_beside_a_checkpoint_are_part_of_the_input(name: str, tmp_path: Path) -> None:
    """The model card (with the template) and the tokenizer determine the model as much as its arrays."""
    make_model(tmp_path / "sft")
    make_run(tmp_path / "ppo", "ppo", Input("policy", str(tmp_path / "sft")))
    assert changed_inputs(tmp_path / "ppo") == []
    (tmp_path / "sft" / "status.json").write_text('{"step": 4}')  # logs change and are not part of the input
    (tmp_path / "sft" / "metrics.jsonl").write_text("{}\n")
    assert changed_inputs(tmp_path / "ppo") == []
    CHANGES[name](tmp_path / "sft" / name)
    assert changed_inputs(tmp_path / "ppo") == ["policy"]
    assert lineage(tmp_path / "ppo", verify=True)["inputs"][0]["state"] == "changed"
    entry = describe(Input("policy", str(tmp_path / "sft")))
    identity = {"stage": "ppo", "seed": 3, "inputs": [entry]}
    with pytest.raises(
        InputError, match=f"input 'policy': the content of {tmp_path}/sft/{name} is not what the run began"
    ):
        check_changes(tmp_path / "ppo", identity, "run.stage = 'ppo'\n", "is at step 2")


def test_entries_without_files_are_compared_by_fingerprint(tmp_path: Path) -> None:
    """Older versions did not record the files beside a checkpoint."""
    make_model(tmp_path / "sft")
    entry = describe(Input("policy", str(tmp_path / "sft")))
    older = {name: value for name, value in entry.items() if name != "files"}
    assert changed_content(older, entry) == [] and changed_content(older | {"fingerprint": "x"}, entry) == [""]


def test_the_tokenizer_next_to_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = describe(Input("model", str(tmp_path / "model.gguf")))
    assert list(before["files"]) == ["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert changed_content(before, describe(Input("model", str(tmp_path / "model.gguf")))) == ["tokenizer.json"]


def test_the_model_under_adapters_is_part_of_the_input(tmp_path: Path) -> None:
    """The base model of a run with adapters, and of a PEFT directory."""
    make_model(tmp_path / "sft")
    make_model(tmp_path / "lora")
    card = {"adapter": {"base": str(tmp_path / "sft"), "base_step": 2}}
    (tmp_path / "lora" / "model.json").write_text(json.dumps(card))
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "sft")})
    )
    make_run(tmp_path / "a", "ppo", Input("policy", str(tmp_path / "lora")))
    make_run(tmp_path / "b", "ppo", Input("policy", str(tmp_path / "peft")))
    assert changed_inputs(tmp_path / "a") == changed_inputs(tmp_path / "b") == []
    (tmp_path / "sft" / "model.json").write_text("{}")
    assert changed_inputs(tmp_path / "a") == changed_inputs(tmp_path / "b") == ["policy"]
    identity = {"stage": "ppo", "seed": 3, "inputs": [describe(Input("policy", str(tmp_path / "lora")))]}
    with pytest.raises(InputError, match=f"input 'policy': the content of {tmp_path}/sft/model.json is not what"):
        check_changes(tmp_path / "a", identity, "run.stage = 'ppo'\n", "is at step 2")


@pytest.mark.parametrize(
    "name", ["evaluation.json", "model.json", "tokenizer/tokenizer.json", "checkpoints/2/manifest.json"]
)
@pytest.mark.parametrize("change", ["emptied", "gone"])
def test_changed_outputs_are_named(name: str, change: str, tmp_path: Path) -> None:
    make_model(tmp_path / "sft")
    (tmp_path / "sft" / "notes.txt").write_text("mine")
    (tmp_path / "sft" / "status.json").unlink()
    assert changed_outputs(tmp_path / "sft") == changed_outputs(tmp_path) == []
    file = tmp_path / "sft" / name
    file.write_text("") if change == "emptied" else file.unlink()
    assert changed_outputs(tmp_path / "sft") == [name] and changed_outputs(tmp_path) == [f"sft/{name}"]


@pytest.mark.parametrize(
    "text",
    [
        '{"inputs": 3, "launches": []}',
        '{"launches": [3], "inputs": []}',
        "[" * 9999,
        "",
        '{"stage": "sft", "laun',
        "[1]",
        "3",
    ],
)
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(InputError, match=r"provenance\.json.*: put a copy back, or use another run_dir"):
        read_provenance(tmp_path)
