"""experiments/sweep.py: what it starts, skips, goes on with and reports; a stub stands for the experiment."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from absl.testing import flagsaver
from compiler_flags import COMPILER
from forked_programs import Server

from rlhf_jax.storage import shipped

ROOT = Path(__file__).resolve().parents[2]
STUB = """
import json, pathlib, re, signal, sys, time
bound = dict(re.split(r"\\s*=\\s*", text.split("=", 1)[1], maxsplit=1) for text in sys.argv[1:] if "bindings" in text)
run_dir = pathlib.Path(eval(bound["RUN_DIR"]))
seed, rate = int(bound.get("SEED", 7)), float(bound.get("O.lr", 1.0))
run_dir.mkdir(parents=True, exist_ok=True)
with (run_dir / "launches").open("a") as file:
    file.write("launched\\n")
if rate < 0 and not pathlib.Path("repaired").exists():
    print("warming up", flush=True)
    sys.exit("error: O.lr must be positive")
if rate == 5.0 and not (run_dir / "half").exists():
    (run_dir / "half").touch()
    def save(*_):
        (run_dir / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    pathlib.Path("ready").touch()
    time.sleep(60)
lines = [{"step": step, "stage": "stub", "loss": rate + seed * step} for step in (1, 2)]
lines.append({"step": 2, "stage": "stub", "only_seed_1": 3.0} if seed == 1 else {"step": 2, "stage": "stub"})
(run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""
CONFIG = "RUN_DIR = 'r'\nSEED = 7\nrun.run_dir = %RUN_DIR\nrun.seed = %SEED\nO.lr = 1.0\n"
CHECKED = [str(ROOT / "tests" / "forked_children.py"), "check", str(ROOT / "experiments" / "sweep.py")]
"""The program; the process that checks bindings is forked."""
Sweep = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_script", ROOT / "experiments" / "sweep.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def sweep(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Sweep:
    """Runs the script's main with a repository that holds the stub; gives exit code, stdout, stderr."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "stub.py").write_text(STUB)
    (tmp_path / "x.gin").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    monkeypatch.setattr(module, "check", lambda commands: None)  # the stub is no gin program

    def call(*arguments: str) -> tuple[int, str, str]:
        usual = {"experiment": "stub", "gin_file": "x.gin", "out": "out"}
        defaults = [
            f"--{name}={value}"
            for name, value in usual.items()
            if not any(item.startswith(f"--{name}=") for item in arguments)
        ]
        with flagsaver.flagsaver():
            code = module.main(["sweep.py", *defaults, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def launches(tmp_path: Path) -> dict[str, int]:
    return {path.parent.name: path.read_text().count("\n") for path in (tmp_path / "out").glob("*/launches")}


def test_grid_times_seeds_then_nothing_then_more(sweep: Sweep, tmp_path: Path) -> None:
    code, out, err = sweep("--grid=O.lr=1.0,3.0", "--seeds=0,1,2", "--metrics=loss")
    assert code == 0, err
    assert launches(tmp_path) == {f"lr={rate}__seed={seed}": 1 for rate in ("1.0", "3.0") for seed in (0, 1, 2)}
    # loss at the last step is rate + 2 * seed: 1, 3, 5, mean 3; t interval of 3: 3 +- 4.3027 * 2 / sqrt(3).
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    first = summary["settings"][0]
    assert (first["name"], first["values"], first["runs"], first["done"]) == ("lr=1.0", {"O.lr": "1.0"}, 3, 3)
    assert first["metrics"]["loss"]["mean"] == 3.0
    assert first["metrics"]["loss"]["low"] == pytest.approx(3 - 4.302653 * 2 / 3**0.5)
    assert first["not_in_every_run"] == ["only_seed_1"] and list(first["metrics"]) == ["loss"]
    assert summary["runs"][4] == {
        "name": "lr=3.0__seed=1",
        "seed": 1,
        "state": "done",
        "metrics": {"loss": 5.0, "only_seed_1": 3.0},
    }
    rows = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert [(row["setting"], row["metric"], row["mean"], row["n"]) for row in rows] == [
        ("lr=1.0", "loss", "3.0", "3"),
        ("lr=3.0", "loss", "5.0", "3"),
    ]
    assert "lr=1.0" in out and "3 [-1.968, 7.968]" in out

    code, _, err = sweep("--grid=O.lr=1.0,3.0", "--seeds=0,1,2", "--average=2")
    assert code == 0 and err.count("done before") == 6
    assert set(launches(tmp_path).values()) == {1}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"][0]["metrics"]["loss"]["mean"] == 2.5  # of rate + 1.5 * seed

    code, _, err = sweep("--grid=O.lr=1.0,3.0,9.0", "--seeds=0,1,2,3")
    assert code == 0 and err.count("done before") == 6 and len(launches(tmp_path)) == 12


def test_one_run_has_no_interval(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep("--point=O.lr=2.0; X.y='a'", "--metrics=loss")[0] == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"][0]["metrics"]["loss"] == {"mean": 16.0, "low": None, "high": None, "n": 1}
    assert launches(tmp_path) == {"lr=2.0__y=a": 1}


def test_a_failure_is_recorded_and_the_rest_goes_on(sweep: Sweep, tmp_path: Path) -> None:
    code, out, err = sweep("--grid=O.lr=-1.0,2.0", "--seeds=0,1")
    assert code == 3
    assert err.count(" s: error: O.lr must be positive") == 2
    assert "2 of 4 runs failed" in err and "lr=-1.0__seed=0, lr=-1.0__seed=1" in err
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [entry["state"] for entry in record["runs"].values()] == ["failed", "failed", "done", "done"]
    assert record["runs"]["lr=-1.0__seed=0"]["exit_code"] == 1
    log = (tmp_path / "out" / "logs" / "lr=-1.0__seed=0.log").read_text()
    assert "warming up" in log
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(entry["done"], entry["runs"]) for entry in summary["settings"]] == [(0, 2), (2, 2)]
    assert "0 of 2" in out

    (tmp_path / "repaired").touch()
    assert sweep("--grid=O.lr=-1.0,2.0", "--seeds=0,1")[0] == 0
    assert launches(tmp_path)["lr=-1.0__seed=0"] == 2 and launches(tmp_path)["lr=2.0__seed=0"] == 1


def test_a_signal_is_passed_on_and_the_same_command_goes_on(sweep: Sweep, tmp_path: Path) -> None:
    def kill_when_ready() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (tmp_path / "ready").exists():
                os.kill(os.getpid(), signal.SIGTERM)  # handled: the stub runs, so run_child waits for it
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill_when_ready)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        sweep("--grid=O.lr=1.0,5.0,6.0")
    thread.join()
    assert stopped.value.code == 143
    assert (tmp_path / "out" / "lr=5.0" / "saved").exists()  # the run was told, and waited for
    assert not (tmp_path / "out" / "lr=6.0").exists()
    code, _, err = sweep("--grid=O.lr=1.0,5.0,6.0")
    assert code == 0 and err.count("done before") == 1
    assert launches(tmp_path) == {"lr=1.0": 1, "lr=5.0": 2, "lr=6.0": 1}


def test_what_a_run_is_asked_for_decides_whether_it_is_done(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep("--grid=O.lr=1.0")[0] == 0
    (tmp_path / "x.gin").write_text("# a comment changes nothing\n" + CONFIG)
    assert "done before" in sweep("--grid=O.lr=1.0")[2]
    assert "done before" not in sweep("--grid=O.lr=1.0", "--gin_bindings=O.decay = 0.1")[2]
    assert launches(tmp_path) == {"lr=1.0": 2}


def test_dry_run_writes_nothing(sweep: Sweep, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = sweep("--grid=O.lr=1.0,2.0", "--seeds=4", "--dry_run")
    assert code == 0 and sorted(tmp_path.rglob("*")) == before
    assert "lr=1.0__seed=4: to do\n" in out and "'--gin_bindings=SEED = 4'" in out
    assert f"{tmp_path}/out/lr=2.0__seed=4" in out and "run.seed" not in out


def test_flags_from_a_file(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "s.flags").write_text("# two rates\n--grid=O.lr=1.0,2.0\n--seeds=1\n")
    assert sweep("--flagfile=s.flags", "--seeds=2")[0] == 0  # what comes later wins
    assert set(launches(tmp_path)) == {"lr=1.0__seed=2", "lr=2.0__seed=2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment=train"], "--experiment=train: no such script; there are stub"),
        (["--out="], "--out: give it"),
        (["--seeds=0,x"], "--seeds=0,x: give whole numbers"),
        (["--grid=O.lr"], "--grid='O.lr': write KEY=VALUE"),
        (["--grid=O.lr=(1"], "cannot read gin"),
        (["--gin_file=y.gin"], "--gin_file=y.gin: no such gin file"),
        (["--average=0"], "flag --average=0"),
        (["--gird=1"], "Unknown command line flag 'gird'"),
        (["--flagfile=none.flags"], "none.flags"),
        (["run"], "unexpected argument 'run'"),
        (["--out=experiments"], "experiments: not empty and not a sweep (stub.py is there)"),
    ],
)
def test_mistakes_in_one_line(sweep: Sweep, tmp_path: Path, arguments: list[str], message: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, _, err = sweep(*arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_metric_and_other_experiment(sweep: Sweep, tmp_path: Path) -> None:
    code, _, err = sweep("--metrics=los")
    assert code == 2 and err.splitlines()[-1] == "error: --metrics: there is no los; there are loss"
    assert (tmp_path / "out" / "summary.json").is_file()  # nothing is lost: the runs are done
    (tmp_path / "experiments" / "other.py").write_text(STUB)
    assert "a sweep over stub, not other; give another --out" in sweep("--experiment=other")[2]


def test_sweeps_in_configs_say_their_command_and_can_be_planned(server: Server, tmp_path: Path) -> None:
    files = sorted((ROOT / "configs" / "sweeps").iterdir())
    assert files
    for file in files:
        name = file.relative_to(ROOT)
        assert file.read_text().splitlines()[0] == f"# python experiments/sweep.py --flagfile={name}"
        result = server(tmp_path, [*CHECKED, f"--flagfile={file}", "--out=/nowhere/out", "--dry_run"])
        assert result.returncode == 0 and ": to do\n" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_real_sweep(tmp_path: Path) -> None:
    """Two seeds of a real experiment; the numbers of the summary are those of the runs."""
    flags = ["--experiment=train_sft", "--gin_file=configs/smoke/base.gin", "--seeds=0,1", f"--out={tmp_path / 'out'}"]
    flags += ["--metrics=heldout/loss,loss"]
    environment = {**os.environ, "XLA_FLAGS": COMPILER}
    command = [sys.executable, "experiments/sweep.py", *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = []
    for seed in (0, 1):
        run_dir = tmp_path / "out" / f"seed={seed}"
        assert json.loads((run_dir / "provenance.json").read_text())["seed"] == seed
        losses.append(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["heldout/loss"])
    assert losses[0] != losses[1]
    (setting,) = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert setting["metrics"]["heldout/loss"]["mean"] == pytest.approx(sum(losses) / 2)


def test_a_typo_in_the_grid_is_found_before_the_first_run(server: Server, tmp_path: Path) -> None:
    flags = ["--experiment=train_sft", "--gin_file=configs/smoke/base.gin", f"--out={tmp_path / 'out'}"]
    typo = "--grid=OptimizerConfig.learning_rat=1e-3,1e-4"
    result = server(tmp_path, [*CHECKED, *flags, typo])
    assert result.returncode == 2 and "did you mean 'learning_rate'?" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_killed_in_its_first_run_it_goes_on(
    sweep: Sweep, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL leaves the first run's directory, logs/ and what was written before: the same command must know it as a sweep."""

    class Killed(BaseException):
        pass

    def killed(run, out: Path) -> None:
        (out / "logs").mkdir()
        (out / run.name).mkdir()
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module, "execute", killed)
        sweep("--seeds=0,1")
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == {"experiment": "stub", "runs": {}}
    code, _, err = sweep("--seeds=0,1")
    assert code == 0, err
    assert launches(tmp_path) == {"seed=0": 1, "seed=1": 1}


def test_killed_at_its_first_file_it_goes_on(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    (tmp_path / "out" / "sweep.json.tmp").write_text("{")
    code, _, err = sweep("--seeds=0")
    assert code == 0, err


def test_a_sweep_does_not_go_where_checkpoints_cannot(sweep: Sweep, tmp_path: Path) -> None:
    code, _, err = sweep("--seeds=0", "--out=a[1]")
    assert (
        code == 2 and "checkpoints cannot be stored under a path with '['" in err and not (tmp_path / "a[1]").exists()
    )
