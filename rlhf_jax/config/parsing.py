"""gin at the root of a program, and only there: parsing, dead bindings, what may change on resume.

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

from rlhf_jax.config.gin_errors import Binding, Name, explain_parse, same_selector
from rlhf_jax.config.gin_reach import Read, reached
from rlhf_jax.config.gin_types import settled, wrong_type
from rlhf_jax.errors import InputError
from rlhf_jax.messages import without_secrets
from rlhf_jax.storage.files import read_text

REPOSITORY = Path(__file__).resolve().parents[2]
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
"""Keys (without scope) that a resumed run may change; every other key is part of what the run IS."""


@dataclass(frozen=True)
class BoundConfig:
    """What a run was asked for, as gin text, without passwords in URLs: it is written down and compared.

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
    """What gin's parser asks about names, answered without looking anything up."""

    def configurable_reference(self, selector: str, evaluate: bool) -> Name:
        return Name(f"@{selector}{'()' if evaluate else ''}")

    def macro(self, name: str) -> Name:
        return Name(f"%{name}")


# ---- reading


def _find(file: str) -> Path | None:
    """A gin path is relative to the working directory or else to the repository."""
    return next((path for path in (Path(file), REPOSITORY / file) if path.is_file()), None)


def _statements(text: str, place: Callable[[int, str], str]) -> Iterator[tuple[Any, str]]:
    """(statement, place) of gin text. Raises InputError at a place that is not gin."""
    try:
        for statement in config_parser.ConfigParser(text, _ReadOnly()):
            yield statement, place(statement.location.line_num, statement.location.line_content)
    except tokenize.TokenError as error:
        raise InputError(f"{place(error.args[1][0], '')}: cannot read gin: {error.args[0]}") from error
    except SyntaxError as error:
        where = place(error.lineno or 0, error.text or "")
        raise InputError(f"{where}: cannot read gin: {error.msg} ({(error.text or '').strip()!r})") from error
    except ValueError as error:
        raise InputError(f"{place(0, '')}: cannot read gin: {error}") from error


def _everywhere(place: str) -> Callable[[int, str], str]:
    """Return what names ``place`` for every line."""
    return lambda _line, _text: place


def _binding(statement: Any, place: str, included: bool) -> Binding:
    return Binding(statement.scope, statement.selector, statement.arg_name, statement.value, place, included)


def _scan_file(file: str, asked_at: str, stack: tuple[str, ...] = ()) -> list[Binding]:
    path = _find(file)
    if path is None:
        raise InputError(
            f"{asked_at}: no such gin file {file!r}; paths are relative to the working directory ({Path.cwd()})"
        )
    if file in stack:
        raise InputError(f"{asked_at}: {file!r} includes itself; remove the include")
    found: list[Binding] = []
    for statement, place in _statements(read_text(path, "give a gin file"), lambda line, _: f"{file}:{line}"):
        if isinstance(statement, config_parser.IncludeStatement):
            found += _scan_file(statement.filename, place, (*stack, file))
        elif isinstance(statement, config_parser.BindingStatement):
            found.append(_binding(statement, place, included=bool(stack)))
    return found


def scan(files: Sequence[str], bindings: Sequence[str]) -> list[Binding]:
    """Every binding of ``files`` (includes followed) and ``bindings`` in gin's order, each with its place.

    Raises InputError naming file and line when a file is missing or is not gin.
    """
    found = [binding for file in files for binding in _scan_file(file, f"--gin_file={file}")]
    for text in bindings:
        for statement, place in _statements(text, _everywhere(f"--gin_bindings={text!r}")):
            if isinstance(statement, config_parser.BindingStatement):
                found.append(_binding(statement, place, included=False))
    return found


def fingerprint_asked(scanned: Sequence[Binding]) -> str:
    """sha256 of what bindings ask for: places, comments, order and overridden bindings do not count."""
    bindings, macros = settled(scanned, lambda selector: selector)
    lines = [f"{b.scope}/{b.selector}.{b.argument} = {b.value!r}\n" for b in bindings]
    lines += [f"{name} = {value!r}\n" for name, value in macros.items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def settable(scanned: Sequence[Binding], parameter: str) -> str:
    """What to bind so that ``parameter`` gets another value: the macro it is given, or else itself.

    With ``run.seed = %SEED`` that is SEED: binding run.seed would leave the macro dead, and whatever else reads it as
    it was.
    """
    macros = {b.selector: b.value for b in scanned if not b.argument and not b.scope}
    values = [b.value for b in scanned if not b.scope and f"{b.selector}.{b.argument}" == parameter]
    found, value = parameter, values[-1] if values else None
    while isinstance(value, Name) and value.text[0] == "%" and value.text[1:] in macros:
        found = value.text[1:]
        value = macros.pop(found)
    return found


def _configurables() -> list[str]:
    registry = gin.config._REGISTRY  # gin has no public listing
    return [registry.minimal_selector(selector) for selector, _ in registry.items() if not selector.startswith("gin.")]


def _parameters(configurable: str) -> list[str]:
    # Not gin.get_configurable: what gin wraps around a class has the signature (*args, **kwargs).
    return list(inspect.signature(gin.config._REGISTRY.get_match(configurable).wrapped).parameters)


def _wrapped(configurable: str) -> Any:
    """The class or function behind a selector; None for what is not in the registry (gin's own)."""
    found = gin.config._REGISTRY.get_match(configurable)
    return found and found.wrapped


def _hints(configurable: str) -> dict[str, Any]:
    """{parameter: annotation}, and "return" of a function."""
    made = _wrapped(configurable)
    is_plain_class = isinstance(made, type) and not dataclasses.is_dataclass(made)
    return typing.get_type_hints(made.__init__ if is_plain_class else made) if made else {}


def _returns(reference: Name) -> Any:
    """What '@scope/X()' gives."""
    selector = reference.text.strip("@()").rsplit("/", 1)[-1]
    made = _wrapped(selector)
    return made if isinstance(made, type) else _hints(selector).get("return", Any)


def _check_argument_types(scanned: Sequence[Binding]) -> None:
    """Raises InputError at the first binding whose value is not of its parameter's type."""

    bindings, macros = settled(scanned, _full)
    for binding in bindings:
        message = wrong_type(binding, macros, _hints(binding.selector).get(binding.argument, Any), _returns)
        if message:
            raise InputError(message)


def parse(files: Sequence[str], bindings: Sequence[str]) -> list[Binding]:
    """Parse and lock the gin configuration; returns its bindings with their places.

    Unknown names are errors, never skipped; so are values of another type than the parameter's annotation. Keys that
    `replaced` names are left out and reported on stderr. Raises InputError (one line).
    """
    scanned = scan(files, bindings)
    gin.add_config_file_search_path(str(REPOSITORY))
    # Files only: gin also takes 'configs/x.gin' for a resource of a Python package "configs", and fails on our folder.
    gin.config._FILE_READERS = [(open, os.path.isfile)]
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=False, skip_unknown=False)
        unused = replaced(scanned)
        for b in unused:
            gin.config._CONFIG[b.scope, _full(b.selector)].pop(b.argument)  # gin takes no binding back
        gin.finalize()
    except Exception as error:
        raise InputError(explain_parse(str(error), scanned, _configurables(), _parameters)) from error
    _check_argument_types(scanned)
    if unused:
        names = "; ".join(f"{b.place}: {'/'.join(filter(None, (b.scope, b.selector)))}.{b.argument}" for b in unused)
        print(f"left out, since what they belong to was replaced: {names}", file=sys.stderr)
    return scanned


# ---- dead bindings


def _from_text(text: str) -> dict[tuple[str, str, str], Any]:
    """{(scope, selector, argument): value} of a gin text such as ``gin.config_str()``. A macro x is ('', x, '')."""
    return {
        (s.scope, s.selector, s.arg_name): s.value
        for s, _ in _statements(text, lambda line, _: f"config line {line}")
        if isinstance(s, config_parser.BindingStatement)
    }


def _is_live(key: tuple[str, str, str], used: Iterable[tuple[str, str, str]]) -> bool:
    """A scope inherits from its prefixes: the binding of scope a (or of none) is in use when a/b uses it."""
    scope, *rest = key
    return any(rest == list(other) and (not scope or f"{inner}/".startswith(scope + "/")) for inner, *other in used)


def bound_config() -> BoundConfig:
    """The configuration of this run; call it on the first line of ``run``.

    Raises InputError naming every DEAD binding: a key that was bound and that nothing reads, which gin ignores
    silently. Only eager references (``@X()``) are used, so on run's first line every object of the run is built and
    what has not been read never will be. A macro nobody reads is dead as well, except when all its definitions are in
    included files: a shared file may define more than one run needs, but what the run's own file or the command line
    defines is meant to have an effect.
    """
    config, operative = gin.config_str(), gin.operative_config_str()
    used = _from_text(operative)
    scanned = scan(flags.FLAGS.gin_file, flags.FLAGS.gin_bindings) if flags.FLAGS.is_parsed() else []
    dead = []
    for key in _from_text(config):
        sources = [
            b for b in scanned if b.scope == key[0] and b.argument == key[2] and same_selector(b.selector, key[1])
        ]
        is_shared_macro = not key[2] and sources and all(b.included for b in sources)
        if not _is_live(key, used) and not is_shared_macro:
            name = "/".join(filter(None, key[:2])) + ("." + key[2] if key[2] else " (macro)")
            dead.append(f"{sources[-1].place}: {name}" if sources else name)
    if dead:
        raise InputError(f"{'; '.join(dead)}: bound but nothing reads it; remove it or reference its object, '@...()'")
    return BoundConfig(without_secrets(config), without_secrets(operative))


def unread(scanned: Sequence[Binding]) -> list[Binding]:
    """The bindings that no run would read: `bound_config`'s dead ones, found without building anything.

    Only eager references are used, so what is read is what can be reached from ``run`` through references and macros.
    """
    bindings, _ = settled(scanned, _full)
    read = _read(scanned)
    left_out = replaced(scanned)
    dead = [b for b in bindings if b not in read.bindings and b not in left_out]
    own = {"/".join(filter(None, (b.scope, b.selector))): b for b in scanned if not b.argument and not b.included}
    return dead + [b for name, b in own.items() if name not in read.macros]


def replaced(scanned: Sequence[Binding]) -> list[Binding]:
    """The keys of included files for builders that would be read if no later binding had replaced a reference to them
    (``run.records = @other()``): nobody has to unbind them one by one."""
    macros: dict[str, list[Any]] = {}
    for b in scanned:
        if not b.argument:
            macros.setdefault("/".join(filter(None, (b.scope, b.selector))), []).append(b.value)
    referenced = reached([b for b in scanned if b.argument], macros, _full).bindings
    read = _read(scanned).bindings
    return [b for b in settled(scanned, _full)[0] if b.included and b in referenced and b not in read]


def _read(scanned: Sequence[Binding]) -> Read:
    """What a run reads."""
    bindings, macros = settled(scanned, _full)
    return reached(bindings, {name: [value] for name, value in macros.items()}, _full)


def _full(selector: str) -> str:
    """The complete selector of a partial one; itself when unknown."""
    match = gin.config._REGISTRY.get_match(selector)
    return str(match.selector) if match else selector


def bound_reference(parameter: str) -> str | None:
    """Return the name, with its scope, of the configurable that ``parameter`` ("run.mesh") is bound to; None for no reference."""
    try:
        name: str = gin.query_parameter(parameter).scoped_selector
    except (ValueError, AttributeError):  # not bound, or to no configurable
        return None
    return name


def forget_bindings() -> None:
    """Take back what `parse` bound, so that another configuration can be parsed in this process."""
    gin.clear_config()


# ---- comparing


def bound_values(text: str) -> dict[str, Any]:
    """{'scope/selector.argument': value} of a gin text with the macros replaced by their values."""
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
    """The keys whose values differ between two gin texts, macros expanded.

    Give it operative texts: a default written out then equals the default left alone, and a default that the code has
    changed since shows. ``lr = 1e-3; O.lr = %lr`` and ``O.lr = 0.001`` are equal.
    """
    before, after = bound_values(old), bound_values(new)
    keys = sorted(before.keys() | after.keys())
    return [
        Change(k, before.get(k), after.get(k))
        for k in keys
        if k not in before or k not in after or before[k] != after[k]
    ]
