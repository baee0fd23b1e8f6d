"""What a finished run has left for others to read, kept in its provenance.json: a change afterwards is noticed by name."""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.checkpoint_files.manifest import checkpoint_dir
from rlhf_jax.rundir.provenance import read_provenance, stages_in
from rlhf_jax.storage.files import json_text, write_atomically
from rlhf_jax.storage.hashing import hash_file
from rlhf_jax.storage.names import MANIFEST, PROVENANCE, STATUS, TIMING, TOKENIZER

OUTPUTS = "outputs"
"""The entry of provenance.json."""
LOGS = {PROVENANCE, STATUS, TIMING}


def record_outputs(run_dir: str | Path) -> None:
    """Write into provenance.json what a run has left, now that it is done: {name: sha256} of what others read of it. Of a
    checkpoint the manifest, which vouches for the other files."""
    content = read_provenance(run_dir)
    if content is not None:
        write_atomically(Path(run_dir) / PROVENANCE, json_text(content | {OUTPUTS: outputs(Path(run_dir))}, indent=2))


def outputs(run_dir: Path) -> dict[str, str]:
    """Return {name: sha256} of the files of a run directory that others read; logs and records of starts are none."""
    top = [path for path in run_dir.glob("*.json*") if path.suffix in (".json", ".jsonl") and path.name not in LOGS]
    below = [*(run_dir / TOKENIZER).rglob("*"), *checkpoint_dir(run_dir).glob(f"*/{MANIFEST}")]
    files = sorted(path for path in [*top, *below] if path.is_file())
    return {path.relative_to(run_dir).as_posix(): hash_file(path) for path in files}


def changed_outputs(run_dir: str | Path) -> list[str]:
    """Return the files that a finished run left and that are gone or changed now; of a pipeline those of its stages. [] for a
    directory that records none."""
    made, run_dir = read_provenance(run_dir), Path(run_dir)
    if made is None:
        return [f"{stage.name}/{name}" for stage in stages_in(run_dir) for name in changed_outputs(stage)]
    left: dict[str, str] = made.get(OUTPUTS, {})
    return [name for name, sha in left.items() if not (run_dir / name).is_file() or hash_file(run_dir / name) != sha]
