"""Export a run directory as a Hugging Face directory, which transformers and other readers of that format load.

    python experiments/export.py --run_dir=runs/support_desk/ppo --out=exports/ppo
    python experiments/export.py --run_dir=runs/mine/sft_lora --out=exports/adapter --adapter_only

Writes config.json, generation_config.json (everything that ends a response, and the sampling defaults of the model that the
run started from), safetensors, the tokenizer and its chat template; a plain format that the run was trained with becomes the
chat template, so that a served model formats conversations as it was trained. A reward run becomes
LlamaForSequenceClassification with one label, its reward normalisation folded into the head. A PPO run with a shared trunk
is exported with its language-model head unless --head says otherwise. The export
includes the run's provenance.json, so that the lineage of models trained from the export goes back to the run, and
template.json, the template of its conversations. The adapters of a run are merged into the weights, or exported unchanged
with --adapter_only, for ``peft`` to load onto the base. --run_dir also takes every other source of a model: a Hugging Face
directory, a .gguf file, a hub id.

The directory is complete or absent: the next export removes the remains of a killed one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags

from rlhf_jax.data import chat_template_of
from rlhf_jax.errors import InputError
from rlhf_jax.io import (
    describe_pretrained,
    export_adapter,
    export_pretrained,
    load_adapter,
    load_pretrained,
    locate,
    read_generation,
    read_template,
)
from rlhf_jax.launch.command import run_command
from rlhf_jax.storage.names import PROVENANCE


def export() -> int:
    """Export the run of the flags. Raises InputError for files that cannot be read or written."""
    settings = flags.FLAGS
    out = Path(settings.out)
    if out.exists():
        raise InputError(f"--out: {out} already exists; give another directory or remove it")
    if settings.adapter_only:
        return export_adapters(out)
    if settings.base is not None:
        raise InputError("--base: goes with --adapter_only")
    head = settings.head
    if head is None and describe_pretrained(settings.run_dir)[0].head == "lm+scalar":
        head = "lm"
        print("note: the run has a value head on the same trunk, which is left out; --head=scalar exports that instead")
    model, params, tokenizer = load_pretrained(settings.run_dir, head=head, param_dtype=settings.dtype)
    if settings.pad_token is not None:
        if settings.pad_token not in tokenizer.get_vocab():
            raise InputError(f"--pad_token: {settings.pad_token!r} is not in the vocabulary")
        tokenizer.pad_token = settings.pad_token
    origin = read_companions()
    export_pretrained(out, model, params, tokenizer, **origin)
    print(f"{out}: head {model.config.head}, {model.config.param_dtype}")
    if origin["template"] is not None and chat_template_of(origin["template"], tokenizer) is not None:
        print("note: the chat template is the plain format that the run was trained with")
    if model.config.head == "scalar" and float(params["scalar_head"]["bias"][0]):
        bias = float(params["scalar_head"]["bias"][0])
        print(
            f"note: transformers' classifiers have no bias; add {bias:.6g} to their scores (pairs compare alike without)"
        )
    return 0


def export_adapters(out: Path) -> int:
    """Export only the adapters. Raises InputError when ``peft`` cannot load the base."""
    settings = flags.FLAGS
    for name in ("head", "dtype", "pad_token"):
        if getattr(settings, name) is not None:
            raise InputError(f"--{name}: does not go with --adapter_only: adapters are exported as they are")
    model, trained, tokenizer, base = load_adapter(settings.run_dir)
    base = settings.base or base
    if settings.base is None and locate(base).kind != "huggingface":
        raise InputError(f"--base: {base} is nothing that peft can load; export it too and give that directory")
    origin = read_companions()
    export_adapter(out, model, trained, tokenizer, base, **origin)
    print(f"{out}: adapters of {base}")
    return 0


def read_companions() -> dict[str, Any]:
    """Return the files of the run beside its weights: generation config, template of its conversations, provenance."""
    source = locate(flags.FLAGS.run_dir)
    template, provenance = read_template(source.path), source.path / PROVENANCE
    lineage = provenance.read_bytes() if provenance.is_file() else None
    return {"generation": read_generation(source), "template": template, "provenance": lineage}


if __name__ == "__main__":
    flags.DEFINE_string("run_dir", None, "Run directory of a training program.", required=True)
    flags.DEFINE_string("out", None, "Directory to write; must not exist.", required=True)
    flags.DEFINE_enum("head", None, ["lm", "scalar"], "Which head, for a model that has both.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the weights; default: as saved.")
    flags.DEFINE_string("pad_token", None, "Padding token; a reward model's must not be the end of sequence.")
    flags.DEFINE_boolean("adapter_only", False, "Write the adapters by themselves, in PEFT's format.")
    flags.DEFINE_string(
        "base", None, "With --adapter_only: what the adapter names as its base; default: as in the run."
    )
    names = ("run_dir", "out", "head", "dtype", "pad_token", "adapter_only", "base")
    sys.exit(run_command(export, sys.argv, __doc__ or "", names))
