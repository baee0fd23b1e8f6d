"""Fine-tune language models from human preferences in JAX. One folder below is one room: see docs/design.md."""

import os

# transformers' advice to install PyTorch would be a second line under every one-line error.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
