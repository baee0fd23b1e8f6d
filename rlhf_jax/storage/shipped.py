"""Places of the experiments and configurations that are shipped with the package: a checkout's own, or those inside a wheel."""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent if (PACKAGE.parent / "experiments").is_dir() else PACKAGE / "shipped"
"""The directory that holds experiments/ and configs/."""


def experiments() -> list[str]:
    """List the names of the experiments: 'train_ppo', 'evaluate', ..."""
    return sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))


def configs() -> list[str]:
    """List the names of the shipped configurations: 'support_desk/ppo', ..."""
    folder = ROOT / "configs"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.gin"))


def script_path(experiment: str) -> Path:
    """Return the script of an experiment; 'train-ppo' and 'train_ppo' are the same. Raises InputError for an unknown one."""
    name = experiment.replace("-", "_")
    if name not in experiments():
        raise InputError(f"{experiment}: no such experiment; there are {', '.join(experiments())}")
    return ROOT / "experiments" / f"{name}.py"


def config_path(config: str) -> Path:
    """Return the file of a configuration: a path, or the name of a shipped one ('support_desk/ppo').

    Raises InputError for neither.
    """
    path = Path(config).expanduser()
    if path.suffix == ".gin" and path.is_file():
        return path
    shipped = ROOT / "configs" / f"{config.removesuffix('.gin').removeprefix('configs/')}.gin"
    if shipped.is_file():
        return shipped
    raise InputError(f"{config}: neither a gin file nor a shipped configuration; `rlhf-jax list` names those")
