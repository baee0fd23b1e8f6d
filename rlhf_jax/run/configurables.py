"""The configurable surface on one page: every dataclass and builder that a gin file may name.

The only module of the package that imports every room. Builders return records and frozen dataclasses; nothing here
touches a device except `load_model`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rlhf_jax import data as data_room
from rlhf_jax.data import Demonstration, Fields, Message, Prompt, Template
from rlhf_jax.data.encode import LossOn
from rlhf_jax.data.support_desk_replies import DeskConfig, corpus_text, demonstration_records, prompt_records
from rlhf_jax.feedback import AnnotatorConfig
from rlhf_jax.io import adapter_card, load_pretrained, locate
from rlhf_jax.learn import OptimizerConfig, PPOConfig
from rlhf_jax.models import DTYPES, Head, LoraConfig, Model, ModelConfig, RopeScaling, lora
from rlhf_jax.parallel import ActivationConstraint, MeshConfig, born_sharded, tree_shardings
from rlhf_jax.rewards import RewardPool, SentimentCorpus, opening_prompts, sentiment_scorer, support_desk
from rlhf_jax.rollout import SamplingConfig, SlotConfig
from rlhf_jax.run.faults import Fault
from rlhf_jax.run.loop import LoopConfig
from rlhf_jax.run.provenance import Input, write_atomically
from rlhf_jax.testing import byte_tokenizer as _byte_tokenizer
from rlhf_jax.testing import train_bpe_tokenizer
from rlhf_jax.types import InputError, Params, Rng, require_whole

for _configurable in (
    AnnotatorConfig,
    DeskConfig,
    Fault,
    Fields,
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

    path: a run directory of ours, a Hugging Face directory, a .gguf file, or a hub id (name/model, name/model@revision).
    The rest goes with path; None = as saved (param_dtype of foreign checkpoints: float32). param_dtype, compute_dtype,
    remat, logits_chunk, attention: as in ModelConfig. max_length: shorter than the checkpoint's. pad_token: a token
    of the vocabulary to pad with, for tokenizers that name none.
    """

    path: str | None = None
    config: ModelConfig | None = None
    tokenizer: Any = None
    param_dtype: str | None = None
    compute_dtype: str | None = None
    remat: bool | None = None
    logits_chunk: int | None = None
    attention: str | None = None
    max_length: int | None = None
    pad_token: str | None = None

    def __post_init__(self) -> None:
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


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to use. input: what provenance records (None for a new model); revision: its commit on the hub.

    frozen: {}, or with adapters {"base": ...}; params are then the adapters and the scalar head (`models.lora`).
    """

    model: Model
    params: Params
    tokenizer: PreTrainedTokenizerBase
    input: str | None
    revision: str | None = None
    frozen: Params = dataclasses.field(default_factory=dict)

    def as_inputs(self, name: str) -> list[Input]:
        """For `open_run`."""
        return [] if self.input is None else [Input(name, self.input, self.revision)]

    def base(self, head: Head) -> Loaded:
        """The frozen base of an adapted model by itself, under ``head``: the same arrays, no copy."""
        model = dataclasses.replace(self.model, lora=None).with_head(head)
        return dataclasses.replace(self, model=model, params=self.frozen["base"], frozen={})

    def refuse_longer(self, tokens: int, what: str) -> None:
        """Raises InputError when sequences of ``tokens`` are longer than the model's max_length: rotary positions past
        it give numbers, and nonsense. what: the keys that decide the length."""
        limit = self.model.config.max_length
        if tokens > limit:
            raise InputError(f"{what}: sequences of {tokens} tokens; the model's max_length is {limit}")


def write_model_card(
    run_dir: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    subtree: str = "params",
    base: str | None = None,
) -> None:
    """Make a run directory loadable as a model: model.json (configuration, where the checkpoint holds the parameters, of
    adapters also their settings and ``base``, the path of the model under them) and tokenizer/."""
    if jax.process_index():
        return
    card: dict[str, Any] = {"config": json.loads(model.config.to_json()), "subtree": subtree}
    if model.lora is not None:
        assert base is not None
        card["adapter"] = adapter_card(model.lora, base)
    write_atomically(run_dir / "model.json", json.dumps(card, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(run_dir / "tokenizer")


def refuse_tokenizer(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a tokenizer that the model cannot be trained with."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"ModelConfig.vocab_size = {config.vocab_size}: the tokenizer has {len(tokenizer)} tokens; set at least that"
        )
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise InputError(
            "tokenizer: needs an end-of-sequence and a padding token; set eos_token, and pad_token or ModelSource.pad_token"
        )


def load_model(source: ModelSource, head: Head, mesh: Mesh, rng: Rng | None) -> Loaded:
    """The model under ``head``, on its shards. A scalar head that the checkpoint lacks is drawn from ``rng`` (None: refused).

    A reward model (head "scalar") that keeps reward_normalisation.json gets gain and bias folded into its head.
    """
    if source.config is not None:
        model = Model(source.config.replace(head=head), ActivationConstraint(mesh))
        refuse_tokenizer(model.config, source.tokenizer)
        shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
        return Loaded(model, born_sharded(model.init, shardings, mesh, rng), source.tokenizer, None)
    assert source.path is not None
    location = locate(source.path)
    model, params, tokenizer = load_pretrained(
        source.path, mesh=mesh, head=head, param_dtype=source.param_dtype, max_length=source.max_length, rng=rng
    )
    model = dataclasses.replace(model, config=adapted(model.config, source))
    if source.pad_token is not None:
        if source.pad_token not in tokenizer.get_vocab():
            raise InputError(f"ModelSource.pad_token = {source.pad_token!r}: not in the vocabulary of {source.path}")
        tokenizer.pad_token = source.pad_token
    refuse_tokenizer(model.config, tokenizer)
    return Loaded(model, params, tokenizer, source.path, location.revision)


def adapted(config: ModelConfig, source: ModelSource) -> ModelConfig:
    """``config`` of a saved model with what ``source`` wants otherwise."""
    chosen = {name: getattr(source, name) for name in ("compute_dtype", "remat", "logits_chunk", "attention")}
    return config.replace(**{name: value for name, value in chosen.items() if value is not None})


def with_adapters(loaded: Loaded, settings: LoraConfig | None, mesh: Mesh, rng: Rng) -> Loaded:
    """``loaded`` with fresh adapters to train, everything else frozen; itself when ``settings`` is None.

    The scalar head of a reward or value model is trained whole. Works on shapes too. Raises InputError for a new model.
    """
    if settings is None:
        return loaded
    if loaded.input is None:
        raise InputError("run.lora: a new model is no base for adapters; give ModelSource.path")
    model = dataclasses.replace(loaded.model, lora=settings)
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    base, trained = lora.split(loaded.params)

    def fresh(rng: Rng) -> Params:
        adapters = lora.split(model.init(rng))[1]
        return {name: tree for name, tree in adapters.items() if name != lora.HEAD}

    if isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct):
        drawn = jax.eval_shape(fresh, rng)
        at = {name: lora.split(shardings)[1][name] for name in drawn}
        struct: Any = jax.ShapeDtypeStruct
        adapters = jax.tree.map(lambda leaf, sharding: struct(leaf.shape, leaf.dtype, sharding=sharding), drawn, at)
    else:
        adapters = born_sharded(fresh, shardings, mesh, rng)
    return dataclasses.replace(loaded, model=model, params=adapters | trained, frozen={"base": base})


def load_reward(source: ModelSource, mesh: Mesh) -> Loaded:
    """A trained reward model. Raises InputError for one without a scalar head of its own: it would score at random."""
    if source.config is not None:
        raise InputError("ModelSource.config: a new reward model scores at random; give path, a run of train_reward")
    return load_model(source, "scalar", mesh, None)


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
    optimiser step. packed: several documents in a row."""

    batch_size: int
    length: int
    microbatches: int = 1
    packed: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "microbatches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"BatchConfig.{name} = {value!r}: give a whole number >= 1")
        if self.batch_size % self.microbatches:
            raise InputError(
                f"BatchConfig.batch_size = {self.batch_size} does not divide into microbatches = {self.microbatches}"
            )


def refuse_unused(config: Any, *names: str) -> None:
    """Raises InputError for a field that this experiment does not read and that is not left at its default: a binding
    without effect."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and value != field.default:
            raise InputError(f"{type(config).__name__}.{field.name} = {value!r}: has no effect here; remove it")


@dataclasses.dataclass(frozen=True)
class Records:
    """Records to learn from and prompt-disjoint ones to check on. files: what provenance fingerprints. unusable: rows of
    the files that became no record, by reason."""

    train: Sequence[Any]
    heldout: Sequence[Any]
    template: Template
    loss_on: LossOn = "response"
    files: tuple[str, ...] = ()
    unusable: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def of(self, kind: type) -> Records:
        """Itself. Raises InputError when a record is not a ``kind``: a builder of another experiment was bound."""
        for record in (*self.train, *self.heldout):
            if not isinstance(record, kind):
                raise InputError(
                    f"{kind.__name__} records are needed here, got {type(record).__name__}; bind another builder "
                    "(rlhf_jax/run/configurables.py lists them)"
                )
        return self

    def as_inputs(self) -> list[Input]:
        """For `open_run`: the files, or the hash of generated records."""
        if self.files:
            content = None if all(Path(file).exists() for file in self.files) else self._content()
            return [Input(f"data {index}", file, content) for index, file in enumerate(self.files)]
        return [Input("data", "generated", self._content())]

    def _content(self) -> str:
        """Of the records themselves: what is on a hub has no file to hash."""
        return data_room.fingerprint([*self.train, *self.heldout])


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


def _require_side(builder: str, heldout: float | None, limit: int | None) -> None:
    """Before any file is read."""
    if heldout is not None and not 0.0 < heldout < 1.0:
        raise InputError(f"{builder}.heldout = {heldout!r}: give a fraction between 0 and 1")
    if limit is not None:
        require_whole(f"{builder}.limit", limit, 1)


def _split(records: Sequence[Any], heldout: float, limit: int | None) -> tuple[list[Any], list[Any]]:
    train, held = data_room.split_by_prompt(records, held_out=heldout)
    return train[:limit], held[:limit]


@gin.register
def demonstration_file(
    path: str,
    template: Template,
    fields: Fields | None = None,
    heldout: float = 0.05,
    limit: int | None = None,
    split: str | None = None,
    loss_on: LossOn = "response",
) -> Records:
    """Demonstrations from a file or a hub data set, then with its ``split``.

    ``heldout`` of the prompts are kept for checking, at most ``limit`` records a side. loss_on: "response" learns the
    last reply of a conversation, "assistant" every assistant turn, "all" everything.
    """
    _require_side("demonstration_file", heldout, limit)
    records, unusable = data_room.demonstrations(
        data_room.read_rows(path, split=split), fields, source=path, unusable="drop"
    )
    return Records(*_split(records, heldout, limit), template, loss_on, files=(path,), unusable=unusable)


@gin.register
def comparison_file(
    path: str,
    template: Template,
    fields: Fields | None = None,
    heldout: float = 0.1,
    hh_dialogues: bool = False,
    limit: int | None = None,
    split: str | None = None,
) -> Records:
    """Comparisons from a file or a hub data set, then with its ``split``; hh_dialogues: rows are Anthropic hh-rlhf dialogues."""
    _require_side("comparison_file", heldout, limit)
    rows = data_room.read_rows(path, split=split)
    if hh_dialogues:
        records, unusable = data_room.hh_comparisons(rows, source=path)
    else:
        records, unusable = data_room.comparisons(rows, fields, source=path, unusable="drop")
    return Records(*_split(records, heldout, limit), template, files=(path,), unusable=unusable)


@gin.register
def prompt_file(
    path: str, template: Template, fields: Fields | None = None, limit: int | None = None, split: str | None = None
) -> Records:
    """Prompts from a file or a hub data set, then with its ``split`` (as ``train``)."""
    _require_side("prompt_file", None, limit)
    records, unusable = data_room.prompts(data_room.read_rows(path, split=split), fields, source=path)
    return Records(records[:limit], [], template, files=(path,), unusable=unusable)


def encode_records(
    records: Records, kind: type, encode: Callable[[Any], Any]
) -> tuple[data_room.EncodedSet[Any, Any], data_room.EncodedSet[Any, Any]]:
    """(train, heldout) encoded; all must be of ``kind``; heldout is empty when there is none."""
    records.of(kind)
    heldout = (
        data_room.encode_all(records.heldout, encode) if records.heldout else data_room.EncodedSet([], [], Counter())
    )
    return data_room.encode_all(records.train, encode), heldout


def encode_prompts(
    prompts: Records, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[data_room.EncodedSet[Any, Any], data_room.EncodedSet[Any, Any]]:
    """`encode_records` of prompts to sample replies to, of at most ``length`` tokens."""

    def encode(record: Any) -> Any:
        return data_room.encode_prompt(record, tokenizer, prompts.template, max_prompt_length=length)

    return encode_records(prompts, Prompt, encode)


def tell_left_out(
    records: Records, train: data_room.EncodedSet[Any, Any], heldout: data_room.EncodedSet[Any, Any]
) -> None:
    """Nothing is left out silently: a line on stderr for each side of which something is. Call it when the run is open, so
    that a mistake of the user's stays one line."""
    for side, encoded, unusable in (("training", train, records.unusable), ("held-out", heldout, {})):
        reasons = Counter(encoded.dropped) + Counter(unusable)
        if reasons:
            told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
            total = len(encoded.items) + sum(reasons.values())
            print(f"{side} records: {len(encoded.items)} of {total} used; left out: {told}", file=sys.stderr)


@gin.register
def sentiment_prompts(
    corpus: SentimentCorpus, part: str = "prompts", sentiment: str = "positive", limit: int | None = None
) -> Records:
    """Openings of labelled sentences to continue, as plain text (as ``train``). part: "prompts", or "heldout" to compare
    policies on; the reward is fitted on neither. sentiment: "positive", "negative" or "both"."""
    prompts = opening_prompts(corpus, part, sentiment)
    return Records(prompts[:limit], [], Template(style="raw"), files=tuple(corpus.files.values()))


# ---- rewards

ScoreTexts = Callable[[Sequence[Mapping[str, Any]], Sequence[str], Sequence[bool]], dict[str, list[float]]]
"""(prompt rows with "id", responses, ended) -> named scores, one number per response."""


@gin.register
def desk_gold() -> ScoreTexts:
    """The support desk's exact scorer: "gold" and "gold/COMPONENT" in [0, 1]."""
    return support_desk.score


@gin.register
def in_processes(score: ScoreTexts, workers: int = 2, seconds: float = 30.0) -> ScoreTexts:
    """``score`` of every response by itself in one of ``workers`` processes; one that takes longer than ``seconds``, or
    fails, stops the run with the id of its prompt."""
    return RewardPool(score, workers=workers, seconds=seconds)


@gin.register
def sentiment_scores(corpus: SentimentCorpus) -> ScoreTexts:
    """How positive a continuation sounds: "sentiment" (the reward), "second_opinion", "words", "distinct"."""
    return sentiment_scorer(corpus)
