"""Provenance of a run: versions, commit, devices, command, and the content of every input.

``RUN_DIR/provenance.json`` holds ``stage``, ``seed``, ``inputs`` (name, path, fingerprint; of a run directory also its
step, the files read beside it and the fingerprint of its configuration; of a file that a run wrote also that run), ``launches``,
one entry for the first start and each resume, ``saved_step`` and, of a finished run, ``outputs``.
``lineage`` follows the inputs back.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.checkpoint_files.manifest import latest_step, saved_steps
from rlhf_jax.checkpoint_files.reading import reading_step
from rlhf_jax.errors import InputError
from rlhf_jax.messages import without_secrets
from rlhf_jax.storage.files import field, json_text, read_object, write_atomically
from rlhf_jax.storage.hashing import hash_file
from rlhf_jax.storage.inputs import Input
from rlhf_jax.storage.names import CARD, CHECKPOINTS, NORMALISATION, OPERATIVE_CONFIG, PROVENANCE, SAVED_STEP, TOKENIZER
from rlhf_jax.storage.remote import fetch_url, is_remote

PACKAGES = (
    "rlhf_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "datasets",
    "grain",
    "safetensors",
    "tokenizers",
    "gguf",
)


def fingerprint_path(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, or of a directory's sorted lines ``relative path, NUL, sha256 of the file, newline``.

    Empty directories are ignored. Raises InputError when there is nothing at ``path``.
    """
    path = Path(path)
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory")
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    lines = [f"{name}\0{hash_file(file)}\n" for name, file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint_input(path: Path, step: int | None) -> str:
    """Return the fingerprint of ``path``, or of ``step`` of the run at ``path`` with a reward run's normalisation.

    The normalisation is part of the reward model, but it is stored beside the checkpoints.
    """
    if step is None:
        return fingerprint_path(path)
    arrays, scale = fingerprint_path(path / CHECKPOINTS / str(step)), path / NORMALISATION
    return hashlib.sha256(f"{arrays}\0{hash_file(scale)}".encode()).hexdigest() if scale.is_file() else arrays


def files_beside(path: Path) -> dict[str, str]:
    """Return {name: sha256} of the files that belong to a model besides its checkpoint.

    Run directory: model.json (which holds the template), the tokenizer and a reward model's normalisation.
    .gguf file: the tokenizer next to it.
    """
    if path.is_dir():
        names = [path / CARD, path / NORMALISATION, *(path / TOKENIZER).rglob("*")]
        return {name.relative_to(path).as_posix(): hash_file(name) for name in sorted(names) if name.is_file()}
    if path.suffix.lower() != ".gguf":
        return {}
    names = [name for pattern in ("*token*.json", "*.jinja") for name in path.parent.glob(pattern)]
    return {name.name: hash_file(name) for name in sorted(names) if name.is_file()}


def describe(source: Input) -> dict[str, Any]:
    """Return the provenance entry of an input: ``name``, absolute ``path`` or URL, ``fingerprint`` (of the downloaded files).

    Run directory: the fingerprint is that of its ``step`` (with the normalisation of a reward run), and ``files`` are the
    hashes of the files beside the checkpoint (`files_beside`). Logs are left out: they change when the run is resumed.
    File in a run directory: ``made_by`` is that directory.
    Both: ``config`` is the sha256 of the run's operative_config.gin, None when it has none.
    Adapters: ``base`` is the entry of the model that they are loaded onto.
    """
    if source.fingerprint is not None:
        return {"name": source.name, "path": source.path, "fingerprint": source.fingerprint}
    remote = is_remote(source.path)
    path = fetch_url(source.path) if remote else Path(source.path).expanduser().absolute()
    entry: dict[str, Any] = {"name": source.name, "path": source.path if remote else str(path)}
    run = path if path.is_dir() else path.parent
    if (run / PROVENANCE).is_file():
        entry |= {} if run == path else {"made_by": str(run)}
        config = run / OPERATIVE_CONFIG
        entry["config"] = hash_file(config) if config.is_file() else None
    try:
        if (base := base_of(path)) is not None:
            entry["base"] = describe(base)
        if (run / PROVENANCE).is_file() and run == path and (source.step is not None or latest_step(run) is not None):
            with reading_step(run, source.step) as place:
                step = int(place.name)
                files = files_beside(path)
                return {**entry, "step": step, "fingerprint": fingerprint_input(path, step), "files": files}
        files = files_beside(path) if path.is_file() else {}
        return {**entry, "fingerprint": fingerprint_path(path), **({"files": files} if files else {})}
    except InputError as error:
        raise InputError(f"input {source.name!r}: {error}; an input that is not local needs a fingerprint") from error


def base_of(path: Path) -> Input | None:
    """Return the base model of a directory of adapters, when it is on this machine; None otherwise.

    Run directory: the ``base`` in its model card, with its step. PEFT directory: the model that its configuration names.
    """
    for name in (CARD, "adapter_config.json"):
        try:
            fields = read_object(path / name)
            base = fields["adapter"] if name == CARD else {"base": fields["base_model_name_or_path"]}
            if base is not None and Path(base["base"]).exists():
                return Input("base", str(base["base"]), step=base.get("base_step"))
        except (InputError, TypeError, KeyError):
            continue  # no adapters, or a damaged card, which is an error when the model is read
    return None


def changed_content(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Compare two provenance entries of one input and return what changed.

    The names of changed files beside the checkpoint; [''] for the checkpoint, or the file or directory itself; [] for no
    change. Files are compared only when both entries record them (older versions did not).
    """
    old, new = before.get("files"), after.get("files")
    if old is not None and new is not None and old != new:
        return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if before["fingerprint"] != after["fingerprint"]:
        return [""]
    if "base" in before and "base" in after:
        return [str(Path(after["base"]["path"], name)) for name in changed_content(before["base"], after["base"])]
    return []


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in this source tree; None when it is not a checkout or git is missing."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str | None]:
    """Return {package: version} of Python and the packages that affect a run's numbers; None for one that is not installed."""
    installed: dict[str, str | None] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def launch_facts(resumed_step: int, mesh: Mesh | None = None) -> dict[str, Any]:
    """Return the facts of this process: command, commit, versions, devices, mesh, random bits.

    resumed_step: 0 for a fresh start.
    """
    status = _git("status", "--porcelain")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [without_secrets(word) for word in sys.argv],
        "working_directory": os.getcwd(),
        "resumed_step": resumed_step,
        "git": {"commit": _git("rev-parse", "--verify", "HEAD"), "dirty": None if status is None else bool(status)},
        "versions": versions(),
        "devices": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "mesh": None if mesh is None else dict(mesh.shape),
        "random_bits": {
            "implementation": str(jax.config.values["jax_default_prng_impl"]),
            "partitionable": bool(jax.config.values["jax_threefry_partitionable"]),
        },
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
    }


def read_provenance(run_dir: str | Path) -> dict[str, Any] | None:
    """Return the content of provenance.json, None when there is none. Raises InputError when it is damaged."""
    path = Path(run_dir) / PROVENANCE
    if not os.path.lexists(path):
        return None
    remedy = "damaged: put a copy back, or use another run_dir"
    content, place = read_object(path, remedy), str(path)
    field(content, "stage", str, place, remedy)
    field(content, "seed", (int, float, str), place, remedy)
    for entry in field(content, "inputs", list, place, remedy):
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(k), str) for k in ("name", "path", "fingerprint")
        ):
            raise InputError(f"{path}: field 'inputs' has an entry without name, path or fingerprint; {remedy}")
    launches = field(content, "launches", list, place, remedy)
    facts = {"git": dict, "working_directory": str}
    if not launches or not all(
        isinstance(launch, dict) and all(isinstance(launch.get(k), kind) for k, kind in facts.items())
        for launch in launches
    ):
        raise InputError(f"{path}: field 'launches' names no start of the run; {remedy}")
    return content


def write_provenance(
    run_dir: str | Path,
    *,
    stage: str,
    seed: int,
    inputs: Sequence[dict[str, Any]],
    resumed_step: int,
    mesh: Mesh | None = None,
) -> None:
    """Write provenance.json, or add this launch to the one of the run that is being resumed (resumed_step > 0)."""
    before = (read_provenance(run_dir) or {}) if resumed_step else {}
    earlier = before.get("launches", [])
    content = {
        "stage": stage,
        "seed": seed,
        "inputs": list(inputs),
        "launches": [*earlier, launch_facts(resumed_step, mesh)],
        **{name: value for name, value in before.items() if name == SAVED_STEP},
    }
    write_atomically(Path(run_dir) / PROVENANCE, json_text(content, indent=2))


def record_saved(run_dir: str | Path, step: int) -> None:
    """Write into provenance.json that the run has saved ``step``, so that a later loss of its checkpoints is detected."""
    content = read_provenance(run_dir)
    if content is not None:
        write_atomically(Path(run_dir) / PROVENANCE, json_text(content | {SAVED_STEP: step}, indent=2))


def changed_inputs(run_dir: str | Path) -> list[str]:
    """Return the names of the local inputs that changed since the run read them; for a pipeline, those of its stages.

    [] for a directory without provenance.json.
    """
    record = read_provenance(run_dir)
    if record is None:
        return [f"{stage.name}/{name}" for stage in stages_in(run_dir) for name in changed_inputs(stage)]
    local = [entry for entry in record["inputs"] if Path(entry["path"]).is_absolute()]
    return [
        entry["name"] for entry in local if _has_changed(entry, latest_step(entry["path"]) if "step" in entry else None)
    ]


def _has_changed(entry: dict[str, Any], step: int | None) -> bool:
    """Return whether the content at the path of a provenance entry has changed.

    step: of a run directory, the step to compare.
    """
    path = Path(entry["path"])
    if not path.exists() or ("step" in entry and step not in saved_steps(path)):
        return True
    return bool(changed_content(entry, describe(Input(entry["name"], entry["path"], step=step))))


def stages_in(directory: str | Path) -> list[Path]:
    """Return the run directories in a pipeline's directory, sorted."""
    return sorted(path for path in Path(directory).glob("*") if (path / PROVENANCE).is_file())


def launches(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the `launch_facts` of every start of a run, the present one last; [] when it has no provenance.json."""
    entries: list[dict[str, Any]] = (read_provenance(run_dir) or {"launches": []})["launches"]
    return entries


def lineage(run_dir: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Return the tree of a run's inputs, down to files that no run wrote: {path, stage, seed, commit, inputs: [{name, ...}]}.

    Each input has the fields of its entry in provenance.json, and:
    state: 'recorded'; 'missing' when its path does not exist; with verify=True 'same' or 'changed', after hashing it again.
    run: the tree of the run, when the input is a run directory or a file that a run wrote.
    Raises InputError when ``run_dir`` has no provenance.json.
    """
    content = read_provenance(run_dir)
    if content is None:
        raise InputError(f"{Path(run_dir) / PROVENANCE}: no such file; give the directory of a run")
    return {
        "path": str(Path(run_dir).absolute()),
        "stage": content["stage"],
        "seed": content["seed"],
        "commit": content["launches"][0]["git"]["commit"],
        "inputs": [_ancestor(entry, verify) for entry in content["inputs"]],
    }


def _ancestor(entry: dict[str, Any], verify: bool) -> dict[str, Any]:
    path = Path(entry["path"])
    node: dict[str, Any] = {**entry, "state": "recorded" if path.exists() or is_remote(entry["path"]) else "missing"}
    if verify and path.exists():
        content = path / CHECKPOINTS / str(entry["step"]) if "step" in entry else path
        present = {
            "fingerprint": content.exists() and fingerprint_input(path, entry.get("step")),
            "files": files_beside(path),
        }
        node["state"] = "changed" if changed_content(entry, present) else "same"
    run = Path(entry.get("made_by", path))
    if (run / PROVENANCE).is_file():
        node["run"] = lineage(run, verify=verify)
    return node
