"""The prompts of PPO and GRPO: read, encoded and batched."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf_jax import data, rollout
from rlhf_jax.algorithms.build import Setting
from rlhf_jax.algorithms.folds import check_fold
from rlhf_jax.algorithms.roles import Roles
from rlhf_jax.algorithms.rollout_fields import RolloutAlgorithm
from rlhf_jax.algorithms.template_date import with_date
from rlhf_jax.data.record_sets import Records, encode_prompts, open_records


@dataclasses.dataclass(frozen=True)
class PromptData:
    """Encoded prompts.

    encoded: in the order that prompt_id counts. examples: the number of prompts to draw from. rows: the prompts of one step.
    """

    records: Records
    encoded: data.EncodedSet[Any, Any]
    dropped: data.EncodedSet[Any, Any]
    batches: data.Batches[Any]
    examples: int
    rows: int


def read_prompts(
    setting: Setting, algorithm: RolloutAlgorithm, roles: Roles, samples: int
) -> tuple[PromptData | None, data.Template]:
    """Return (the prompts, encoded and batched with ``samples`` rows each; their template). The prompts are None in a plan."""
    batch, source = algorithm.batch, algorithm.prompts
    columns = batch.length + algorithm.sampling.max_new_tokens
    limit = "BatchConfig.length + SamplingConfig.max_new_tokens"
    if not setting.build.runs:
        roles.check_max_length(columns, limit)
        return None, data.Template(style="raw") if source is None else source.template
    check_fold(batch, setting.mesh)
    assert source is not None and setting.run_dir is not None
    records = with_date(open_records(source), roles.policy, setting.run_dir)
    roles.check_template(records.template)
    roles.check_max_length(columns, limit)
    tokenizer = roles.policy.tokenizer
    encoded, dropped = encode_prompts(records, tokenizer, batch.length)
    rollout.check_shared_prompts(encoded.items, algorithm.slots)
    shape = {"batch_size": batch.batch_size // samples, "length": batch.length, "pad_id": data.padding_id(tokenizer)}
    batches = data.prompt_batches(encoded.items, samples=samples, seed=setting.seed, **shape)
    return PromptData(
        records, encoded, dropped, batches, len(encoded.items), batch.batch_size // samples
    ), records.template
