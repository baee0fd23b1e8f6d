"""The pipeline goes on after a stop, skips what is finished, and notices when that is not true any more."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
from pathlib import Path

import pytest
from experiment_processes import command, finish, forked, start, wait_for_step
from forked_programs import Server

from rlhf_jax.checkpoint_files.manifest import saved_steps
from rlhf_jax.errors import InputError
from rlhf_jax.rundir import read_provenance
from rlhf_jax.rundir.outputs import record_outputs
from rlhf_jax.rundir.provenance import write_provenance

ROOT = Path(__file__).resolve().parents[2]
TWO_STAGES = """\
run.run_dir = %RUN_DIR
RUN_DIR = ''
run.stages = [@base/Stage(), @sft/Stage()]
base/Stage.name = 'base'
base/Stage.experiment = 'train_sft'
base/Stage.gin_file = 'configs/smoke/base.gin'
sft/Stage.name = 'sft'
sft/Stage.experiment = 'train_sft'
sft/Stage.gin_file = 'configs/smoke/sft.gin'
sft/Stage.macros = (('BASE', 'base'),)
"""

FAKED = f"""
import sys
sys.path.insert(0, {str(ROOT / "experiments")!r})
import pipeline
fake = [sys.executable, "-S", {str(Path(__file__).with_name("fake_stage.py"))!r}]
pipeline.check = lambda stages, seed: None  # what the real stages are given is right
pipeline.command = lambda stage, directory, seed: [
    *fake, str(directory / stage.name), *(str(directory / path / "model.txt") for _, path in stage.macros)
]
pipeline.launch(pipeline.run)
"""
"""experiments/pipeline.py, but that each stage is tests/experiments/fake_stage.py, which takes no time."""


def files(directory: Path) -> dict[Path, bytes]:
    names = [path for path in directory.rglob("*") if path.is_file() and "compilation_cache" not in path.parts]
    return {path.relative_to(directory): path.read_bytes() for path in names if path.name != ".lock"}


def test_a_finished_pipeline_starts_nothing(chain: Path, server: Server, tmp_path: Path) -> None:
    before = files(chain)
    result = server(tmp_path, forked("check", "pipeline", "configs/smoke/pipeline.gin", RUN_DIR=chain))
    assert result.returncode == 0 and result.stderr.count("finished before") == 6, result.stderr
    assert files(chain) == before


def test_stopped_in_a_stage_it_goes_on_from_there(server: Server, tmp_path: Path) -> None:
    """To the very end that an unbroken one has; what it has finished is skipped until what that read is another."""
    (tmp_path / "faked.py").write_text(FAKED)
    (tmp_path / "two.gin").write_text(TWO_STAGES)

    def pipeline(name: str, code: int) -> str:
        """Stderr."""
        flags = [f"--gin_file={tmp_path / 'two.gin'}", f"--gin_bindings=RUN_DIR = {str(tmp_path / name)!r}"]
        result = server(tmp_path, [str(tmp_path / "faked.py"), *flags])
        assert result.returncode == code, result.stderr
        return result.stderr

    unbroken, broken, stop = (tmp_path / name for name in ("unbroken", "broken", "broken.stop"))

    def finished() -> list[str]:
        return list(json.loads((broken / "pipeline.json").read_text())["stages"])

    pipeline("unbroken", 0)
    stop.touch()
    err = pipeline("broken", 143)  # SIGTERM to the pipeline alone: the stage saves, both leave
    assert err.endswith(
        "stopped at step 2; the same command goes on from here\nstopped in stage sft; the same command goes on from here\n"
    )
    assert finished() == ["base"] and not (broken / "report.html").exists()

    stop.unlink()
    err = pipeline("broken", 0)
    assert "[1/2] base\n    finished before\n[2/2] sft\n" in err and finished() == ["base", "sft"]
    provenance = read_provenance(broken / "sft")
    assert provenance is not None and [launch["resumed_step"] for launch in provenance["launches"]] == [0, 2]
    lines, expected = ((run / "sft" / "metrics.jsonl").read_bytes() for run in (broken, unbroken))
    assert lines == expected and (broken / "report.html").is_file()

    assert pipeline("broken", 0).count("finished before") == 2
    (broken / "base" / "model.txt").write_text("counted to 5")
    assert pipeline("broken", 0).count("finished before") == 1  # sft had read it


@pytest.mark.slow  # as above with real stages: two trainings and three checks of their bindings
def test_stopped_resumed_and_no_longer_true(chain: Path, tmp_path: Path) -> None:
    config, directory = tmp_path / "two.gin", tmp_path / "run"
    config.write_text(TWO_STAGES)
    shutil.copytree(chain / "base", directory / "base")
    record = json.loads((chain / "pipeline.json").read_text())
    (directory / "pipeline.json").write_text(json.dumps({"stages": {"base": record["stages"]["base"]}}))
    pipeline = command("pipeline", config, RUN_DIR=directory)

    # SIGTERM to the pipeline alone: the stage saves, both leave.
    process = start(pipeline, seconds_a_step=0.4)
    wait_for_step(directory / "sft", 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, 143)
    (saved,) = saved_steps(directory / "sft")
    assert f"stopped at step {saved}; the same command goes on from here" in err
    assert err.endswith("stopped in stage sft; the same command goes on from here\n")
    assert "[1/2] base\n    finished before\n[2/2] sft\n" in err
    assert list(json.loads((directory / "pipeline.json").read_text())["stages"]) == ["base"]

    # The same command: from that step to the very end that an unbroken pipeline has.
    finish(start(pipeline))
    provenance = read_provenance(directory / "sft")
    assert provenance is not None and [launch["resumed_step"] for launch in provenance["launches"]] == [0, saved]
    assert provenance["inputs"][0]["path"] == str(directory / "base")
    assert (directory / "sft" / "metrics.jsonl").read_bytes() == (chain / "sft" / "metrics.jsonl").read_bytes()
    assert (directory / "report.html").is_file()

    # What a finished stage had read is damaged now: not skipped, and refused by name.
    card = directory / "base" / "checkpoints" / "30" / "state" / "_METADATA"
    card.write_text(card.read_text() + " ")
    _, err = finish(start(pipeline), 2)
    assert f"error: {directory / 'base' / 'checkpoints' / '30'}: damaged checkpoint" in err
    assert err.endswith("error: stage sft ended with exit code 2; its message is above\n")


def test_a_guard_in_a_stage_ends_the_pipeline_with_its_code(chain: Path, server: Server, tmp_path: Path) -> None:
    """Sampler and scorer never agree to the last bit: a limit of 0 stops the first iteration."""
    config = tmp_path / "one.gin"
    bound = (f"POLICY = '{chain / 'sft'}'", f"REWARD = '{chain / 'reward'}'", "PPOConfig.max_sampler_gap = 0.0")
    config.write_text(
        "RUN_DIR = ''\nrun.run_dir = %RUN_DIR\nrun.stages = [@Stage()]\nStage.name = 'ppo'\n"
        f"Stage.experiment = 'train_ppo'\nStage.gin_file = 'configs/smoke/ppo.gin'\nStage.bindings = {bound!r}\n"
    )
    result = server(tmp_path, forked("all", "pipeline", config, RUN_DIR=tmp_path / "run"))
    assert result.returncode == 3, result.stderr
    assert "stopped: step 1: sampler and scorer differ by" in result.stderr
    assert result.stderr.endswith("stopped: stage ppo ended with exit code 3; its message is above\n")
    assert not (tmp_path / "run" / "report.html").exists()


def test_killed_in_its_first_stage_it_is_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is there before the first stage starts, whatever else that stage leaves."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    pipeline = importlib.import_module("pipeline")
    (tmp_path / "pipeline.json.tmp").write_text("{")
    pipeline._check_not_foreign(tmp_path, ["base"])
    pipeline._write_record(tmp_path, {"stages": {}})
    (tmp_path / "compilation_cache").mkdir()
    pipeline._check_not_foreign(tmp_path, ["base"])
    (tmp_path / "pipeline.json").unlink()
    with pytest.raises(InputError, match=r"not a pipeline's \(compilation_cache is there\)"):
        pipeline._check_not_foreign(tmp_path, ["base"])


@pytest.mark.parametrize("text", ["", '{"mean": NaN}', None])
def test_what_a_finished_stage_wrote_is_checked(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation emptied or edited afterwards was skipped as finished, and the report read it."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    pipeline = importlib.import_module("pipeline")
    stage = tmp_path / "evaluation"
    stage.mkdir()
    (stage / "evaluation.json").write_text('{"mean": 1.0}')
    write_provenance(stage, stage="evaluate", seed=0, inputs=[], resumed_step=0)
    record_outputs(stage)
    assert pipeline._is_finished(stage, {"asked": "x"}, "x")
    (stage / "evaluation.json").unlink() if text is None else (stage / "evaluation.json").write_text(text)
    with pytest.raises(InputError, match=r"evaluation\.json: not what stage evaluation wrote: put it back, or remove"):
        pipeline._is_finished(stage, {"asked": "x"}, "x")
    assert not pipeline._is_finished(stage, {"asked": "another"}, "x")
