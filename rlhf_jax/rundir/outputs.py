"""Output files of a finished run, hashed in its provenance.json so that later changes are detected by name."""

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
    """Write {name: sha256} of the outputs of a finished run into its provenance.json.

    Of a checkpoint only the manifest is hashed: it holds the hashes of the other files.
    """
    content = read_provenance(run_dir)
    if content is not None:
        write_atomically(Path(run_dir) / PROVENANCE, json_text(content | {OUTPUTS: outputs(Path(run_dir))}, indent=2))


def outputs(run_dir: Path) -> dict[str, str]:
    """Return {name: sha256} of the files of a run directory that other programs read, without logs and provenance."""
    top = [path for path in run_dir.glob("*.json*") if path.suffix in (".json", ".jsonl") and path.name not in LOGS]
    below = [*(run_dir / TOKENIZER).rglob("*"), *checkpoint_dir(run_dir).glob(f"*/{MANIFEST}")]
    files = sorted(path for path in [*top, *below] if path.is_file())
    return {path.relative_to(run_dir).as_posix(): hash_file(path) for path in files}


def changed_outputs(run_dir: str | Path) -> list[str]:
    """Return the names of the outputs of a finished run that are missing or changed; for a pipeline, those of its stages.

    [] for a directory that records no outputs.
    """
    record, run_dir = read_provenance(run_dir), Path(run_dir)
    if record is None:
        return [f"{stage.name}/{name}" for stage in stages_in(run_dir) for name in changed_outputs(stage)]
    hashes: dict[str, str] = record.get(OUTPUTS, {})
    return [name for name, sha in hashes.items() if not (run_dir / name).is_file() or hash_file(run_dir / name) != sha]
