"""Sample responses from a model into RUN_DIR/completions.jsonl, and compare them with an annotator.

    python experiments/generate.py --gin_file=configs/support_desk/completions.gin

With ``annotator`` (a simulated one) and samples >= 2, the first two responses to each prompt are compared into
RUN_DIR/comparisons.jsonl, which train_reward.py reads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import gin
import jax
from jax.sharding import Mesh

from rlhf_jax import data, rollout
from rlhf_jax.algorithms.models import Loaded, load_model
from rlhf_jax.algorithms.template_date import keep_date, with_date
from rlhf_jax.batches import PromptBatch
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource, encode_prompts, open_records, report_skipped
from rlhf_jax.errors import InputError, check_unused, require_whole
from rlhf_jax.feedback import AnnotatedResponse, AnnotatorConfig, label_pairs
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.parallel import MeshConfig, make_mesh, to_global
from rlhf_jax.records import Response
from rlhf_jax.rewards import CheckedReward, Reward, RewardSource, open_reward
from rlhf_jax.rewards.support_desk import has_flattery
from rlhf_jax.storage.files import json_text, write_atomically
from rlhf_jax.types import Completions, Params, Rng


@gin.configurable
def run(
    run_dir: str,
    seed: int,
    model: ModelSource,
    prompts: RecordSource | Records,
    batch: BatchConfig,
    sampling: rollout.SamplingConfig,
    samples: int = 1,
    seeds: str | None = None,
    score_texts: Reward | RewardSource | None = None,
    annotator: AnnotatorConfig | None = None,
    mesh: MeshConfig = MeshConfig(),
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE,
) -> None:
    """Sample responses, score them and compare them.

    samples: responses to each prompt, with batch_size prompts at a time. seeds: a column of the prompts (one of ``Fields.extra``)
    with a number that the random bits of a prompt depend on, in place of its position in the file. score_texts: scores that are
    written with each response; the annotator needs "gold". annotator: compare the first two responses to each prompt.
    """
    bound = bound_config()
    prompts = open_records(prompts)
    check_unused(batch, "packed", "folded", "microbatches")
    require_whole("run.samples", samples, 1)
    own = None if seeds is None else {record.id: _read_seed(record, seeds) for record in prompts.train}
    if annotator is not None and (samples < 2 or score_texts is None):
        raise InputError("run.annotator: compares two scored responses; set run.samples to 2 and run.score_texts")
    judge = None if score_texts is None else CheckedReward(open_reward(score_texts), "run.score_texts")
    devices = make_mesh(mesh)
    rng = jax.random.key(seed, impl="threefry2x32")
    loaded = load_model(model, "lm", devices, rng)
    loaded.check_template(data.Form(prompts.template, loaded.tokenizer), responses=False)
    loaded.check_max_length(
        batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens"
    )

    inputs = [*loaded.as_inputs("model"), *prompts.as_inputs()]
    loop = LoopConfig(tensorboard=False)
    opened = open_run(
        run_dir,
        stage="generate",
        bound=bound,
        seed=seed,
        loop=loop,
        inputs=inputs,
        mesh=devices,
        output="completions.jsonl",
    )
    with opened as run_:
        rows, responses, use = _sample(
            run_.directory, loaded, prompts, batch, sampling, slots, samples, own, devices, rng
        )
        if judge is not None:
            scores = {name: column.to_list() for name, column in judge(responses).items()}
            if annotator is not None and "gold" not in scores:
                raise InputError(
                    f"run.annotator: needs a score named gold; run.score_texts gives {', '.join(sorted(scores))}"
                )
            for index, row in enumerate(rows):
                row["scores"] = {name: values[index] for name, values in scores.items()}
        _write_rows(run_.directory / "completions.jsonl", rows)
        if annotator is not None:
            _annotate(run_.directory, rows, annotator)
    print(f"{len(rows)} completions, {use:.0%} of the slot-steps of use: {run_dir}/completions.jsonl")


def _sample(
    directory: Path,
    loaded: Loaded,
    prompts: Records,
    batch: BatchConfig,
    sampling: rollout.SamplingConfig,
    slots: rollout.SlotConfig,
    samples: int,
    seeds: Mapping[str, int] | None,
    devices: Mesh,
    rng: Rng,
) -> tuple[list[dict[str, Any]], list[Response], float]:
    """Return a row and a `Response` per completion (every prompt once, then again for the next sample), and the use of slots."""
    tokenizer, pad = loaded.tokenizer, data.padding_id(loaded.tokenizer)
    prompts = with_date(prompts, loaded, directory)
    keep_date(directory, prompts.template)
    encoded, none = encode_prompts(prompts, tokenizer, batch.length)
    rollout.check_shared_prompts(encoded.items, slots)
    report_skipped(prompts, encoded, none, tokenizer)
    vocabulary = loaded.model.config.vocab_size
    ends = data.sampler_ends(tokenizer, prompts.template, sampling.stop_strings, vocabulary, loaded.generation)

    @jax.jit
    def generate(params: Params, prompts: PromptBatch, rng: Rng) -> Completions:
        return rollout.generate(
            loaded.model, params, prompts, rng, sampling=sampling, slots=slots, samples=samples, **ends
        )

    numbered: list[tuple[int, Response]] = []
    useful = steps = 0
    own = None if seeds is None else [seeds[record.id] for record in encoded.records]
    for part in data.evaluation_prompt_batches(
        encoded.items, batch_size=batch.batch_size, length=batch.length, pad_id=pad, seeds=own
    ):
        completions = jax.device_get(generate(loaded.params, to_global(part, devices), rng))
        rollout.stop_if_not_finite(completions, "run.model")
        numbers = completions.prompts.sample_id[completions.prompts.prompt_id >= 0].tolist()
        numbered += zip(numbers, data.responses(completions, encoded.records, tokenizer), strict=True)
        useful, steps = useful + completions.mask.sum(), steps + completions.slot_steps.sum()
    numbered.sort(key=lambda pair: pair[0])
    tools = {record.id: {"tools": record.tools} for record in encoded.records if record.tools}
    rows = [_completion_row(*pair) | tools.get(pair[1].id, {}) for pair in numbered]
    return rows, [response for _, response in numbered], useful / steps


def _completion_row(sample: int, response: Response) -> dict[str, Any]:
    """Return a row of completions.jsonl."""
    prompt = {"id": response.id, "prompt": data.prompt_column(response.prompt)}
    return prompt | {"sample": sample, "response": response.text, "ended": response.ended}


def _read_seed(record: data.Prompt, column: str) -> int:
    """Return the seed of a prompt. Raises InputError for a prompt that has none."""
    seed = record.extra.get(column)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < PromptBatch.SEEDS:
        has = "has no such column (Fields.extra names those that are read)" if seed is None else f"has {seed!r} there"
        raise InputError(f"run.seeds = {column!r}: prompt {record.id} {has}; give a whole number from 0 to 2**30 - 1")
    return seed


def _annotate(directory: Path, rows: list[dict[str, Any]], annotator: AnnotatorConfig) -> None:
    """Write comparisons.jsonl of the first two responses of each prompt, and annotation.json about them."""
    by_sample = [[row for row in rows if row["sample"] == sample] for sample in (0, 1)]
    nonempty = [pair for pair in zip(*by_sample, strict=True) if all(row["response"].strip() for row in pair)]
    scored = [pair for pair in nonempty if all(row["scores"]["gold"] is not None for row in pair)]
    pairs = [(_annotated_response(first), _annotated_response(second)) for first, second in scored]
    labels = label_pairs(annotator, [(first["id"], first["prompt"]) for first, _ in scored], pairs, has_flattery)
    tools = {row["id"]: {"tools": row["tools"]} for row in rows if "tools" in row}
    _write_rows(directory / "comparisons.jsonl", [row | tools.get(row["id"], {}) for row in labels.comparisons])
    summary = {
        "comparisons": len(labels.comparisons),
        "left_out_identical": labels.dropped,
        "left_out_empty": len(by_sample[0]) - len(nonempty),
        "left_out_failed": len(nonempty) - len(scored),
        "agreement_with_gold": labels.agreement,
    }
    write_atomically(directory / "annotation.json", json_text(summary))
    print(json_text(summary), end="")


def _annotated_response(row: dict[str, Any]) -> AnnotatedResponse:
    """Return the response of a row, with its gold score, for the annotator."""
    return AnnotatedResponse(row["response"], row["scores"]["gold"], row["ended"])


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json_text(row, sort_keys=True) for row in rows))


if __name__ == "__main__":
    launch(run)
