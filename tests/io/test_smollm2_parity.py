"""SmolLM2-135M-Instruct against transformers and torch, with real weights.

    python scripts/fetch_smollm2.py --out=models/smollm2
    SMOLLM2_DIR=models/smollm2 pytest -m parity tests/io/test_smollm2_parity.py

SMOLLM2_REFERENCE may name an .npz with the outputs of an earlier torch run over float16 weights: input_ids [S],
last_logits [V], argmax [S], logsumexp [S], chat_prompt_ids, greedy_ids (prompt and continuation).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import rollout
from rlhf_jax.batches import PromptBatch
from rlhf_jax.io import export_pretrained, load_pretrained
from rlhf_jax.io.load import Pretrained
from rlhf_jax.models import Model, int8

pytestmark = pytest.mark.parity
ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
POEM = [{"role": "user", "content": "Write a poem about the sea."}]
TEXT = "SmolLM2 was born in 2024.  It has 135 million   parameters; def f(x):\n    return x+10\n"


def directory(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: see the docstring of this module")
    return Path(os.environ[variable])


@pytest.fixture(scope="module")
def loaded_model() -> Pretrained:
    return load_pretrained(directory("SMOLLM2_DIR"))


def greedy(loaded: Pretrained, prompt: list[int], length: int = 32) -> list[int]:
    """Generate the continuation of the rollout at temperature 0, with its key/value cache."""
    model, params, tokenizer = loaded
    prompts = PromptBatch(
        tokens=jnp.asarray([[tokenizer.pad_token_id] * 3 + prompt], jnp.int32),  # left padding changes nothing
        mask=jnp.asarray([[False] * 3 + [True] * len(prompt)]),
        prompt_id=jnp.zeros((1,), jnp.int32),
        sample_id=jnp.zeros((1,), jnp.int32),
    )
    sampling = rollout.SamplingConfig(temperature=0, max_new_tokens=length)
    stop, pad = (tokenizer.eos_token_id,), tokenizer.pad_token_id

    @jax.jit
    def generate(params: Any, prompts: PromptBatch) -> Any:
        return rollout.generate(model, params, prompts, jax.random.key(0), sampling=sampling, eos_ids=stop, pad_id=pad)

    samples = jax.device_get(generate(params, prompts))
    return [int(token) for token in samples.tokens[0][samples.mask[0]]]


def chat(loaded: Pretrained, question: list[dict[str, str]] = QUESTION) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids: list[int] = loaded.tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_logits_and_greedy_text_equal_those_of_torch(loaded_model: Pretrained, tmp_path: Path) -> None:
    """Both the original directory and our export of it are compared."""
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    import transformers

    model, params, tokenizer = loaded_model
    ids = tokenizer.encode(TEXT)
    logits = np.asarray(jax.jit(model.apply)(params, jnp.asarray([ids])))
    export_pretrained(tmp_path / "export", model, params, tokenizer)
    for path in (directory("SMOLLM2_DIR"), tmp_path / "export"):
        transformers_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        assert their_tokenizer.encode(TEXT) == ids
        with torch.no_grad():
            difference = np.abs(logits - transformers_model(torch.tensor([ids])).logits.numpy()).max()
        print(f"{path}: max |logit difference| {difference:.2e} over {logits.shape}")
        assert difference <= 1e-4
        for question, least in ((QUESTION, 5), (POEM, 32)):
            prompt = chat(loaded_model, question)
            answer = transformers_model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0][
                len(prompt) :
            ].tolist()
            assert answer == greedy(loaded_model, prompt) and len(answer) >= least
            print(f"{path}: {their_tokenizer.decode(answer)!r}")


def test_the_stored_reference(loaded_model: Pretrained) -> None:
    """The reference used weights rounded to float16, so the weights are rounded first and computed with in float32."""
    reference = np.load(directory("SMOLLM2_REFERENCE"))
    model, params, tokenizer = load_pretrained(directory("SMOLLM2_DIR"), param_dtype="float16")
    logits = np.asarray(jax.jit(model.apply)(params, jnp.asarray(reference["input_ids"])[None]))[0]
    differences = np.abs(logits[-1] - reference["last_logits"]).max()
    normalisers = np.abs(np.logaddexp.reduce(logits.astype(np.float64), axis=-1) - reference["logsumexp"]).max()
    print(f"max |difference|: last logits {differences:.2e}, logsumexp {normalisers:.2e}")
    assert differences <= 1e-4 and normalisers <= 1e-4
    np.testing.assert_array_equal(logits.argmax(-1), reference["argmax"])
    prompt = reference["chat_prompt_ids"].tolist()
    assert chat(loaded_model) == prompt
    continuation = greedy(Pretrained(model, params, tokenizer), prompt)
    assert prompt + continuation == reference["greedy_ids"].tolist()
    print(repr(tokenizer.decode(continuation)))


def test_int8_changes_log_probabilities_little(loaded_model: Pretrained) -> None:
    """Log-probabilities of the Apache licence and of a design document: matrices in int8 and in bfloat16 against float32."""
    model, params, tokenizer = loaded_model
    quantized = dataclasses.replace(model, int8=True)
    halved = dataclasses.replace(model, config=model.config.replace(compute_dtype="bfloat16"))
    variants = {
        "int8": (quantized, int8.quantized_tree(params, quantized.abstract())),
        "bfloat16 activations": (halved, params),
    }
    for name in ("LICENSE", "docs/design.md"):
        ids = jnp.asarray([tokenizer.encode((ROOT / name).read_text())[:1024]])

        def logprobs(model: Model, params: Any, ids: Any = ids) -> Any:
            return jax.jit(lambda p: jax.nn.log_softmax(model.apply(p, ids)[0, :-1]))(params)

        exact = logprobs(model, params)
        of_tokens = exact[jnp.arange(len(exact)), ids[0, 1:]]
        for other, arguments in variants.items():
            approximate = logprobs(*arguments)
            error = np.abs(approximate[jnp.arange(len(exact)), ids[0, 1:]] - of_tokens)
            kl = float((jnp.exp(exact) * (exact - approximate)).sum(axis=-1).mean())
            change = float(of_tokens.mean() - approximate[jnp.arange(len(exact)), ids[0, 1:]].mean())
            print(
                f"\nINT8 {name}, {len(exact)} tokens, nll {-float(of_tokens.mean()):.3f}, {other}: |difference| mean "
                f"{error.mean():.4f} max {error.max():.3f}, nll {change:+.4f}, KL {kl:.5f}"
            )
            assert 1e-4 < error.mean() < 0.1
