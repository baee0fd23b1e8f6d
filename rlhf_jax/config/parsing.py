"""gin at the root of a program, and only there: parsing, unused bindings, changes that are allowed on resume.

Only this file, ``configurables.py`` and the experiments import gin.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import inspect
import os
import sys
import tokenize
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin
from absl import flags
from gin import config_parser

from rlhf_jax.config.gin_errors import Binding, Name, explain_parse, selectors_match
from rlhf_jax.config.gin_reach import Reachable, find_reachable
from rlhf_jax.config.gin_types import effective_bindings, wrong_type
from rlhf_jax.errors import InputError
from rlhf_jax.messages import without_secrets
from rlhf_jax.storage.files import read_text
from rlhf_jax.storage.shipped import ROOT

MAY_CHANGE = (
    "run.run_dir",
    "run.steps",
    "run.iterations",
    "LoopConfig.*",
    "Fault.*",
    "MeshConfig.*",
    "run.mesh",
    "run.rollout_mesh",
    "run.offload_optimizer",
)
"""Keys (without scope) that a resumed run may change; every other key is part of the identity of the run."""


@dataclass(frozen=True)
class BoundConfig:
    """The configuration of a run as gin text, without passwords in URLs; it is recorded, and compared on resume.

    config: every binding. operative: every value in use, with defaults.
    """

    config: str
    operative: str


@dataclass(frozen=True)
class Change:
    """A key whose value differs between two configurations; None stands for "not there"."""

    key: str
    old: Any
    new: Any

    @property
    def allowed(self) -> bool:
        return any(fnmatch.fnmatchcase(self.key.rsplit("/", 1)[-1], pattern) for pattern in MAY_CHANGE)


class _ReadOnly:
    """A delegate of gin's parser that returns references and macros as names, without resolving them."""

    def configurable_reference(self, selector: str, evaluate: bool) -> Name:
        return Name(f"@{selector}{'()' if evaluate else ''}")

    def macro(self, name: str) -> Name:
        return Name(f"%{name}")


# ---- reading


def _find(file: str) -> Path | None:
    """Return the path of a gin file, relative to the working directory or else to the repository; None when missing."""
    return next((path for path in (Path(file), ROOT / file) if path.is_file()), None)


def _statements(text: str, place: Callable[[int, str], str]) -> Iterator[tuple[Any, str]]:
    """Yield (statement, place) of gin text. Raises InputError at a place that is not gin."""
    try:
        for statement in config_parser.ConfigParser(text, _ReadOnly()):
            yield statement, place(statement.location.line_num, statement.location.line_content)
    except tokenize.TokenError as error:
        raise InputError(f"{place(error.args[1][0], '')}: cannot read gin: {error.args[0]}") from error
    except SyntaxError as error:
        location = place(error.lineno or 0, error.text or "")
        raise InputError(f"{location}: cannot read gin: {error.msg} ({(error.text or '').strip()!r})") from error
    except ValueError as error:
        raise InputError(f"{place(0, '')}: cannot read gin: {error}") from error


def _everywhere(place: str) -> Callable[[int, str], str]:
    """Return what names ``place`` for every line."""
    return lambda _line, _text: place


def _binding(statement: Any, place: str, included: bool) -> Binding:
    return Binding(statement.scope, statement.selector, statement.arg_name, statement.value, place, included)


def _scan_file(file: str, origin: str, stack: tuple[str, ...] = ()) -> list[Binding]:
    path = _find(file)
    if path is None:
        raise InputError(
            f"{origin}: no such gin file {file!r}; paths are relative to the working directory ({Path.cwd()})"
        )
    if file in stack:
        raise InputError(f"{origin}: {file!r} includes itself; remove the include")
    scanned: list[Binding] = []
    for statement, place in _statements(read_text(path, "give a gin file"), lambda line, _: f"{file}:{line}"):
        if isinstance(statement, config_parser.IncludeStatement):
            scanned += _scan_file(statement.filename, place, (*stack, file))
        elif isinstance(statement, config_parser.BindingStatement):
            scanned.append(_binding(statement, place, included=bool(stack)))
    return scanned


def scan(files: Sequence[str], bindings: Sequence[str]) -> list[Binding]:
    """Return every binding of ``files`` (includes followed) and ``bindings`` in gin's order, each with its place.

    Raises InputError naming file and line when a file is missing or is not gin.
    """
    scanned = [binding for file in files for binding in _scan_file(file, f"--gin_file={file}")]
    for text in bindings:
        for statement, place in _statements(text, _everywhere(f"--gin_bindings={text!r}")):
            if isinstance(statement, config_parser.BindingStatement):
                scanned.append(_binding(statement, place, included=False))
    return scanned


def fingerprint_bindings(scanned: Sequence[Binding]) -> str:
    """Return the sha256 of the effective bindings; places, comments, order and overridden bindings are ignored."""
    bindings, macros = effective_bindings(scanned, lambda selector: selector)
    lines = [f"{b.scope}/{b.selector}.{b.argument} = {b.value!r}\n" for b in bindings]
    lines += [f"{name} = {value!r}\n" for name, value in macros.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def key_to_bind(scanned: Sequence[Binding], parameter: str) -> str:
    """Return the key to bind so that ``parameter`` gets another value: the macro that it is bound to, or else itself.

    With ``run.seed = %SEED`` the key is SEED: binding run.seed would leave the macro unused, and other readers of the
    macro would keep the old value.
    """
    macros = {b.selector: b.value for b in scanned if not b.argument and not b.scope}
    values = [b.value for b in scanned if not b.scope and f"{b.selector}.{b.argument}" == parameter]
    key, value = parameter, values[-1] if values else None
    while isinstance(value, Name) and value.text[0] == "%" and value.text[1:] in macros:
        key = value.text[1:]
        value = macros.pop(key)
    return key


def _configurables() -> list[str]:
    registry = gin.config._REGISTRY  # gin has no public listing
    return [registry.minimal_selector(selector) for selector, _ in registry.items() if not selector.startswith("gin.")]


def _parameters(configurable: str) -> list[str]:
    # Not gin.get_configurable: what gin wraps around a class has the signature (*args, **kwargs).
    return list(inspect.signature(gin.config._REGISTRY.get_match(configurable).wrapped).parameters)


def _wrapped(configurable: str) -> Any:
    """Return the class or function of a selector; None for one that is not in the registry (gin's own)."""
    match = gin.config._REGISTRY.get_match(configurable)
    return match and match.wrapped


def _hints(configurable: str) -> dict[str, Any]:
    """Return {parameter: annotation}, with "return" for a function."""
    target = _wrapped(configurable)
    is_plain_class = isinstance(target, type) and not dataclasses.is_dataclass(target)
    return typing.get_type_hints(target.__init__ if is_plain_class else target) if target else {}


def _returns(reference: Name) -> Any:
    """Return the type that '@scope/X()' returns."""
    selector = reference.text.strip("@()").rsplit("/", 1)[-1]
    target = _wrapped(selector)
    return target if isinstance(target, type) else _hints(selector).get("return", Any)


def _check_argument_types(scanned: Sequence[Binding]) -> None:
    """Check every value against the annotation of its parameter. Raises InputError for the first that does not fit."""

    bindings, macros = effective_bindings(scanned, _complete_selector)
    for binding in bindings:
        message = wrong_type(binding, macros, _hints(binding.selector).get(binding.argument, Any), _returns)
        if message:
            raise InputError(message)


def parse(files: Sequence[str], bindings: Sequence[str]) -> list[Binding]:
    """Parse and lock the gin configuration; return its bindings with their places.

    Bindings of replaced builders (`replaced_bindings`) are left out and reported on stderr.
    Raises InputError (one line) for unknown names and for values of another type than the parameter's annotation.
    """
    scanned = scan(files, bindings)
    gin.add_config_file_search_path(str(ROOT))
    # Files only: gin also takes 'configs/x.gin' for a resource of a Python package "configs", and fails on our folder.
    gin.config._FILE_READERS = [(open, os.path.isfile)]
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=False, skip_unknown=False)
        unused = replaced_bindings(scanned)
        for b in unused:
            gin.config._CONFIG[b.scope, _complete_selector(b.selector)].pop(b.argument)  # gin has no function for this
        gin.finalize()
    except Exception as error:
        raise InputError(explain_parse(str(error), scanned, _configurables(), _parameters)) from error
    _check_argument_types(scanned)
    if unused:
        names = "; ".join(f"{b.place}: {'/'.join(filter(None, (b.scope, b.selector)))}.{b.argument}" for b in unused)
        print(f"left out, since what they belong to was replaced: {names}", file=sys.stderr)
    return scanned


# ---- unused bindings


def _from_text(text: str) -> dict[tuple[str, str, str], Any]:
    """Return {(scope, selector, argument): value} of a gin text such as ``gin.config_str()``. A macro x is ('', x, '')."""
    return {
        (s.scope, s.selector, s.arg_name): s.value
        for s, _ in _statements(text, lambda line, _: f"config line {line}")
        if isinstance(s, config_parser.BindingStatement)
    }


def _is_used(key: tuple[str, str, str], used_keys: Iterable[tuple[str, str, str]]) -> bool:
    """Return whether a binding is used. A scope inherits from its prefixes: a binding of scope a is used when a/b uses it."""
    scope, *name = key
    return any(
        name == list(other) and (not scope or f"{inner}/".startswith(scope + "/")) for inner, *other in used_keys
    )


def bound_config() -> BoundConfig:
    """Return the configuration of this run; call it on the first line of ``run``.

    Raises InputError that names every unused binding: a key that is bound and never read, which gin ignores silently.
    Only eager references (``@X()``) are used, so on the first line of ``run`` every object is built and all reads are done.
    An unused macro is an error as well, except when all its definitions are in included files: a shared file may define
    more than a run needs, but a definition in the run's own file or on the command line is meant to have an effect.
    """
    config, operative = gin.config_str(), gin.operative_config_str()
    used_keys = _from_text(operative)
    scanned = scan(flags.FLAGS.gin_file, flags.FLAGS.gin_bindings) if flags.FLAGS.is_parsed() else []
    unused_keys = []
    for key in _from_text(config):
        sources = [
            b for b in scanned if b.scope == key[0] and b.argument == key[2] and selectors_match(b.selector, key[1])
        ]
        is_shared_macro = not key[2] and sources and all(b.included for b in sources)
        if not _is_used(key, used_keys) and not is_shared_macro:
            name = "/".join(filter(None, key[:2])) + ("." + key[2] if key[2] else " (macro)")
            unused_keys.append(f"{sources[-1].place}: {name}" if sources else name)
    if unused_keys:
        raise InputError(
            f"{'; '.join(unused_keys)}: bound but nothing reads it; remove it or reference its object, '@...()'"
        )
    return BoundConfig(without_secrets(config), without_secrets(operative))


def unused_bindings(scanned: Sequence[Binding]) -> list[Binding]:
    """Return the bindings that no run would read, as `bound_config` reports them, without building anything.

    Only eager references are used, so a run reads what is reachable from ``run`` through references and macros.
    """
    bindings, _ = effective_bindings(scanned, _complete_selector)
    reachable = _reachable(scanned)
    ignored = replaced_bindings(scanned)
    unused = [b for b in bindings if b not in reachable.bindings and b not in ignored]
    own = {"/".join(filter(None, (b.scope, b.selector))): b for b in scanned if not b.argument and not b.included}
    return unused + [b for name, b in own.items() if name not in reachable.macros]


def replaced_bindings(scanned: Sequence[Binding]) -> list[Binding]:
    """Return the bindings of included files for builders whose reference a later binding replaced (``run.records = @other()``).

    They are left out, so that the including file need not unbind them one by one.
    """
    macros: dict[str, list[Any]] = {}
    for b in scanned:
        if not b.argument:
            macros.setdefault("/".join(filter(None, (b.scope, b.selector))), []).append(b.value)
    referenced = find_reachable([b for b in scanned if b.argument], macros, _complete_selector).bindings
    reachable = _reachable(scanned).bindings
    return [
        b
        for b in effective_bindings(scanned, _complete_selector)[0]
        if b.included and b in referenced and b not in reachable
    ]


def _reachable(scanned: Sequence[Binding]) -> Reachable:
    """Return the bindings and macros that a run reads."""
    bindings, macros = effective_bindings(scanned, _complete_selector)
    return find_reachable(bindings, {name: [value] for name, value in macros.items()}, _complete_selector)


def _complete_selector(selector: str) -> str:
    """Return the complete selector of a partial one; the same text when unknown."""
    match = gin.config._REGISTRY.get_match(selector)
    return str(match.selector) if match else selector


def bound_reference(parameter: str) -> str | None:
    """Return the name, with its scope, of the configurable that ``parameter`` ("run.mesh") is bound to; None for no reference."""
    try:
        name: str = gin.query_parameter(parameter).scoped_selector
    except (ValueError, AttributeError):  # not bound, or to no configurable
        return None
    return name


def clear_bindings() -> None:
    """Clear the bindings of `parse`, so that another configuration can be parsed in this process."""
    gin.clear_config()


# ---- comparing


def bound_values(text: str) -> dict[str, Any]:
    """Return {'scope/selector.argument': value} of a gin text with the macros replaced by their values."""
    raw = _from_text(text)
    macros = {"/".join(filter(None, key[:2])): value for key, value in raw.items() if not key[2]}

    def expand(value: Any) -> Any:
        if isinstance(value, Name):
            return expand(macros[value.text[1:]]) if value.text[1:] in macros and value.text[0] == "%" else value
        if isinstance(value, dict):
            return {expand(k): expand(v) for k, v in value.items()}
        return type(value)(map(expand, value)) if isinstance(value, list | tuple) else value

    return {f"{'/'.join(filter(None, key[:2]))}.{key[2]}": expand(value) for key, value in raw.items() if key[2]}


def changes(old: str, new: str) -> list[Change]:
    """Return the keys whose values differ between two gin texts, macros expanded.

    Compare operative texts: an explicit default then equals an unbound one, and a default that the code has changed
    since is reported. ``lr = 1e-3; O.lr = %lr`` and ``O.lr = 0.001`` are equal.
    """
    before, after = bound_values(old), bound_values(new)
    keys = sorted(before.keys() | after.keys())
    return [
        Change(k, before.get(k), after.get(k))
        for k in keys
        if k not in before or k not in after or before[k] != after[k]
    ]
