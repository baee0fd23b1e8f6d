"""The keys that a gin file may bind for an experiment: type, default, meaning, and where they are defined."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.storage.shipped import ROOT, script_path

REQUIRED = "required"
OF_EVERY_RUN = {
    "run_dir": "the directory of the run; the same command resumes a run that is there",
    "steps": "optimizer steps (iterations of PPO and GRPO) of the whole run",
    "seed": "the seed of initialisation, data order and sampling",
    "records": "the training data, such as @demonstration_file() or @comparison_file()",
    "prompts": "the prompts, such as @prompt_file()",
    "batch": "rows and columns of a batch",
    "optimizer": "learning rate, schedule and moments",
    "policy_optimizer": "learning rate, schedule and moments of the policy",
    "value_optimizer": "learning rate, schedule and moments of the value model",
    "loop": "logging, checkpoints, evaluation and what to do with bad steps",
    "mesh": "how devices are arranged",
    "model": "the model that is trained",
    "policy": "the policy that is trained",
    "reward": "a reward model, the run of train_reward",
    "reward_texts": "a function that scores texts, in place of a reward model",
    "reward_key": "the score of reward_texts that is trained on",
    "monitor": "scores of texts that are logged and not trained on",
    "sampling": "temperature, response length and truncation of the distribution",
    "slots": "continuous batching and the key-value cache of the sampler",
    "rollout_mesh": "the same devices in another shape, for sampling",
    "lora": "train low-rank adapters; None trains every parameter",
    "offload_optimizer": "keep the optimizer state in host memory during rollouts",
    "one_step_off": "sample the next rollout before the update, while texts are judged",
    "share_trunk": "put the value head on the policy's trunk",
    "samples": "responses to each prompt",
    "ppo": "the settings of PPO",
    "grpo": "the settings of GRPO",
    "dpo": "the settings of DPO",
}
"""Meanings of parameters that several experiments share."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A gin key.

    default: as text (its repr, the name of a function, `@Name()` for a dataclass), or `REQUIRED`. place: file and line of the
    configurable that has the key, such as 'rlhf_jax/learn/ppo.py:31'.
    """

    selector: str
    parameter: str
    type: str
    default: str
    meaning: str
    place: str

    @property
    def name(self) -> str:
        """The key as a gin file writes it: 'PPOConfig.kl_coefficient'."""
        return f"{self.selector}.{self.parameter}"


def experiment_keys(experiment: str) -> list[Key]:
    """List the keys of an experiment: those of its run(), then those of every configurable that one of them can take.

    Raises InputError for an unknown experiment.
    """
    from rlhf_jax.config.surface import CONFIGURABLES

    run = run_function(experiment)
    keys = keys_of("run", run)
    pending: list[Any] = list(CONFIGURABLES)
    types = " ".join(key.type for key in keys)
    while matching := [entry for entry in pending if _accepted(entry, types)]:
        pending = [entry for entry in pending if entry not in matching]
        for entry in sorted(matching, key=lambda entry: str(entry.__name__)):
            more = keys_of(entry.__name__, entry)
            keys += more
            types += " " + " ".join(key.type for key in more)
    return keys


def configurable_keys() -> dict[str, list[Key]]:
    """Return the keys of every configurable of config/surface.py by its name."""
    from rlhf_jax.config.surface import CONFIGURABLES

    configurables: list[Any] = list(CONFIGURABLES)
    return {entry.__name__: keys_of(entry.__name__, entry) for entry in configurables}


def run_function(experiment: str) -> Callable[..., Any]:
    """Load the script of an experiment and return its run(). Raises InputError for an unknown one and for one without."""
    script = script_path(experiment)
    functions = {node.name for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)}
    if "run" not in functions:  # running such a script would define its flags in this process
        raise InputError(f"{experiment}: has no keys of gin; its --help lists its flags")
    return _load_run(script)


@functools.cache
def _load_run(script: Path) -> Callable[..., Any]:
    """Load a run() once: gin registers it."""
    namespace = runpy.run_path(str(script), run_name=f"described_{script.stem}")
    run: Callable[..., Any] = inspect.unwrap(namespace["run"])
    return run


def keys_of(selector: str, configurable: Any) -> list[Key]:
    """List the keys of one configurable (a frozen dataclass or a function) with the meanings that its docstring gives."""
    target = inspect.unwrap(configurable)
    parameters = inspect.signature(target).parameters.values()
    named_parameters = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    meanings = field_meanings(inspect.getdoc(target) or "", [parameter.name for parameter in named_parameters])
    place = _place(target)
    return [
        Key(
            selector=selector,
            parameter=parameter.name,
            type=_type_text(parameter.annotation),
            default=REQUIRED if parameter.default is inspect.Parameter.empty else _default_text(parameter.default),
            meaning=meanings.get(parameter.name) or (OF_EVERY_RUN.get(parameter.name, "") if selector == "run" else ""),
            place=place,
        )
        for parameter in named_parameters
    ]


def field_meanings(docstring: str, names: Sequence[str]) -> dict[str, str]:
    """Return what a docstring says of each field, from passages such as 'steps: iterations. seed, rng: of the run.'"""
    if not names:
        return {}
    anywhere = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    heading = re.compile(rf"(?:(?<=^)|(?<=[\s(;]))(?:{anywhere})(?:(?:, | and )(?:{anywhere}))*: ", re.MULTILINE)
    matches = list(heading.finditer(docstring))
    meanings: dict[str, str] = {}
    for match, following in zip(matches, [*matches[1:], None], strict=False):
        end = len(docstring) if following is None else following.start()
        text = docstring[match.end() : end].split("\n\n")[0]
        for name in re.split(r", | and ", match[0].rstrip(": ")):
            meanings.setdefault(name, re.sub(r"\s+", " ", text).strip().rstrip(";"))
    return meanings


def _accepted(entry: Any, types: str) -> bool:
    """Return whether a value of one of these types can come from ``entry``: its class, or what the builder returns."""
    if inspect.isclass(entry):
        return re.search(rf"\b{entry.__name__}\b", types) is not None
    returned = _type_text(inspect.signature(inspect.unwrap(entry)).return_annotation)
    return any(
        re.search(rf"\b{re.escape(name)}\b", types) for name in re.findall(r"\w+", returned) if name[0].isupper()
    )


def _type_text(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def _default_text(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return f"@{type(value).__name__}()"
    return getattr(value, "__name__", None) or repr(value)


def _place(target: Any) -> str:
    file = Path(inspect.getsourcefile(target) or "")
    line = inspect.getsourcelines(target)[1]
    base = next((base for base in (ROOT, ROOT.parent.parent) if file.is_relative_to(base)), file.parent)
    return f"{file.relative_to(base).as_posix()}:{line}"
