"""Reference outputs of transformers for the checkpoints of family_files.py: golden/families.{json,npz}. Needs the [parity] extra.

python tests/io/make_family_golden.py

"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from family_files import BEYOND_ORIGINAL, CASES, DOCUMENT, FAR, GOLDEN, OTHER, draw_tensors, other_tokens, tokens
from llama_files import write_checkpoint
from safetensors.numpy import load_file


def saved_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that transformers writes for this configuration."""
    import transformers

    own = copy.deepcopy(fields)  # transformers writes into rope_scaling
    network = getattr(transformers, fields["architectures"][0])(transformers.AutoConfig.for_model(**own))
    with tempfile.TemporaryDirectory() as directory:
        network.save_pretrained(directory)
        return {name: tensor.shape for name, tensor in load_file(Path(directory) / "model.safetensors").items()}


def load_reference(fields: dict[str, Any], tensors: dict[str, np.ndarray], dtype: str = "float32") -> Any:
    """Load a checkpoint with transformers and assert that the tensors match exactly."""
    import torch
    import transformers

    # the grouped product of experts cannot do these sizes in bfloat16
    options = {"experts_implementation": "eager"} if "num_experts_per_tok" in fields else {}
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), fields, tensors)
        network, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True, **options
        )
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading_info
    return network.eval()


def logits(network: Any, ids: np.ndarray, start: int = 0) -> np.ndarray:
    """Compute the logits, float32 [S, V], of one document whose first token has position ``start``."""
    import torch

    with torch.no_grad():
        positions = torch.arange(start, start + len(ids))[None]
        return network(torch.from_numpy(ids)[None], position_ids=positions, use_cache=False).logits[0].float().numpy()


def generate_greedily(network: Any, ids: np.ndarray, count: int = 32) -> np.ndarray:
    """Generate greedily with transformers' cache: int64 [count]."""
    import torch

    prompt = torch.from_numpy(ids)[None]
    sequences = network.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, min_new_tokens=count,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return sequences[0, len(ids) :].numpy()


def reference_outputs(case: str, network: Any) -> dict[str, np.ndarray]:
    """Compute all outputs that the tests compare."""
    start = FAR if case in BEYOND_ORIGINAL else 0
    results = {
        "document": logits(network, tokens(), start),
        "other": logits(network, other_tokens(), start),
        "far": logits(network, tokens(), FAR),
    }
    if case not in BEYOND_ORIGINAL:
        results["greedy"] = np.stack([generate_greedily(network, ids) for ids in (tokens(), other_tokens())])
    return results


def subsample(name: str, array: np.ndarray) -> np.ndarray:
    """Select the stored part of an output: every fourth logit, and some rows of the later documents."""
    rows = {"document": 1, "other": 2, "far": 3}
    return array if name == "greedy" else array[:: rows[name], ::4]


if __name__ == "__main__":
    shapes = {case: saved_shapes(fields) for case, fields in CASES.items()}
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(of_case)}" for case, of_case in shapes.items())
    (GOLDEN / "families.json").write_text(f"{{\n{lines}\n}}\n")
    golden = {}
    for case, fields in CASES.items():
        results = reference_outputs(case, load_reference(fields, draw_tensors(shapes[case])))
        assert results["document"].shape == (DOCUMENT, 264) and results["other"].shape == (OTHER, 264)
        print(case, {name: round(float(array.std()), 3) for name, array in results.items()})
        golden |= {f"{case}/{name}": subsample(name, array) for name, array in results.items()}
    np.savez_compressed(GOLDEN / "families.npz", **golden)
