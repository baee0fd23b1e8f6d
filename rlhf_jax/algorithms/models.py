"""Models of an experiment: loaded onto their shards, with adapters, and described in the run directory so that it can be loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
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
    """A model ready to use.

    input: its path in the provenance, None for a new model; revision: its commit on the hub.

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
        """Return the frozen base of an adapted model under ``head``, with the same arrays."""
        model = dataclasses.replace(self.model, lora=None).with_head(head)
        return dataclasses.replace(self, model=model, params=self.frozen["base"], frozen={})

    def template_difference(self, form: Form, *, responses: bool) -> str | None:
        """Describe how the conversations that the model was trained on differ from ``form``.

        Returns None when they do not differ, when nothing says how it was trained, and when its source permits it
        (`ModelSource.other_template`). Without a stored template the chat templates are compared. responses: as in
        `data.form_difference`.
        """
        learned = self.template
        if learned is None and form.template.style == "chat" and self.tokenizer.chat_template:
            learned = form.template
        if not self.compared or learned is None:
            return None
        return form_difference(Form(learned, self.tokenizer), form, responses=responses)

    def check_template(
        self, form: Form, *, responses: bool, remedy: str = "set ModelSource.other_template = True"
    ) -> None:
        """Check that the model was trained on conversations written as ``form``. Raises InputError otherwise."""
        if difference := self.template_difference(form, responses=responses):
            raise InputError(
                f"{self.input}: was trained on conversations of another template: {difference}; "
                f"use the template that it was trained with, or {remedy}"
            )

    def check_max_length(self, tokens: int, keys: str) -> None:
        """Check that sequences of ``tokens`` fit the max_length of the model, beyond which rotary positions are meaningless.

        keys: the gin keys that decide the length. Raises InputError otherwise.
        """
        limit = self.model.config.max_length
        if tokens > limit:
            raise InputError(f"{keys}: sequences of {tokens} tokens; the model's max_length is {limit}")


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
    """Check that the model can be trained with the tokenizer, which needs no padding token (`padding_id`).

    path: of an existing model; None for a new one, whose vocabulary can be chosen. Raises InputError otherwise.
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
    """Load the model under ``head`` onto its shards.

    A scalar head that the checkpoint lacks is drawn from ``rng``, or refused when ``rng`` is None. Gain and bias of a reward model
    (head "scalar") with reward_normalisation.json are folded into its head.
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
    """Return the generation config of a model's source.

    Raises InputError for end ids outside the vocabulary: sampling would never stop there, and the export would be refused after the
    training.
    """
    generation = read_generation(location)
    if outside := [end for end in end_ids(generation) if end >= config.vocab_size]:
        raise InputError(
            f"{path}: eos_token_id of its generation config: {outside} are no ids below vocab_size = {config.vocab_size}; "
            "correct generation_config.json (or config.json where there is none)"
        )
    return generation


def set_pad_token(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Set ``source.pad_token`` as the padding token, when there is one. Raises InputError for one outside the vocabulary."""
    if source.pad_token is None:
        return
    if source.pad_token not in tokenizer.get_vocab():
        raise InputError(f"ModelSource.pad_token = {source.pad_token!r}: not in the vocabulary of {source.path}")
    tokenizer.pad_token = source.pad_token


def check_finite(params: Params, path: str, mesh: Mesh) -> None:
    """Check that all weights are finite. Raises InputError with the name of the first array that is not."""
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
    constrained: jax.Array = jax.lax.with_sharding_constraint(counts, everywhere)
    return constrained


def adapted(config: ModelConfig, source: ModelSource) -> ModelConfig:
    """Return ``config`` of a saved model with the fields that ``source`` overrides."""
    chosen = {name: getattr(source, name) for name in ("compute_dtype", "remat", "logits_chunk", "attention")}
    return config.replace(**{name: value for name, value in chosen.items() if value is not None})


def with_adapters(loaded: Loaded, settings: LoraConfig | None, mesh: Mesh, rng: Rng) -> Loaded:
    """Return ``loaded`` with fresh adapters to train and everything else frozen; ``loaded`` itself when ``settings`` is None.

    The scalar head of a reward or value model is trained whole. Works on shapes too. Raises InputError for a new model, except for
    shapes: a plan needs sizes alone.
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
        shapes = jax.eval_shape(fresh, rng)
        at = {name: lora.split(shardings)[1][name] for name in shapes}
        struct: Any = jax.ShapeDtypeStruct
        adapters = jax.tree.map(lambda leaf, sharding: struct(leaf.shape, leaf.dtype, sharding=sharding), shapes, at)
    else:
        adapters = init_sharded(fresh, shardings, mesh, rng)
    return dataclasses.replace(loaded, model=model, params=adapters | trained, frozen={"base": base})


def with_base_dtype(loaded: Loaded, settings: LoraConfig, mesh: Mesh) -> Loaded:
    """Return ``loaded``, which is not trained, with its matrices in ``settings.base_dtype``. Works on shapes too."""
    if not settings.int8 or loaded.model.int8:
        return loaded
    model = dataclasses.replace(loaded.model, int8=True)
    like = model.abstract()
    shardings = tree_shardings(like, model.logical_axes(), mesh)
    if isinstance(jax.tree.leaves(loaded.params)[0], jax.ShapeDtypeStruct):
        return dataclasses.replace(loaded, model=model, params=abstract_arrays(like, shardings))
    return dataclasses.replace(loaded, model=model, params=int8.quantized_tree(loaded.params, like, shardings))


def load_reward(source: ModelSource, mesh: Mesh) -> Loaded:
    """Load a trained reward model. Raises InputError for one without a trained scalar head: it would score at random."""
    if source.config is not None:
        raise InputError("ModelSource.config: a new reward model scores at random; give path, a run of train_reward")
    return load_model(source, "scalar", mesh, None)


def plan_model(source: ModelSource, head: Head, mesh: Mesh, rng: Rng | None = None) -> Loaded:
    """Return the model of `load_model` with shapes for parameters: only headers are read and nothing is drawn."""
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
    """Return the reward model of `load_reward` with shapes for parameters; it may be new."""
    return plan_model(source, "scalar", mesh)


def write_overview(run_dir: Path, trained: Params, frozen: Params) -> str:
    """Write parameters.txt, a summary and a line for each array, and return the summary."""
    trees = {"trained": trained} | ({"frozen": frozen} if jax.tree.leaves(frozen) else {})
    summary = parameter_summary(trees)
    if jax.process_index() == 0:
        write_atomically(run_dir / PARAMETERS, f"{summary}\n\n{parameter_table(trees)}")
    return summary
