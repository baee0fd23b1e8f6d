"""Fine-tune language models from human feedback in JAX: supervised fine-tuning, reward models, PPO, DPO and GRPO.

    rlhf_jax.io.load_pretrained(path)     a model, its parameters and its tokenizer
    rlhf_jax.data                         records, templates, encoding, batches
    rlhf_jax.rollout.generate             sampling
    rlhf_jax.learn                        losses and training steps
    rlhf_jax.algorithms                   SFT, RewardModel, DPO, PPO, GRPO as descriptions that are assembled for a run
    rlhf_jax.rewards                      functions that score responses

The `rlhf-jax` command (`python -m rlhf_jax`) starts the shipped experiments; docs/design.md has the packages.
"""

import importlib.metadata
import os

# transformers' advice to install PyTorch would be a second line under every one-line error.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

try:
    __version__ = importlib.metadata.version("rlhf_jax")
except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+unknown"
