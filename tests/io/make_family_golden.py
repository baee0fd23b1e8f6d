"""What transformers computes for the checkpoints of family_files.py: golden/families.{json,npz}. Needs the [parity] extra.

python tests/io/make_family_golden.py
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from family_files import BEYOND_ORIGINAL, CASES, DOCUMENT, FAR, GOLDEN, OTHER, drawn, other_tokens, tokens
from llama_files import write_checkpoint
from safetensors.numpy import load_file


def saved_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers writes for this configuration."""
    import transformers

    own = copy.deepcopy(fields)  # transformers writes into rope_scaling
    network = getattr(transformers, fields["architectures"][0])(transformers.AutoConfig.for_model(**own))
    with tempfile.TemporaryDirectory() as directory:
        network.save_pretrained(directory)
        return {name: tensor.shape for name, tensor in load_file(Path(directory) / "model.safetensors").items()}


def opened(fields: dict[str, Any], tensors: dict[str, np.ndarray], dtype: str = "float32") -> Any:
    """transformers' model of a checkpoint, every tensor found and none left over."""
    import torch
    import transformers

    # the grouped product of experts cannot do these sizes in bfloat16
    how = {"experts_implementation": "eager"} if "num_experts_per_tok" in fields else {}
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), fields, tensors)
        network, told = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True, **how
        )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return network.eval()


def logits(network: Any, ids: np.ndarray, start: int = 0) -> np.ndarray:
    """float32 [S, V] of one document whose first token stands at position ``start``."""
    import torch

    with torch.no_grad():
        positions = torch.arange(start, start + len(ids))[None]
        return network(torch.from_numpy(ids)[None], position_ids=positions, use_cache=False).logits[0].float().numpy()


def continuation(network: Any, ids: np.ndarray, count: int = 32) -> np.ndarray:
    """int64 [count], greedy, with transformers' cache."""
    import torch

    prompt = torch.from_numpy(ids)[None]
    done = network.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, min_new_tokens=count,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return done[0, len(ids) :].numpy()


def outputs(case: str, network: Any) -> dict[str, np.ndarray]:
    """Everything that is compared."""
    start = FAR if case in BEYOND_ORIGINAL else 0
    found = {
        "document": logits(network, tokens(), start),
        "other": logits(network, other_tokens(), start),
        "far": logits(network, tokens(), FAR),
    }
    if case not in BEYOND_ORIGINAL:
        found["greedy"] = np.stack([continuation(network, ids) for ids in (tokens(), other_tokens())])
    return found


def sampled(name: str, array: np.ndarray) -> np.ndarray:
    """The part of an output that is stored: of logits every fourth number of the vocabulary, of later documents a few rows."""
    rows = {"document": 1, "other": 2, "far": 3}
    return array if name == "greedy" else array[:: rows[name], ::4]


if __name__ == "__main__":
    shapes = {case: saved_shapes(fields) for case, fields in CASES.items()}
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(of_case)}" for case, of_case in shapes.items())
    (GOLDEN / "families.json").write_text(f"{{\n{lines}\n}}\n")
    golden = {}
    for case, fields in CASES.items():
        found = outputs(case, opened(fields, drawn(shapes[case])))
        assert found["document"].shape == (DOCUMENT, 264) and found["other"].shape == (OTHER, 264)
        print(case, {name: round(float(array.std()), 3) for name, array in found.items()})
        golden |= {f"{case}/{name}": sampled(name, array) for name, array in found.items()}
    np.savez_compressed(GOLDEN / "families.npz", **golden)
