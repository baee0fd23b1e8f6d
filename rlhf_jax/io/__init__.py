"""Loading and saving of models (run directories, Hugging Face directories, GGUF files, hub ids) and their tokenizers."""

from rlhf_jax.io.adapters import Adapter, adapter_card, load_adapter
from rlhf_jax.io.export import export_pretrained
from rlhf_jax.io.generation import read_generation
from rlhf_jax.io.load import Pretrained, describe_pretrained, load_pretrained
from rlhf_jax.io.location import Location, locate
from rlhf_jax.io.peft_files import export_adapter, read_adapter
from rlhf_jax.io.run_directory import normalisation_problem, parse_template, read_model_card, read_template
from rlhf_jax.io.tokenizers import check_vocabulary, largest_token, load_tokenizer

__all__ = [
    "Adapter",
    "Location",
    "Pretrained",
    "adapter_card",
    "check_vocabulary",
    "describe_pretrained",
    "export_adapter",
    "export_pretrained",
    "largest_token",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "locate",
    "normalisation_problem",
    "parse_template",
    "read_adapter",
    "read_generation",
    "read_model_card",
    "read_template",
]
