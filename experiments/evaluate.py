"""Compare policies on the same held-out prompts: scores with intervals, paired and length-controlled differences.

    python experiments/evaluate.py --gin_file=configs/support_desk/evaluate.gin

Writes RUN_DIR/evaluation.json (with seed and commit), and every response with its scores to RUN_DIR/completions.jsonl; prints the
scores and all paired differences.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import gin
import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_jax import data, rollout
from rlhf_jax.algorithms.models import Loaded, load_model, load_reward
from rlhf_jax.algorithms.template_date import keep_date, with_date
from rlhf_jax.batches import PromptBatch
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records, RecordSource, encode_prompts, open_records, report_skipped
from rlhf_jax.errors import InputError, check_unused, require_whole
from rlhf_jax.evaluate import ScoredResponses, compare, completion_rows
from rlhf_jax.io import locate
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig, open_run
from rlhf_jax.messages import behind, message
from rlhf_jax.models import as_token_batch, sequence_scores
from rlhf_jax.parallel import MeshConfig, make_mesh, to_global
from rlhf_jax.records import Response
from rlhf_jax.reports import headlines, number_cell
from rlhf_jax.rewards import CheckedReward, Reward, RewardSource, Scores, open_reward
from rlhf_jax.rundir.provenance import launches
from rlhf_jax.storage.files import json_text, write_atomically
from rlhf_jax.storage.inputs import Input
from rlhf_jax.types import Completions, Params, Rng


@gin.configurable
def run(
    run_dir: str,
    seed: int,
    policies: list[tuple[str, str]],
    prompts: RecordSource | Records,
    batch: BatchConfig,
    sampling: rollout.SamplingConfig,
    score_texts: Reward | RewardSource | None = None,
    reward: ModelSource | None = None,
    mesh: MeshConfig = MeshConfig(),
    slots: rollout.SlotConfig = rollout.ALL_AT_ONCE,
    samples_shown: int = 8,
    other_template: Sequence[str] = (),
) -> None:
    """Compare policies on the same prompts.

    policies: pairs (name, run directory); each policy is compared with the one before it. reward: a reward model that scores too,
    as
    "reward". score_texts: scores of the texts of responses. other_template: names of policies that may have been trained with
    another
    template than the prompts have. samples_shown: prompts whose responses are printed.
    """
    bound = bound_config()
    prompts = open_records(prompts)
    check_unused(batch, "packed", "folded", "microbatches")
    require_whole("run.samples_shown", samples_shown, 0)
    if score_texts is None and reward is None:
        raise InputError("run.score_texts, run.reward: nothing to score with; give one of them, or both")
    if len(policies) < 1:
        raise InputError("run.policies: name at least one (name, run directory)")
    if len({name for name, _ in policies}) < len(policies):
        raise InputError("run.policies: two have the same name; give each one of its own")
    judge_texts = None if score_texts is None else CheckedReward(open_reward(score_texts), "run.score_texts")
    if unknown := sorted(set(other_template) - {name for name, _ in policies}):
        raise InputError(f"run.other_template: {', '.join(unknown)}: no such policy in run.policies")
    devices = make_mesh(mesh)
    rng = jax.random.key(seed, impl="threefry2x32")
    judge = None if reward is None else load_reward(reward, devices)
    inputs = [Input(name, path, locate(path).revision) for name, path in policies]
    inputs += [*(judge.as_inputs("reward") if judge else []), *prompts.as_inputs()]
    loop = LoopConfig(tensorboard=False)
    opened = open_run(
        run_dir,
        stage="evaluate",
        bound=bound,
        seed=seed,
        loop=loop,
        inputs=inputs,
        mesh=devices,
        output="evaluation.json",
    )
    with opened as run_:
        results = {}
        for name, path in policies:
            source = ModelSource(path=path, other_template=name in other_template)
            results[name] = _sample(
                source,
                judge,
                prompts,
                batch,
                sampling,
                slots,
                judge_texts,
                devices,
                rng,
                run_.directory,
            )
        commit = launches(run_.directory)[-1]["git"]["commit"]
        evaluation = {"seed": seed, "commit": commit} | compare(results, samples_shown)
        rows = [json_text(row, sort_keys=True) for row in completion_rows(results)]
        write_atomically(run_.directory / "completions.jsonl", "".join(rows))
        write_atomically(run_.directory / "evaluation.json", json_text(evaluation, indent=1, sort_keys=True))
    _print(evaluation)


def _sample(
    source: ModelSource,
    judge: Loaded | None,
    prompts: Records,
    batch: BatchConfig,
    sampling: rollout.SamplingConfig,
    slots: rollout.SlotConfig,
    judge_texts: CheckedReward | None,
    devices: Mesh,
    rng: Rng,
    directory: Path,
) -> ScoredResponses:
    """Sample and score the responses of one policy."""
    assert source.path is not None
    loaded = load_model(source, "lm", devices, rng)
    tokenizer, pad = loaded.tokenizer, data.padding_id(loaded.tokenizer)
    if judge is not None and judge.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{judge.input}: its tokenizer is not that of {source.path}; ids of one mean nothing to the other"
        )
    for model in filter(None, (loaded, judge)):
        model.check_max_length(
            batch.length + sampling.max_new_tokens, "BatchConfig.length + SamplingConfig.max_new_tokens"
        )
    prompts = with_date(prompts, loaded, directory)
    form, remedy = data.Form(prompts.template, tokenizer), "name the policy in run.other_template"
    loaded.check_template(form, responses=False, remedy=remedy)
    if judge is not None:
        judge.check_template(form, responses=True)
    keep_date(directory, prompts.template)
    encoded, none = encode_prompts(prompts, tokenizer, batch.length)
    rollout.check_shared_prompts(encoded.items, slots)
    report_skipped(prompts, encoded, none, tokenizer)
    vocabulary = loaded.model.config.vocab_size
    ends = data.sampler_ends(tokenizer, prompts.template, sampling.stop_strings, vocabulary, loaded.generation)

    @jax.jit
    def respond(params: Params, frozen: Params, part: PromptBatch, rng: Rng) -> tuple[Completions, jax.Array | None]:
        completions = rollout.generate(loaded.model, params, part, rng, sampling=sampling, slots=slots, **ends)
        if judge is None:
            return completions, None
        return completions, sequence_scores(judge.model, frozen, as_token_batch(completions))

    responses: list[Response] = []
    rewards: list[float] = []
    lengths: list[int] = []
    for part in data.evaluation_prompt_batches(
        encoded.items, batch_size=batch.batch_size, length=batch.length, pad_id=pad
    ):
        completions, reward = jax.device_get(
            respond(loaded.params, {} if judge is None else judge.params, to_global(part, devices), rng)
        )
        rollout.stop_if_not_finite(completions, source.path)
        if reward is not None:
            rollout.stop_if_scores_not_finite(reward, "run.reward")
        real = part.prompt_id >= 0
        responses += data.responses(completions, encoded.records, tokenizer)
        lengths += completions.mask[real].sum(axis=1).tolist()
        rewards += [] if reward is None else reward[real].tolist()
    return ScoredResponses(responses, _scores(responses, rewards, lengths, judge_texts))


def _scores(
    responses: list[Response], rewards: list[float], lengths: list[int], judge_texts: CheckedReward | None
) -> dict[str, Scores]:
    """Return the scores of the responses by name: of score_texts, of the reward model, and their length and ending."""
    own: dict[str, Sequence[float]] = {"length": lengths, "ended": [response.ended for response in responses]}
    if rewards:
        own["reward"] = rewards
    scores = {} if judge_texts is None else judge_texts(responses)
    if duplicates := [name for name in scores if name in own]:
        raise InputError(
            f"run.score_texts: {duplicates[0]!r} is the name of a score that evaluate adds; give another one"
        )
    return scores | {name: Scores.from_values(values) for name, values in own.items()}


def _print(evaluation: dict[str, Any]) -> None:
    """Print the scores of every policy, the paired differences of all scores, and a sentence for each pair of policies."""
    policies, differences = evaluation["policies"], evaluation["differences"]
    scored = [(policy["name"], policy["scores"]) for policy in policies]
    paired = [(f"{pair['from']} to {pair['to']}", pair["paired"]) for pair in differences]
    console = Console(file=behind(sys.stdout), highlight=False)
    console.print(_table(f"{evaluation['prompts']} prompts: mean [95 % interval]", scored, ".3f"))
    if paired:
        console.print(_table("differences on the same prompts: mean [95 % interval]", paired, "+.3f"))
    for policy in policies:
        for key, count in policy.get("failed", {}).items():
            words = f"{policy['name']}: {count} responses without {key}, left out"
            console.print(message(words), markup=False, soft_wrap=True)
    for sentence in headlines(evaluation):
        console.print(message(sentence), markup=False, soft_wrap=True)


def _table(title: str, columns: list[tuple[str, dict[str, Any]]], form: str) -> Table:
    table = Table(title=title)
    table.add_column("score")
    for name, _ in columns:
        table.add_column(escape(message(name)))
    for key in dict.fromkeys(key for _, cells in columns for key in cells):
        table.add_row(escape(message(key)), *(escape(number_cell(cells.get(key), form)) for _, cells in columns))
    return table


if __name__ == "__main__":
    launch(run)
