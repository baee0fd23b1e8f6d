"""Models as an experiment uses them: loaded on their shards, with adapters, written down so that the run can be loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rlhf_jax.data import Form, Template, end_ids, form_difference, response_ends
from rlhf_jax.errors import InputError
from rlhf_jax.io import (
    Location,
    adapter_card,
    check_vocabulary,
    describe_pretrained,
    largest_token,
    load_pretrained,
    locate,
    read_generation,
    read_template,
)
from rlhf_jax.io.source import ModelSource
from rlhf_jax.models import Head, LoraConfig, Model, ModelConfig, int8, lora
from rlhf_jax.parallel import ActivationConstraint, abstract_arrays, init_sharded, replicated, tree_shardings
from rlhf_jax.parallel.overview import parameter_summary, parameter_table
from rlhf_jax.storage.files import json_text, write_atomically
from rlhf_jax.storage.inputs import Input
from rlhf_jax.storage.names import CARD, PARAMETERS, TOKENIZER
from rlhf_jax.types import Params, Rng


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to use. input: what provenance records (None for a new model); revision: its commit on the hub.

    frozen: {}, or with adapters {"base": ...}; params are then the adapters and the scalar head (`models.lora`).
    generation: the generation config of the model's source (`io.read_generation`). template: of the conversations that it
    learned from, None when nothing says so. compared: whether that must be the template of the data.
    """

    model: Model
    params: Params
    tokenizer: PreTrainedTokenizerBase
    input: str | None
    revision: str | None = None
    frozen: Params = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: Template | None = None
    compared: bool = True

    def without_params(self) -> Loaded:
        """Return the model without the parameters that are trained, so that the state of a run holds the only copy of them."""
        return dataclasses.replace(self, params={})

    def as_inputs(self, name: str) -> list[Input]:
        """List what provenance records of the model, under ``name``."""
        return [] if self.input is None else [Input(name, self.input, self.revision)]

    def base(self, head: Head) -> Loaded:
        """The frozen base of an adapted model by itself, under ``head``: the same arrays, no copy."""
        model = dataclasses.replace(self.model, lora=None).with_head(head)
        return dataclasses.replace(self, model=model, params=self.frozen["base"], frozen={})

    def template_difference(self, used: Form, *, responses: bool) -> str | None:
        """Say how the model learned to write conversations otherwise than ``used``; None when it did not, when nothing says
        how it learned, and when its source allows it (`ModelSource.other_template`).

        Of a model whose template is not known, chat templates are compared. responses: as in `data.form_difference`.
        """
        learned = self.template
        if learned is None and used.template.style == "chat" and self.tokenizer.chat_template:
            learned = used.template
        if not self.compared or learned is None:
            return None
        return form_difference(Form(learned, self.tokenizer), used, responses=responses)

    def check_template(
        self, used: Form, *, responses: bool, remedy: str = "set ModelSource.other_template = True"
    ) -> None:
        """Raises InputError when the model learned from conversations that are written otherwise than ``used``."""
        if difference := self.template_difference(used, responses=responses):
            raise InputError(
                f"{self.input}: learned from conversations of another template than these are written with: {difference}; "
                f"write these as it learned them, or {remedy}"
            )

    def check_max_length(self, tokens: int, what: str) -> None:
        """Raises InputError when sequences of ``tokens`` are longer than the model's max_length: rotary positions past
        it give numbers, and nonsense. what: the keys that decide the length."""
        limit = self.model.config.max_length
        if tokens > limit:
            raise InputError(f"{what}: sequences of {tokens} tokens; the model's max_length is {limit}")


def write_model_card(
    run_dir: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    subtree: str = "params",
    base: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Make a run directory loadable as a model: model.json (configuration, where the checkpoint holds the parameters, the
    template of the conversations it was trained on, the generation config of its base with everything that ends a response,
    of adapters also their settings and ``base``, the path of the model under them) and tokenizer/."""
    if jax.process_index():
        return
    card: dict[str, Any] = {"config": json.loads(model.config.to_json()), "subtree": subtree}
    card["template"] = dataclasses.asdict(template)
    ends = response_ends(tokenizer, template, generation)
    card["generation"] = {**(generation or {}), "eos_token_id": list(ends.ids)}
    if model.lora is not None:
        assert base is not None
        card["adapter"] = adapter_card(model.lora, base)
    write_atomically(run_dir / CARD, json_text(card, indent=2, sort_keys=True))
    tokenizer.save_pretrained(run_dir / TOKENIZER)


def check_tokenizer(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, path: str | None = None) -> None:
    """Raises InputError for a tokenizer that the model cannot be trained with. It needs no padding token (`padding_id`).

    path: of a model that exists; None for a new one, whose vocabulary can be chosen.
    """
    if path is not None:
        check_vocabulary(tokenizer, config.vocab_size, path)
    index, token = largest_token(tokenizer)
    if index >= config.vocab_size:
        raise InputError(
            f"ModelConfig.vocab_size = {config.vocab_size}: the tokenizer has token id {index} ({token!r}); set at least "
            f"{index + 1}"
        )
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer: has no end-of-sequence token; name one as eos_token in its tokenizer_config.json")


def load_model(source: ModelSource, head: Head, mesh: Mesh, rng: Rng | None) -> Loaded:
    """The model under ``head``, on its shards. A scalar head that the checkpoint lacks is drawn from ``rng`` (None: refused).

    A reward model (head "scalar") that keeps reward_normalisation.json gets gain and bias folded into its head.
    """
    if source.config is not None:
        model = Model(source.config.replace(head=head), ActivationConstraint(mesh))
        check_tokenizer(model.config, source.tokenizer)
        shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
        return Loaded(model, init_sharded(model.init, shardings, mesh, rng), source.tokenizer, None)
    assert source.path is not None
    location = locate(source.path)
    model, params, tokenizer = load_pretrained(
        source.path, mesh=mesh, head=head, param_dtype=source.param_dtype, max_length=source.max_length, rng=rng
    )
    model = dataclasses.replace(model, config=adapted(model.config, source))
    set_pad_token(tokenizer, source)
    check_tokenizer(model.config, tokenizer, source.path)
    check_finite(params, source.path, mesh)
    generation = source_generation(model.config, location, source.path)
    return Loaded(
        model,
        params,
        tokenizer,
        source.path,
        location.revision,
        generation=generation,
        template=read_template(location.path),
        compared=not source.other_template,
    )


def source_generation(config: ModelConfig, location: Location, path: str) -> dict[str, Any]:
    """The generation config of a model's source. Raises InputError for end ids that the model does not have: it would never
    stop there, and its export would be refused after the training."""
    generation = read_generation(location)
    if outside := [end for end in end_ids(generation) if end >= config.vocab_size]:
        raise InputError(
            f"{path}: eos_token_id of its generation config: {outside} are no ids below vocab_size = {config.vocab_size}; "
            "correct generation_config.json (or config.json where there is none)"
        )
    return generation


def set_pad_token(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Make ``source.pad_token``, when it is given, the padding token. Raises InputError for one outside the vocabulary."""
    if source.pad_token is None:
        return
    if source.pad_token not in tokenizer.get_vocab():
        raise InputError(f"ModelSource.pad_token = {source.pad_token!r}: not in the vocabulary of {source.path}")
    tokenizer.pad_token = source.pad_token


def check_finite(params: Params, path: str, mesh: Mesh) -> None:
    """Raises InputError for weights that are NaN or infinite, with the name of the first: whatever is sampled, scored or
    trained with them is nothing."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    floats = [(name, leaf) for name, leaf in paths if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not floats:
        return
    counts = jax.device_get(_count_not_finite([leaf for _, leaf in floats], replicated(mesh)))
    for (name, leaf), count in zip(floats, counts.tolist(), strict=True):
        if count:
            at = jax.tree_util.keystr(name, simple=True, separator="/")
            raise InputError(
                f"{path}: the model's numbers are not finite: {int(count)} of {leaf.size} weights of {at} are NaN or infinite; "
                "take a checkpoint from before they were"
            )


@functools.partial(jax.jit, static_argnums=1)
def _count_not_finite(leaves: list[jax.Array], everywhere: jax.sharding.Sharding) -> jax.Array:
    counts = jnp.stack([(~jnp.isfinite(leaf)).sum(dtype=jnp.float32) for leaf in leaves])
    placed: jax.Array = jax.lax.with_sharding_constraint(counts, everywhere)
    return placed


def adapted(config: ModelConfig, source: ModelSource) -> ModelConfig:
    """``config`` of a saved model with what ``source`` wants otherwise."""
    chosen = {name: getattr(source, name) for name in ("compute_dtype", "remat", "logits_chunk", "attention")}
    return config.replace(**{name: value for name, value in chosen.items() if value is not None})


def with_adapters(loaded: Loaded, settings: LoraConfig | None, mesh: Mesh, rng: Rng) -> Loaded:
    """``loaded`` with fresh adapters to train, everything else frozen; itself when ``settings`` is None.

    The scalar head of a reward or value model is trained whole. Works on shapes too. Raises InputError for a new model
    (shapes may be of one: a plan needs sizes alone).
    """
    if settings is None:
        return loaded
    planned = isinstance(jax.tree.leaves(loaded.params)[0], jax.ShapeDtypeStruct)
    if loaded.input is None and not planned:
        raise InputError("run.lora: a new model is no base for adapters; give ModelSource.path")
    loaded = with_base_dtype(loaded, settings, mesh)
    model = dataclasses.replace(loaded.model, lora=settings)
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    base, trained = lora.split(loaded.params)

    def fresh(rng: Rng) -> Params:
        adapters = lora.split(model.init(rng))[1]
        return {name: tree for name, tree in adapters.items() if name != lora.HEAD}

    if planned:
        drawn = jax.eval_shape(fresh, rng)
        at = {name: lora.split(shardings)[1][name] for name in drawn}
        struct: Any = jax.ShapeDtypeStruct
        adapters = jax.tree.map(lambda leaf, sharding: struct(leaf.shape, leaf.dtype, sharding=sharding), drawn, at)
    else:
        adapters = init_sharded(fresh, shardings, mesh, rng)
    return dataclasses.replace(loaded, model=model, params=adapters | trained, frozen={"base": base})


def with_base_dtype(loaded: Loaded, settings: LoraConfig, mesh: Mesh) -> Loaded:
    """``loaded``, which nothing trains, with its matrices as ``settings.base_dtype`` says; itself when they are so already.
    Works on shapes too."""
    if not settings.int8 or loaded.model.int8:
        return loaded
    model = dataclasses.replace(loaded.model, int8=True)
    like = model.abstract()
    shardings = tree_shardings(like, model.logical_axes(), mesh)
    if isinstance(jax.tree.leaves(loaded.params)[0], jax.ShapeDtypeStruct):
        return dataclasses.replace(loaded, model=model, params=abstract_arrays(like, shardings))
    return dataclasses.replace(loaded, model=model, params=int8.quantized_tree(loaded.params, like, shardings))


def load_reward(source: ModelSource, mesh: Mesh) -> Loaded:
    """A trained reward model. Raises InputError for one without a scalar head of its own: it would score at random."""
    if source.config is not None:
        raise InputError("ModelSource.config: a new reward model scores at random; give path, a run of train_reward")
    return load_model(source, "scalar", mesh, None)


def plan_model(source: ModelSource, head: Head, mesh: Mesh, rng: Rng | None = None) -> Loaded:
    """As `load_model`, with ShapeDtypeStructs on their shards for parameters: nothing is read but headers, nothing drawn."""
    del rng
    generation: dict[str, Any] = {}
    if source.config is not None:
        config, tokenizer = source.config.replace(head=head), source.tokenizer
    else:
        assert source.path is not None
        saved, tokenizer = describe_pretrained(source.path, max_length=source.max_length)
        config = adapted(saved.replace(head=head, param_dtype=source.param_dtype or saved.param_dtype), source)
        set_pad_token(tokenizer, source)
        generation = source_generation(config, locate(source.path), source.path)
    check_tokenizer(config, tokenizer, source.path)
    model = Model(config, ActivationConstraint(mesh))
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh)
    params = abstract_arrays(model.abstract(), shardings)
    return Loaded(model, params, tokenizer, source.path, generation=generation)


def plan_reward(source: ModelSource, mesh: Mesh) -> Loaded:
    """As `load_reward`, see `plan_model`; a new model will do."""
    return plan_model(source, "scalar", mesh)


def write_overview(run_dir: Path, trained: Params, frozen: Params) -> None:
    """Write parameters.txt, a summary and a line for each array; print the summary on stderr."""
    trees = {"trained": trained} | ({"frozen": frozen} if jax.tree.leaves(frozen) else {})
    if jax.process_index() == 0:
        summary = parameter_summary(trees)
        print(summary, file=sys.stderr)
        write_atomically(run_dir / PARAMETERS, f"{summary}\n\n{parameter_table(trees)}")
