"""A starting configuration: another one, and every key of its experiment with its meaning as comments."""

from __future__ import annotations

import textwrap
from pathlib import Path

from rlhf_jax.cli.listing import config_experiment
from rlhf_jax.config.parsing import scan
from rlhf_jax.errors import InputError
from rlhf_jax.launch.describe import REQUIRED, Key, experiment_keys
from rlhf_jax.storage.files import read_text, write_atomically
from rlhf_jax.storage.shipped import ROOT, config_path


def write_config(name: str, source: str) -> str:
    """Write NAME.gin and return the command that runs it.

    Raises InputError when it exists, or when ``source`` names no experiment.
    """
    path, base = Path(f"{name.removesuffix('.gin')}.gin"), config_path(source)
    if path.exists():
        raise InputError(f"{path}: exists already; give another name, or remove it")
    experiment = config_experiment(read_text(base))
    if experiment is None:
        raise InputError(
            f"{base}: its comments name no experiment (python experiments/train_ppo.py ...); add that line"
        )
    write_atomically(path, config_text(path, base, experiment))
    return f"rlhf-jax {experiment.replace('_', '-')} --config {path}"


def config_text(path: Path, base: Path, experiment: str) -> str:
    """Return the text of a configuration that includes ``base``; what ``base`` binds and all defaults are comments."""
    include = base.relative_to(ROOT).as_posix() if base.is_relative_to(ROOT) else str(base.absolute())
    bound = {f"{b.selector.rpartition('.')[2]}.{b.argument}": b for b in scan([str(base)], []) if not b.scope}
    lines = [
        f"# rlhf-jax {experiment.replace('_', '-')} --config {path}",
        f"# Everything of {include}. Remove the '#' before a key to change it; scoped keys (policy/...) are in that file.",
        f"include '{include}'",
    ]
    selector = ""
    for key in experiment_keys(experiment):
        if key.selector != selector:
            selector = key.selector
            lines += ["", f"# ---- {selector} ({key.place})"]
        lines += _key_lines(key, getattr(bound.get(key.name), "value", None))
    return "\n".join(lines) + "\n"


def _key_lines(key: Key, value: object) -> list[str]:
    meaning = [f"# {line}" for line in textwrap.wrap(key.meaning or key.type, 116)]
    current = key.default if value is None else value
    return [*meaning, f"#{key.name} = {'...' if current == REQUIRED else current}"]
