"""Reference outputs of transformers for the checkpoints of llama_files.py: golden/llama.npz. Needs the [parity] extra.

python tests/io/make_llama_golden.py

"""

from __future__ import annotations

from typing import Any

import numpy as np
from llama_files import CASES, GOLDEN, golden_tokens, llama_tensors


def reference_outputs(fields: dict[str, Any], tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Compute with torch in float32: logits [B, S, V] of a language model, or the score of every position [B, S] of a scorer."""
    import torch
    import transformers

    architecture = fields["architectures"][0]
    config = transformers.AutoConfig.for_model(**fields)
    network = getattr(transformers, architecture)(config).eval()
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    if fields["tie_word_embeddings"] and architecture.endswith("ForCausalLM"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))
        if architecture.endswith("ForCausalLM"):
            return network(ids).logits.numpy()
        return network.score(network.model(ids).last_hidden_state)[..., 0].numpy()


if __name__ == "__main__":
    outputs = {name: reference_outputs(f, llama_tensors(f), golden_tokens()) for name, f in CASES.items()}
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **outputs)
    print({name: (out.shape, float(np.abs(out).max())) for name, out in outputs.items()})
