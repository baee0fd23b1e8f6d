"""Tests of the loop: exact resume, signals, refused resumes, bad steps, faults, deadlines."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked_programs import Forked, Server

from rlhf_jax.checkpoint_files.manifest import find_step, read_state, saved_steps, verify
from rlhf_jax.config import BoundConfig
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.loop import LoopConfig, Run, bad_steps, due, open_run
from rlhf_jax.loop.faults import Fault, flip_bit
from rlhf_jax.loop.progress import headline, line
from rlhf_jax.rundir.resume import check_shared_directory, lock
from rlhf_jax.storage.inputs import Input
from rlhf_jax.types import Mean

PROGRAM = """
import os, time
import gin, jax, jax.numpy as jnp
from rlhf_jax.config import bound_config
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.loop.faults import Fault
from rlhf_jax.types import Mean

gin.register(LoopConfig, module="rlhf_jax")
gin.register(Fault, module="rlhf_jax")

@jax.jit
def train_step(state):
    key = jax.random.fold_in(state["rng"], state["step"])
    params = {"w": jnp.sin(state["params"]["w"] * 1.3) + jax.random.normal(key, (64,))}
    loss = Mean.of(params["w"] ** 2)
    return {"step": state["step"] + 1, "params": params, "rng": state["rng"]}, {"loss": loss}

@gin.configurable
def run(run_dir, steps, seed=0, loop=LoopConfig()):
    bound = bound_config()
    params = {"w": jnp.zeros(64)}
    state = {"step": jnp.int32(0), "params": params, "rng": jax.random.key(seed, impl="threefry2x32")}
    with open_run(run_dir, stage="toy", bound=bound, seed=seed, loop=loop) as run:
        state, host = run.restore(state, {"row": 0})
        for step in run.steps(run.resumed_step, steps):
            time.sleep(float(os.environ["SLEEP"]))
            state, metrics = train_step(state)
            host = {"row": host["row"] + 4}
            run.log(step, {**metrics, "row": host["row"]}, tokens=4)
            run.save(step, state, host)
    print("after the loop")

if __name__ == "__main__":
    launch(run)
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(server: Server, tmp_path: Path):
    """Return a function that starts the toy program as a process."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = itertools.count()

    def call(run_dir: str, steps: int, *bindings: str, sleep: float = 0.0) -> Forked:
        all_bindings = (f"run.run_dir = '{run_dir}'", f"run.steps = {steps}", "run.loop = @LoopConfig()", *bindings)
        command = ["program.py", *(f"--gin_bindings={text}" for text in all_bindings)]
        output = tmp_path / f"output {next(started)}"
        output.mkdir()
        return server.start(tmp_path, command, {"SLEEP": str(sleep)}, output)

    return call


def wait_for_lines(path: Path, count: int, process: Forked) -> None:
    deadline = time.monotonic() + 60
    while not path.is_file() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.finish()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process: Forked, code: int) -> tuple[str, str]:
    completions = process.finish()
    assert completions.returncode == code, completions.stderr
    return completions.stdout, completions.stderr


def test_interrupted_run_equals_the_uninterrupted_one(start, tmp_path: Path) -> None:
    every = ("LoopConfig.save_every = 100", "LoopConfig.tensorboard = False", "LoopConfig.progress = False")
    out, _ = finish(start("unbroken", 120, *every), 0)
    assert out == "after the loop\n"

    interrupted = tmp_path / "broken"
    first = start("broken", 120, *every, sleep=0.2)  # long enough for the second to start up beside it
    wait_for_lines(interrupted / "metrics.jsonl", 7, first)
    second = start("broken", 120, *every, sleep=0.1)  # while the first one works on it
    _, err = finish(second, 2)
    assert err.startswith(f"error: {interrupted}: in use by process {first.pid} on ") and err.count("\n") == 1
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    out, err = finish(first, 143)
    (saved,) = saved_steps(interrupted)  # not a multiple of 100: saved because of the signal
    assert out == "" and f"stopped at step {saved}; the same command goes on from here" in err and 7 <= saved < 100

    killed = start("broken", 120, *every, sleep=0.1)
    wait_for_lines(interrupted / "metrics.jsonl", saved + 5, killed)
    killed.send_signal(signal.SIGKILL)  # the steps since the last save are done again
    finish(killed, -9)
    assert saved_steps(interrupted) == [saved]
    lines = (interrupted / "metrics.jsonl").read_text().count("\n")
    assert lines > saved  # these are removed and written again

    last = start("broken", 120, *every, sleep=0.1)
    wait_for_lines(interrupted / "metrics.jsonl", lines + 2, last)
    last.send_signal(signal.SIGINT)
    finish(last, 130)
    finish(start("broken", 120, *every), 0)

    uninterrupted = tmp_path / "unbroken"
    assert (interrupted / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert (uninterrupted / "metrics.jsonl").read_text().count("\n") == 120
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"params": {"w": jax.ShapeDtypeStruct((64,), jnp.float32, sharding=first)}}
    actual, expected = (
        read_state(find_step(directory), like)["params"]["w"] for directory in (interrupted, uninterrupted)
    )
    np.testing.assert_array_equal(actual, expected)
    resumed = [
        launch["resumed_step"] for launch in json.loads((interrupted / "provenance.json").read_text())["launches"]
    ]
    assert resumed[:3] == [0, saved, saved] and len(resumed) == 4


def test_second_signal_exits_at_once(start, tmp_path: Path) -> None:
    process = start("slow", 60, sleep=30.0)
    wait_for_lines(tmp_path / "slow" / "provenance.json", 1, process)
    time.sleep(1.0)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    if process.poll() is None:  # it was in the loop, finishing its 30 s step
        process.send_signal(signal.SIGTERM)
    finish(process, 143)
    assert time.monotonic() - began < 20
    assert saved_steps(tmp_path / "slow") == []


# ---- in this process


def bound(**values: Any) -> BoundConfig:
    text = "".join(f"{key.replace('__', '.')} = {value!r}\n" for key, value in values.items())
    return BoundConfig(text, text)


def train(
    run_dir: Path,
    total: int,
    *,
    config: BoundConfig | None = None,
    metric: Any = None,
    loop: Mapping[str, Any] | None = None,
    seed: int = 0,
    inputs: tuple[Input, ...] = (),
) -> list[int]:
    """Add 1 to w in each step; return the steps that this call ran."""
    settings = LoopConfig(**{"save_every": 2, "keep": 9, "tensorboard": False, "progress": False, **(loop or {})})
    state, completed = {"params": {"w": jnp.zeros(2)}}, []
    config = config or bound(run__steps=total)
    with open_run(run_dir, stage="toy", bound=config, seed=seed, loop=settings, inputs=inputs) as run:
        state, host = run.restore(state, {"row": 0})
        assert float(state["params"]["w"][0]) == host["row"] == run.resumed_step
        for step in run.steps(run.resumed_step, total):
            state = jax.tree.map(lambda x: x + 1, state)
            run.log(step, {"loss": metric(step) if metric else Mean.of(state["params"]["w"])}, tokens=8)
            run.save(step, state, {"row": step})
            completed.append(step)
    return completed


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_cadence_last_step_and_files(tmp_path: Path) -> None:
    config = bound(run__steps=7)
    assert train(tmp_path / "r", 7, config=config, loop={"save_every": 3, "log_every": 2}) == [1, 2, 3, 4, 5, 6, 7]
    assert saved_steps(tmp_path / "r") == [3, 6, 7]
    metrics = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert metrics == [{"step": s, "stage": "toy", "loss": float(s)} for s in (2, 4, 6, 7)]
    timing = read_lines(tmp_path / "r" / "timing.jsonl")
    always = {"step", "stage", "seconds", "tokens_per_second", "seconds_train", "seconds_log"}
    assert [set(entry) - {"seconds_save"} for entry in timing] == [always] * 4
    assert (tmp_path / "r" / "config.gin").read_text() == config.config
    assert (tmp_path / "r" / "operative_config.gin").read_text() == config.operative


def test_more_steps_complete_and_fewer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "r", 4) == [1, 2, 3, 4]
    assert train(tmp_path / "r", 4) == []
    assert "already complete (4 steps)" in capsys.readouterr().err
    assert train(tmp_path / "r", 6) == [5, 6]
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").glob("*.*") if path.name != ".lock"}
    with pytest.raises(InputError, match="already at step 6, asked for 5"):
        train(tmp_path / "r", 5)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "r").glob("*.*") if path.name != ".lock"}
    with pytest.raises(InputError, match=r"run\.steps = 0: give a whole number >= 1"):
        train(tmp_path / "new", 0)
    assert not (tmp_path / "new").exists()
    assert [entry["step"] for entry in read_lines(tmp_path / "r" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_changed_key_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    train(run_dir, 4, config=bound(O__lr=0.1, run__steps=4, LoopConfig__keep=3))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(InputError, match=r"^O\.lr changed from 0\.1 to 0\.2: may not change on resume; .*at step 4"):
        train(run_dir, 8, config=bound(O__lr=0.2, run__steps=8, LoopConfig__keep=3))
    with pytest.raises(InputError, match="seed changed from 0 to 1"):
        train(run_dir, 8, config=bound(O__lr=0.1), seed=1)
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(run_dir, 8, config=bound(O__lr=0.1, run__steps=8, LoopConfig__keep=5)) == [5, 6, 7, 8]


def test_more_steps_under_a_decaying_rate_are_refused(tmp_path: Path) -> None:
    """The completed steps would have had another learning rate."""

    def config(schedule: str, steps: int) -> BoundConfig:
        return bound(OptimizerConfig__schedule=schedule, run__steps=steps)

    train(tmp_path / "cosine", 4, config=config("cosine", 4))
    with pytest.raises(InputError, match=r"^run\.steps: changed, and OptimizerConfig\.schedule = 'cosine' decays over"):
        train(tmp_path / "cosine", 6, config=config("cosine", 6))
    assert train(tmp_path / "cosine", 4, config=config("cosine", 4)) == []
    train(tmp_path / "constant", 4, config=config("constant", 4))
    assert train(tmp_path / "constant", 6, config=config("constant", 6)) == [5, 6]


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("data")
    train(Path("~/runs/a"), 2, inputs=(Input("data", "~/data.txt"),))
    assert saved_steps(tmp_path / "runs" / "a") == [2] and not (tmp_path / "~").exists()


def test_before_the_first_checkpoint_everything_may_change(tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        train(tmp_path / "r", 4, config=bound(O__lr=9.0), metric=lambda step: float("inf"))
    assert train(tmp_path / "r", 4, config=bound(O__lr=0.1)) == [1, 2, 3, 4]
    assert [entry["step"] for entry in read_lines(tmp_path / "r" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_inputs_may_move_but_not_change(tmp_path: Path) -> None:
    file, moved = tmp_path / "one.txt", tmp_path / "other.txt"
    file.write_text("data")
    train(tmp_path / "r", 2, config=bound(run__data=str(file)), inputs=(Input("data", str(file)),))
    file.rename(moved)
    config = bound(run__data=str(moved))
    assert train(tmp_path / "r", 4, config=config, inputs=(Input("data", str(moved)),)) == [3, 4]
    moved.write_text("other")
    with pytest.raises(InputError, match=r"input 'data': the content of .*other\.txt is not what the run began with"):
        train(tmp_path / "r", 6, config=config, inputs=(Input("data", str(moved)),))
    moved.write_text("data")
    with pytest.raises(InputError, match=r"^run\.data changed from .*other\.txt' to '/else'"):
        train(tmp_path / "r", 6, config=bound(run__data="/else"), inputs=(Input("data", str(moved)),))


def test_not_finite_stops_before_saving(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="step 4: not finite: loss=nan"):
        train(tmp_path / "r", 9, metric=lambda step: 1.0 if step < 4 else float("nan"))
    assert saved_steps(tmp_path / "r") == [2]
    assert read_lines(tmp_path / "r" / "metrics.jsonl")[-1] == {"step": 4, "stage": "toy", "loss": None}


def test_nonfinite_step_that_is_not_logged_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="step 4: not finite: loss=nan"):
        train(tmp_path / "r", 9, metric=lambda step: 1.0 if step < 4 else float("nan"), loop={"log_every": 9})
    assert saved_steps(tmp_path / "r") == [2]


def test_nonfinite_step_between_logs_and_saves_stops(tmp_path: Path) -> None:
    """Step 3 is neither logged nor saved, and step 4 is finite again."""
    with pytest.raises(RunStopped, match="step 3: not finite: loss=nan"):
        train(tmp_path / "r", 9, metric=lambda step: float("nan") if step == 3 else 1.0, loop={"log_every": 9})
    assert saved_steps(tmp_path / "r") == [2]


def test_rare_log_lines_do_not_keep_all_batches(tmp_path: Path) -> None:
    """A batch is kept until its step's metrics are known to be good; that of a bad step until it is recorded."""
    batches, alive = [], []
    loop = LoopConfig(log_every=100, save_every=100, tensorboard=False, progress=False)
    double = jax.jit(lambda x: 2 * x)
    with (
        pytest.raises(RunStopped, match="step 3: not finite"),
        open_run(tmp_path / "r", stage="toy", bound=bound(run__steps=9), seed=0, loop=loop) as run,
    ):
        for step in run.steps(0, 9):
            batch = {"x": double(jnp.full(4, np.nan if step == 3 else 1.0))}
            batches.append(weakref.ref(batch["x"]))
            run.log(step, {"loss": jax.block_until_ready(double(batch["x"].sum()))}, batch=batch)
            del batch
            alive.append([number for number, reference in enumerate(batches, 1) if reference() is not None])
            run.save(step, {"w": jnp.zeros(())}, {})
    assert alive == [[], [], [3], [3], [3], [3], [3], [3]]  # the ninth line is due and stops the run
    assert np.isnan(np.load(tmp_path / "r" / "bad_steps" / "step_3.npz")["x"]).all()


# ---- bad steps: w grows by the batch's number; the loss is w


def learn(run_dir: Path, total: int, batches: list[float], **loop: Any) -> tuple[list[float], Run]:
    """Add one number of ``batches`` to w per step; NaN changes nothing, as in `make_train_step`. Return (consumed, run)."""
    settings = LoopConfig(**{"save_every": 2, "keep": 9, "tensorboard": False, "progress": False, **loop})
    consumed: list[float] = []
    with open_run(run_dir, stage="toy", bound=bound(run__steps=total), seed=0, loop=settings) as run:
        state, host = run.restore({"w": jnp.zeros(())}, {"next": 0})
        for step in run.steps(run.resumed_step, total):
            number = batches[host["next"]]
            host = {"next": host["next"] + 1}
            refused = not np.isfinite(number)
            state = state if refused else {"w": state["w"] + number}
            consumed.append(number)
            if not run.log(
                step, {"loss": number, "w": state["w"], "refused": float(refused)}, batch={"x": np.array([number])}
            ):
                state = run.rolled_back(state)
                continue
            run.save(step, state, host)
    return consumed, run


NAN = float("nan")


def test_skip_ignores_the_batch_and_runs_all_steps(tmp_path: Path) -> None:
    numbers = [1.0, 2.0, NAN, 4.0, 5.0, NAN]
    learn(tmp_path / "r", 6, numbers, on_bad_step="skip")
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert [(line["step"], line["loss"], line["w"]) for line in lines] == [
        (1, 1.0, 1.0), (2, 2.0, 3.0), (3, None, 3.0), (4, 4.0, 7.0), (5, 5.0, 12.0), (6, None, 12.0)
    ]  # fmt: skip
    assert saved_steps(tmp_path / "r") == [2, 4, 6]  # the last step is there, bad or not
    assert verify(find_step(tmp_path / "r"))["host"] == {"next": 6, "run": {"bad_steps": [3, 6]}}
    entries = read_lines(tmp_path / "r" / "bad_steps.jsonl")
    assert [(line["step"], line["wrong"]) for line in entries] == [
        (3, "not finite: loss=nan"),
        (6, "not finite: loss=nan"),
    ]
    np.testing.assert_array_equal(np.load(tmp_path / "r" / "bad_steps" / "step_3.npz")["x"], [NAN])


def test_the_budget_counts_over_resumes(tmp_path: Path) -> None:
    learn(tmp_path / "r", 2, [1.0, NAN], on_bad_step="skip", bad_steps=1)
    with pytest.raises(
        RunStopped, match=r"step 3: not finite: loss=nan; 2 bad steps, LoopConfig\.bad_steps allows fewer"
    ):
        learn(tmp_path / "r", 4, [1.0, NAN, NAN, 1.0], on_bad_step="skip", bad_steps=1)
    assert saved_steps(tmp_path / "r") == [2]


def test_rollback_continues_with_the_next_batches(tmp_path: Path) -> None:
    """Saved at 2 (w = 3). Step 4 is bad: 8 is undone as well, and steps 3 ... use 16, 32, ..."""
    numbers = [1.0, 2.0, 8.0, NAN, 16.0, 32.0, 64.0]
    consumed, run = learn(tmp_path / "r", 5, numbers, on_bad_step="rollback")
    assert consumed == pytest.approx(numbers, nan_ok=True) and run.bad == [4]
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert [(line["step"], line["w"]) for line in lines] == [(1, 1.0), (2, 3.0), (3, 19.0), (4, 51.0), (5, 115.0)]
    assert verify(find_step(tmp_path / "r"))["host"] == {"next": 7, "run": {"bad_steps": [4]}}
    assert [line["policy"] for line in read_lines(tmp_path / "r" / "bad_steps.jsonl")] == ["rollback"]
    # The same run, stopped before its rollback was saved: it happens again, and the end is the same.
    interrupted = tmp_path / "broken"
    learn(interrupted, 2, numbers, on_bad_step="rollback")
    learn(interrupted, 5, numbers, on_bad_step="rollback")
    assert (interrupted / "metrics.jsonl").read_bytes() == (tmp_path / "r" / "metrics.jsonl").read_bytes()
    assert verify(find_step(interrupted))["host"] == verify(find_step(tmp_path / "r"))["host"]


def test_rollback_without_a_checkpoint_stops(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="step 1: not finite: loss=nan; no checkpoint yet to roll back to"):
        learn(tmp_path / "r", 4, [NAN], on_bad_step="rollback")


def test_a_program_that_does_not_roll_back_fails(tmp_path: Path) -> None:
    loop = LoopConfig(save_every=1, on_bad_step="rollback", tensorboard=False, progress=False)
    with open_run(tmp_path / "r", stage="toy", bound=bound(), seed=0, loop=loop) as run:
        steps = run.steps(0, 3)
        run.log(next(steps), {"loss": 1.0})
        run.save(1, {"w": jnp.zeros(())}, {})
        assert run.checkpoints.drain() is None
        assert run.log(next(steps), {"loss": NAN}) is False
        with pytest.raises(ValueError, match="take run.rolled_back"):
            next(steps)


def test_an_injected_nan_stops_the_run(tmp_path: Path) -> None:
    fault = Fault("log", "nan", step=3)
    with pytest.raises(RunStopped, match="step 3: not finite: loss=nan"):
        train(tmp_path / "r", 9, loop={"faults": [fault]})
    assert saved_steps(tmp_path / "r") == [2]
    assert train(tmp_path / "r", 4, config=bound(run__steps=4)) == [3, 4]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"loss": 1.0, "none": None, "refused": 0.0}, ""),
        ({"loss": 9.0, "grad_norm": 2.0, "refused": 0.25}, "refused: loss=9.0, grad_norm=2.0: a spike"),
        ({"loss": NAN, "grad_norm": 2.0, "refused": 1.0}, "not finite: loss=nan"),
        (
            {"loss": NAN, "rollout_refused": 1.0, "kl": 80.0, "refused": 1.0},
            "rollout refused: kl=80.0: not finite, or beyond",
        ),
    ],
)
def test_find_problem(values: dict[str, float | None], expected: str) -> None:
    problem = bad_steps.find_problem(values)
    assert problem.startswith(expected) and bool(problem) == bool(expected)


# ---- best checkpoints, faults, deadlines


def test_the_best_checkpoint_by_a_recorded_metric_stays(tmp_path: Path) -> None:
    losses = [5.0, 1.0, 4.0, 3.0]
    loop = {"save_every": 1, "keep": 1, "keep_best": 1, "best_metric": "loss"}
    train(tmp_path / "r", 4, metric=lambda step: losses[step - 1], loop=loop)
    assert saved_steps(tmp_path / "r") == [2, 4]
    with pytest.raises(
        InputError, match=r"^LoopConfig\.best_metric = 'los': this run has no such metric; it has loss$"
    ):
        train(tmp_path / "s", 4, metric=lambda step: 1.0, loop=loop | {"best_metric": "los"})


def test_an_injected_exception_leaves_the_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="injected fault at 'train' of step 4"):
        train(tmp_path / "r", 6, loop={"faults": [Fault("train", "raise", step=4)]})
    assert saved_steps(tmp_path / "r") == [2] and train(tmp_path / "r", 6) == [3, 4, 5, 6]


def test_steps_after_a_damaged_checkpoint_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "r", 6)
    flip_bit(find_step(tmp_path / "r") / "state" / "_METADATA")
    undamaged = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    assert train(tmp_path / "r", 6) == [5, 6]
    assert "going on from step 4; 6.damaged set aside" in capsys.readouterr().err
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == undamaged


def test_a_hang_ends_with_stacks_and_exit_code_4(start, tmp_path: Path) -> None:
    every = ("LoopConfig.deadlines = (('train', 2.0),)", "LoopConfig.faults = [@Fault()]")
    fault = ("Fault.point = 'train'", "Fault.action = 'hang'", "Fault.step = 3")
    _, err = finish(start("hung", 9, "LoopConfig.save_every = 1", *every, *fault), 4)
    assert "stopped: step 3: train took longer than 2 s (LoopConfig.deadlines); the stacks of all threads are in" in err
    stacks = (tmp_path / "hung" / "stacks.txt").read_text()
    assert "step 3: train took longer than 2 s" in stacks and "_inject" in stacks and "faults.py" in stacks
    assert saved_steps(tmp_path / "hung") == [1, 2]
    status = json.loads((tmp_path / "hung" / "status.json").read_text())
    assert (status["step"], status["phase"], status["saving"]) == (3, "train", "")
    finish(start("hung", 9, "LoopConfig.save_every = 1"), 0)  # without the fault: keys of LoopConfig may change


def test_stop_within_ends_a_run_that_ignores_a_signal(start, tmp_path: Path) -> None:
    fault = ("Fault.point = 'log'", "Fault.action = 'hang'", "Fault.step = 2")
    process = start("stuck", 9, "LoopConfig.stop_within = 1.0", "LoopConfig.faults = [@Fault()]", *fault)
    status = tmp_path / "stuck" / "status.json"
    wait_for_lines(status, 1, process)
    deadline = time.monotonic() + 60
    while (state := json.loads(status.read_text()))["step"] != 2 or state[
        "phase"
    ] != "log":  # earlier, the run would stop
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, 4)
    assert "stopped: not stopped within 1 s of the signal (LoopConfig.stop_within)" in err


def test_second_signal_ends_a_compiled_step(start, tmp_path: Path) -> None:
    """Python's own handlers wait for the call to return; the wake-up pipe does not."""
    text = (tmp_path / "program.py").read_text()
    long = "jax.lax.fori_loop(0, 2**31 - 2, lambda i, x: jnp.cos(x), params['w'][0])"
    (tmp_path / "program.py").write_text(text.replace('loss = Mean.of(params["w"] ** 2)', f"loss = {long}"))
    process = start("long", 9)
    wait_for_lines(tmp_path / "long" / "status.json", 1, process)
    deadline = time.monotonic() + 60
    while json.loads((tmp_path / "long" / "status.json").read_text())["phase"] != "log":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    finish(process, 143)


def test_output_of_another_configuration_is_not_overwritten(tmp_path: Path) -> None:
    def make(config: BoundConfig) -> None:
        loop = LoopConfig(tensorboard=False)
        with open_run(tmp_path / "r", stage="toy", bound=config, seed=0, loop=loop, output="made.txt") as run:
            (run.directory / "made.txt").write_text(config.operative)

    first, other = bound(run__samples=2), bound(run__samples=4)
    make(first)
    make(first)  # the same configuration is allowed
    with pytest.raises(InputError, match=r"run\.samples changed from 2 to 4.*holds made\.txt"):
        make(other)
    assert (tmp_path / "r" / "made.txt").read_text() == first.operative
    (tmp_path / "r" / "made.txt").unlink()
    make(other)


def test_other_directories_are_not_changed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    with pytest.raises(InputError, match=r"photos: not empty and not a run \(a\.jpg is there\)"):
        train(tmp_path / "photos", 1)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    with pytest.raises(InputError, match="not a directory"):
        train(tmp_path / "photos" / "a.jpg", 1)
    with pytest.raises(InputError, match="no such file"):
        train(tmp_path / "new", 1, inputs=(Input("data", str(tmp_path / "absent")),))
    with pytest.raises(InputError, match=r"a\.jpg.*cannot make it"):
        train(tmp_path / "photos" / "a.jpg" / "run", 1)
    assert not (tmp_path / "new").exists()


def test_an_input_error_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    def fail(run_dir: Path, step: int, file: str | None = None) -> None:
        loop = LoopConfig(progress=False)
        with open_run(run_dir, stage="toy", bound=bound(), seed=0, loop=loop) as run:
            run.record(step, {"loss": 1.0})
            if file:
                (run_dir / file).touch()
            raise InputError("batch of 3 rows")

    with pytest.raises(InputError, match="batch of 3 rows"):
        fail(tmp_path / "none", 0)
    with pytest.raises(InputError):
        fail(tmp_path / "one step", 1)
    with pytest.raises(InputError):
        fail(tmp_path / "a file", 0, "completions.jsonl")
    (tmp_path / "was there").mkdir()
    with pytest.raises(InputError):
        fail(tmp_path / "was there", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "one step", "was there"]


def test_a_run_of_another_stage_is_not_changed(tmp_path: Path) -> None:
    with open_run(tmp_path / "r", stage="generate", bound=bound(), seed=0, loop=LoopConfig(tensorboard=False)):
        pass
    before = (tmp_path / "r" / "provenance.json").read_bytes()
    with pytest.raises(InputError, match="belongs to a run of stage 'generate', this is 'toy'; give another run_dir"):
        train(tmp_path / "r", 1)
    assert (tmp_path / "r" / "provenance.json").read_bytes() == before


def test_host_values_and_the_first_step_are_checked(tmp_path: Path) -> None:
    train(tmp_path / "r", 2)
    loop = LoopConfig(tensorboard=False, progress=False)
    state = {"params": {"w": jnp.zeros(2)}}
    with open_run(tmp_path / "r", stage="toy", bound=bound(run__steps=2), seed=0, loop=loop) as run:
        with pytest.raises(InputError, match=r"holds the host values \['row'\], this program keeps \['line'\]"):
            run.restore(state, {"line": 0})
        with pytest.raises(ValueError, match="resumed_step=2, not 0"):
            next(run.steps(0, 4))


def test_signal_handlers_and_lock_are_released(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(tmp_path / "r", 2)
    train(tmp_path / "r", 4)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_record_writes_at_once_and_evaluation_cadence(tmp_path: Path) -> None:
    loop = LoopConfig(evaluate_every=2, log_every=9, tensorboard=False, progress=False)
    with open_run(tmp_path / "r", stage="toy", bound=bound(), seed=0, loop=loop) as run:
        evaluated = []
        for step in run.steps(0, 5):
            if run.evaluation_due(step):
                run.record(step, {"accuracy": step / 2, "none": Mean(jnp.float32(0), jnp.float32(0))})
                evaluated.append(step)
    assert evaluated == [2, 4, 5]
    entries = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert entries[1] == {"step": 4, "stage": "toy", "accuracy": 2.0, "none": None}


def test_due() -> None:
    assert [step for step in range(1, 8) if due(step, 3, 7)] == [3, 6, 7]
    assert not any(due(step, 0, 7) for step in range(1, 8))


@pytest.mark.parametrize(
    ("field", "value"), [("save_every", 0), ("keep", 1.5), ("log_every", True), ("evaluate_every", -1), ("progress", 1)]
)
def test_loop_config_checks(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^LoopConfig\.{field}: must be .*got {value!r}$"):
        LoopConfig(**{field: value})


def test_plain_progress_line() -> None:
    values = {"accuracy": 0.5, "grad_norm": 3.0, "loss": 0.693147, "kl": None}
    assert headline(values) == "loss 0.6931  accuracy 0.5"
    # 30 s for 10 steps of this process, 20 to go: 60 s left.
    assert line("sft", 30, 50, values, 30.0, 10) == "sft 30/50  loss 0.6931  accuracy 0.5  30 s, 60 s left"


def test_processes_must_share_the_run_directory(tmp_path: Path) -> None:
    """The second of two processes reads the lock of the first; a missing or older lock means another directory."""
    with pytest.raises(InputError, match="not the directory that the first process has opened"):
        check_shared_directory(tmp_path, os.getpid())
    with lock(tmp_path):
        check_shared_directory(tmp_path, os.getpid())
        with pytest.raises(InputError, match="file system that all hosts share"):
            check_shared_directory(tmp_path, os.getpid() + 1)
