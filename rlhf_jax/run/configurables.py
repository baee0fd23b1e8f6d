"""The configurable surface on one page: every dataclass and builder that a gin file may name.

The only module of the package that imports every room. Builders return records and frozen dataclasses; nothing here
touches a device.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import gin
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rlhf_jax import data as data_room
from rlhf_jax.data import Demonstration, Fields, Message, Prompt, Template
from rlhf_jax.data.records import Unusable
from rlhf_jax.data.support_desk_replies import DeskConfig, corpus_text, demonstration_records, prompt_records
from rlhf_jax.data.turn_tokens import LossOn
from rlhf_jax.feedback import AnnotatorConfig
from rlhf_jax.learn import DPOConfig, GRPOConfig, ImportanceConfig, OptimizerConfig, PPOConfig
from rlhf_jax.models import DTYPES, Fold, LoraConfig, Model, ModelConfig, RopeScaling, fold_of
from rlhf_jax.parallel import MeshConfig
from rlhf_jax.rewards import (
    FinalAnswer,
    Reward,
    RewardPool,
    SentimentCorpus,
    opening_prompts,
    sentiment_scorer,
    support_desk,
)
from rlhf_jax.rollout import SamplingConfig, SlotConfig
from rlhf_jax.run.faults import Fault
from rlhf_jax.run.loop_config import LoopConfig
from rlhf_jax.run.record_files import HeldOut, RecordFile, read_sides
from rlhf_jax.run.records import Records
from rlhf_jax.testing import byte_tokenizer as _byte_tokenizer
from rlhf_jax.testing import train_bpe_tokenizer
from rlhf_jax.types import InputError, require_whole

for _configurable in (
    AnnotatorConfig,
    DPOConfig,
    DeskConfig,
    Fault,
    Fields,
    GRPOConfig,
    ImportanceConfig,
    LoraConfig,
    LoopConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RopeScaling,
    SamplingConfig,
    SentimentCorpus,
    SlotConfig,
    Template,
):
    gin.register(_configurable, module="rlhf_jax")

# ---- models


@gin.register
@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: ``path``, or ``config`` with ``tokenizer`` (a new one, drawn from the seed).

    path: a run directory of ours, a Hugging Face directory, a .gguf file, the URL of one (gs://...), or a hub id (name/model,
    name/model@revision).
    The rest goes with path; None = as saved (param_dtype of foreign checkpoints: float32). param_dtype, compute_dtype,
    remat, logits_chunk, attention: as in ModelConfig. max_length: shorter than the checkpoint's. pad_token: a token
    of the vocabulary to pad with, kept with the tokenizer; training and sampling need none, exports of reward models do.
    other_template: take a model though it learned from conversations that are written otherwise than the data's.
    """

    path: str | None = None
    config: ModelConfig | None = None
    tokenizer: Any = None
    param_dtype: str | None = None
    compute_dtype: str | None = None
    remat: bool | Literal["cheap"] | None = None
    logits_chunk: int | None = None
    attention: str | None = None
    max_length: int | None = None
    pad_token: str | None = None
    other_template: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.other_template, bool):
            raise InputError(f"ModelSource.other_template = {self.other_template!r}: give True or False")
        if (self.path is None) == (self.config is None):
            raise InputError("ModelSource: give either path (an existing model) or config (a new one)")
        for name in ("param_dtype", "compute_dtype"):
            if getattr(self, name) not in (None, *DTYPES):
                raise InputError(f"ModelSource.{name} = {getattr(self, name)!r}: one of {', '.join(DTYPES)}")
        if self.config is None:
            return
        if self.tokenizer is None:
            raise InputError("ModelSource.tokenizer: a new model needs one, for instance @desk_tokenizer()")
        for name in ("param_dtype", "compute_dtype", "remat", "logits_chunk", "attention", "max_length", "pad_token"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"ModelSource.{name}: goes with path; a new model has it from its config and tokenizer"
                )


@gin.register
def desk_tokenizer(desk: DeskConfig, vocab_size: int = 1024, documents: int = 3000) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on the support desk's corpus."""
    return train_bpe_tokenizer(list(corpus_text(desk, "train", 0, documents)), vocab_size)


@gin.register
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, and special tokens. To plan models by their sizes alone, and for experiments on bytes."""
    return _byte_tokenizer()


# ---- data

DESK_TEMPLATE = Template(style="plain", prompt_format="{prompt}", response_prefix=" ")


@gin.register
@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """batch_size: rows (RM: pairs; PPO: prompts). length: columns of a row (PPO: of a prompt). microbatches: splits of an
    optimiser step. packed: several documents in a row. folded: training reads rows of different lengths two by two, and
    predicts no token that does not count, where that saves columns (docs/performance.md); each shape is a program of its own."""

    batch_size: int
    length: int
    microbatches: int = 1
    packed: bool = False
    folded: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "microbatches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"BatchConfig.{name} = {value!r}: give a whole number >= 1")
        if self.batch_size % self.microbatches:
            raise InputError(
                f"BatchConfig.batch_size = {self.batch_size} does not divide into microbatches = {self.microbatches}"
            )
        if not isinstance(self.folded, bool):
            raise InputError(f"BatchConfig.folded = {self.folded!r}: give True or False")

    def fold(
        self,
        model: Model,
        splits: int,
        lengths: np.ndarray,
        columns: int,
        targets: np.ndarray | None = None,
        target_columns: int = 0,
    ) -> Fold | None:
        """For a program that reads rows with these lengths, int [rows], in ``splits`` parts, on the devices of ``model``:
        what `models.fold_of` says; None when not ``folded``. Where columns are split over devices: `refuse_folded`."""
        rows, left = divmod(len(lengths), splits * model.constrain.parts("act_batch"))
        return fold_of(lengths, rows, columns, targets, target_columns) if self.folded and not left else None


def refuse_unused(config: Any, *names: str) -> None:
    """Raises InputError for a field that this experiment does not read and that is not left at its default: a binding
    without effect."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise InputError(f"{type(config).__name__}.{field.name} = {value!r}: has no effect here; remove it")


def refuse_folded(batch: BatchConfig, mesh: Mesh) -> None:
    """Raises InputError for rows that shall be folded where the mesh splits their columns."""
    if batch.folded and mesh.shape["sequence"] > 1:
        raise InputError("BatchConfig.folded: rows are not folded where MeshConfig.sequence splits them; remove one")


def _one_message(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _desk_demonstrations(desk: DeskConfig, split: str, start: int, count: int) -> list[Demonstration]:
    rows = demonstration_records(desk, split, start, count)
    return [Demonstration(row["id"], _one_message(row["prompt"]), row["response"]) for row in rows]


@gin.register
def desk_corpus(desk: DeskConfig, count: int, heldout: int = 256) -> Records:
    """Documents to pre-train on; every token is a target."""

    require_whole("desk_corpus.count", count, 1)
    require_whole("desk_corpus.heldout", heldout, 0)

    def documents(split: str, count: int) -> list[Demonstration]:
        texts = corpus_text(desk, split, 0, count)
        return [Demonstration(f"{split}-{index}", (), text) for index, text in enumerate(texts)]

    return Records(documents("train", count), documents("validation", heldout), Template(style="raw"), "all")


@gin.register
def desk_demonstrations(desk: DeskConfig, start: int, count: int, heldout: int = 256) -> Records:
    """Demonstrations of mixed quality, cases start ... start + count - 1 of the train split."""
    _require_cases("desk_demonstrations", start, count)
    require_whole("desk_demonstrations.heldout", heldout, 0)
    train = _desk_demonstrations(desk, "train", start, count)
    return Records(train, _desk_demonstrations(desk, "validation", 0, heldout), DESK_TEMPLATE)


@gin.register
def desk_prompts(desk: DeskConfig, split: str, start: int, count: int) -> Records:
    """Prompts of the support desk (as ``train``)."""
    _require_cases("desk_prompts", start, count)
    rows = prompt_records(desk, split, start, count)
    return Records([Prompt(str(r["id"]), _one_message(str(r["prompt"]))) for r in rows], [], DESK_TEMPLATE)


def _require_cases(builder: str, start: int, count: int) -> None:
    require_whole(f"{builder}.start", start, 0)
    require_whole(f"{builder}.count", count, 1)


@gin.register
def demonstration_file(
    path: str,
    template: Template,
    fields: Fields | None = None,
    heldout: float | None = 0.05,
    limit: int | None = None,
    split: str | None = None,
    loss_on: LossOn = "response",
    heldout_path: str | None = None,
    heldout_split: str | None = None,
    unusable: Unusable = "drop",
    format: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quotes: bool = True,
) -> Records:
    """Demonstrations from a file, its URL or a hub data set, then with its ``split``.

    ``heldout`` of the prompts are kept for checking (0: none), or those of ``heldout_path`` or ``heldout_split`` are; at
    most ``limit`` records a side. loss_on: "response" learns the last response of a conversation, "assistant" every
    assistant turn, "all" everything. unusable: "drop" leaves out and counts rows that give no example, "error" stops at
    the first. format, encoding, delimiter, quotes: as in `data.sources.TextFormat`.
    """
    held = HeldOut("demonstration_file", heldout, heldout_path, heldout_split, 0.05)
    make = functools.partial(data_room.demonstrations, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    sides = read_sides(RecordFile(path, make, unusable, split, reading), held, limit)
    return Records(**vars(sides), template=template, loss_on=loss_on, on_unusable=unusable)


@gin.register
def comparison_file(
    path: str,
    template: Template,
    fields: Fields | None = None,
    heldout: float | None = 0.1,
    hh_dialogues: bool = False,
    limit: int | None = None,
    split: str | None = None,
    heldout_path: str | None = None,
    heldout_split: str | None = None,
    unusable: Unusable = "drop",
    format: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quotes: bool = True,
) -> Records:
    """Comparisons, as `demonstration_file`; hh_dialogues: rows are Anthropic's hh-rlhf."""
    held = HeldOut("comparison_file", heldout, heldout_path, heldout_split, 0.1)
    if hh_dialogues and fields is not None:
        raise InputError("comparison_file.fields: has no effect with hh_dialogues; remove one")
    make = data_room.hh_comparisons if hh_dialogues else functools.partial(data_room.comparisons, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    sides = read_sides(RecordFile(path, make, unusable, split, reading), held, limit)
    return Records(**vars(sides), template=template, on_unusable=unusable)


@gin.register
def prompt_file(
    path: str,
    template: Template,
    fields: Fields | None = None,
    limit: int | None = None,
    split: str | None = None,
    unusable: Unusable = "error",
    format: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quotes: bool = True,
) -> Records:
    """Prompts (as ``train``) from a file, its URL or a hub data set, then with its ``split``; as `demonstration_file`."""
    make = functools.partial(data_room.prompts, fields=fields)
    reading = {"format": format, "encoding": encoding, "delimiter": delimiter, "quotes": quotes}
    none = HeldOut("prompt_file", None, None, None, 0.0)
    sides = read_sides(RecordFile(path, make, unusable, split, reading), none, limit)
    return Records(**vars(sides), template=template, on_unusable=unusable)


@gin.register
def sentiment_prompts(
    corpus: SentimentCorpus, part: str = "prompts", sentiment: str = "positive", limit: int | None = None
) -> Records:
    """Openings of labelled sentences to continue, as plain text (as ``train``). part: "prompts", or "heldout" to compare
    policies on; the reward is fitted on neither. sentiment: "positive", "negative" or "both"."""
    prompts = opening_prompts(corpus, part, sentiment)
    return Records(prompts[:limit], [], Template(style="raw"), files=tuple(corpus.files.values()))


# ---- rewards

ScoreTexts = Reward
"""Its former name: a module written for it is told the present signature when its reward is opened."""


@gin.register
def desk_gold() -> Reward:
    """The support desk's exact scorer: "gold" and "gold/COMPONENT" in [0, 1]."""
    return support_desk.score


@gin.register
def final_answer(column: str = "answer") -> Reward:
    """Whether the number after the last "####", or in the last \\boxed{}, is that of the prompt's ``column`` (one of
    ``Fields.extra``): "correct", and "answered", each 0 or 1."""
    return FinalAnswer(column)


@gin.register
def in_processes(score: Reward, workers: int = 2, seconds: float = 30.0) -> Reward:
    """``score`` of every response by itself in one of ``workers`` processes; one that takes longer than ``seconds``, or
    fails, stops the run with the id of its prompt."""
    return RewardPool(score, workers=workers, seconds=seconds)


@gin.register
def sentiment_scores(corpus: SentimentCorpus) -> Reward:
    """How positive a continuation sounds: "sentiment" (the reward), "second_opinion", "words", "distinct"."""
    return sentiment_scorer(corpus)
