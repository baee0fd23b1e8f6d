"""The keys that a gin file may bind for an experiment: type, default, meaning, and where they are defined."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.storage.shipped import ROOT, script_path

REQUIRED = "required"


@dataclasses.dataclass(frozen=True)
class Key:
    """A gin key. default: as Python writes it, or `REQUIRED`. place: 'rlhf_jax/learn/ppo.py:31'."""

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
    keys, pending, done = keys_of("run", run), list(CONFIGURABLES), {"run"}
    types = " ".join(key.type for key in keys)
    while matching := [entry for entry in pending if _accepted(entry, types)]:
        pending = [entry for entry in pending if entry not in matching]
        for entry in sorted(matching, key=lambda entry: str(entry.__name__)):
            more = keys_of(entry.__name__, entry)
            keys += more
            types += " " + " ".join(key.type for key in more)
            done.add(entry.__name__)
    return keys


def configurable_keys() -> dict[str, list[Key]]:
    """Return the keys of every configurable of config/surface.py by its name."""
    from rlhf_jax.config.surface import CONFIGURABLES

    return {entry.__name__: keys_of(entry.__name__, entry) for entry in CONFIGURABLES}


def run_function(experiment: str) -> Callable[..., Any]:
    """Load the script of an experiment and return its run(). Raises InputError for an unknown one, ValueError without a run()."""
    namespace = runpy.run_path(str(script_path(experiment)), run_name=f"described_{experiment}")
    if "run" not in namespace:
        raise ValueError(f"{experiment}: has no run()")
    run: Callable[..., Any] = inspect.unwrap(namespace["run"])
    return run


def keys_of(selector: str, configurable: Any) -> list[Key]:
    """List the keys of one configurable (a frozen dataclass or a function) with the meanings that its docstring gives."""
    target = inspect.unwrap(configurable)
    parameters = inspect.signature(target).parameters.values()
    shown = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    meanings = field_meanings(inspect.getdoc(target) or "", [parameter.name for parameter in shown])
    place = _place(target)
    return [
        Key(
            selector=selector,
            parameter=parameter.name,
            type=_type_text(parameter.annotation),
            default=REQUIRED if parameter.default is inspect.Parameter.empty else _default_text(parameter.default),
            meaning=meanings.get(parameter.name, ""),
            place=place,
        )
        for parameter in shown
    ]


def field_meanings(docstring: str, names: Sequence[str]) -> dict[str, str]:
    """Return what a docstring says of each field, from passages such as 'steps: iterations. seed, rng: of the run.'"""
    if not names:
        return {}
    anywhere = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    heading = re.compile(rf"(?:(?<=^)|(?<=[\s(;]))(?:{anywhere})(?:(?:, | and )(?:{anywhere}))*: ", re.MULTILINE)
    matches = list(heading.finditer(docstring))
    meanings: dict[str, str] = {}
    for match, following in zip(matches, [*matches[1:], None], strict=True):
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
    return any(re.search(rf"\b{re.escape(name)}\b", types) for name in re.findall(r"\w+", returned) if name[0].isupper())


def _type_text(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def _default_text(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    return getattr(value, "__name__", None) or repr(value)


def _place(target: Any) -> str:
    file = Path(inspect.getsourcefile(target) or "")
    line = inspect.getsourcelines(target)[1]
    base = next((base for base in (ROOT, ROOT.parent.parent) if file.is_relative_to(base)), file.parent)
    return f"{file.relative_to(base).as_posix()}:{line}"


def as_rows(keys: Iterable[Key]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (key, type, default, meaning, place) of each key, for tables."""
    for key in keys:
        yield key.name, key.type, key.default, key.meaning, key.place
