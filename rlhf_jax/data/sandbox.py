"""Chat templates in Jinja's sandbox, with a bound on steps and characters, without clock and randomness.

A chat template is a program that comes with a model. Jinja's sandbox bars it from files and from Python; here it also
cannot run without end, fill the memory, or write text that depends on the time. The text equals that of transformers
(``apply_chat_template``): the same syntax extensions, filters and variables.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from typing import Any

from jinja2 import Template as JinjaTemplate
from jinja2 import TemplateError, Undefined, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 1_000_000
"""The limit of loop rounds, filters and list items of a rendering (a call counts ten times), besides a thousand for every
item of the conversation."""
CHARACTERS = 20_000_000
"""The limit of characters of a rendering, in all its texts together, besides a hundred for every character of the
conversation."""
_CALL = 10
_WIDEST = 10_000
"""The largest width, indentation or count that a filter or method takes."""
_LONGEST_NUMBER = 4096
"""Bits of the largest whole number."""

_WIDE_FORMAT = re.compile(r"\{[^{}]*(\d{5}|\{)|%[^a-zA-Z%]*(\d{5}|\*)")
_PLAIN = (str, int, float, bool, type(None), Undefined)
_CONTAINERS = (list, tuple, dict)
# Filters that read the items of a list without copying their contents.
_LOOKING = ("length", "count", "default", "d", "first", "last", "map", "list", "reverse", "items", "attr")
_CHOOSING = ("select", "reject", "selectattr", "rejectattr")
_SHALLOW = frozenset((*_LOOKING, *_CHOOSING))
_SIZED_FILTERS = frozenset(
    ("center", "indent", "wordwrap", "truncate", "batch", "slice", "round", "format", "tojson", "urlize")
)
_SIZED_METHODS = frozenset(["center", "ljust", "rjust", "zfill", "expandtabs"])


class OutOfBounds(TemplateError):
    """The error of a template with more steps, or longer texts, than any conversation needs."""


class _Meter:
    """The remaining steps and characters of a rendering."""

    def __init__(self, steps: int = STEPS, characters: int = CHARACTERS) -> None:
        self.steps, self.characters = steps, characters

    def extend_by(self, data: Any) -> None:
        """Extend the limits for a rendering of ``data``."""
        size = _Meter(sys.maxsize, sys.maxsize)
        size.measure(data)
        self.steps += 1000 * (sys.maxsize - size.steps)
        self.characters += 100 * (sys.maxsize - size.characters)

    def spend(self, steps: int = 1, characters: int = 0) -> None:
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0:
            raise OutOfBounds(f"it takes more than {STEPS:,} steps")
        if self.characters < 0:
            raise OutOfBounds(f"it makes more than {CHARACTERS:,} characters")

    def measure(self, *values: Any) -> None:
        """Subtract a step for every item inside ``values``, and their characters."""
        pending = list(values)
        while pending:
            value = pending.pop()
            self.spend(1, len(value) if isinstance(value, str) else 0)
            if isinstance(value, dict):
                pending.extend(value)
                pending.extend(value.values())
            elif isinstance(value, list | tuple):
                pending.extend(value)


_METER: ContextVar[_Meter] = ContextVar("meter")


def render(source: str, variables: Mapping[str, Any], date: datetime.date | None) -> str:
    """Render ``source`` with ``variables``. date: the date of ``strftime_now``; None refuses a template that calls it.

    Raises TemplateError, with a reason on one line, for any error in a template.
    """

    def strftime_now(pattern: str) -> str:
        if date is None:
            raise TemplateError("it writes today's date, which would change from day to day: set Template.date")
        if len(pattern) > _WIDEST:
            raise OutOfBounds(f"it writes a date in more than {_WIDEST:,} characters")
        return datetime.datetime.combine(date, datetime.time()).strftime(pattern)

    def run() -> str:
        _METER.get().extend_by(dict(variables))
        return compile_template(source).render({**variables, "strftime_now": strftime_now})

    return str(_run_guarded(run))


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> JinjaTemplate:
    """Compile ``source``. Raises TemplateError."""
    program: JinjaTemplate = _run_guarded(lambda: _Environment().from_string(source))
    return program


@functools.lru_cache(maxsize=16)
def variables_of(source: str) -> frozenset[str]:
    """Return the names that ``source`` reads and does not set: messages, tools, its switches. Raises TemplateError."""
    names: set[str] = _run_guarded(lambda: meta.find_undeclared_variables(_Environment().parse(source)))
    return frozenset(names)


@functools.lru_cache(maxsize=16)
def literals_of(source: str) -> str:
    """Return the string literals of ``source``, joined with a NUL between them. Raises TemplateError."""

    def read() -> str:
        tree = _Environment().parse(source)
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        return "\0".join(texts + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)])

    return str(_run_guarded(read))


def _run_guarded(run: Callable[[], Any]) -> Any:
    token = _METER.set(_Meter())
    try:
        return run()
    except OutOfBounds:
        raise
    except Exception as error:  # a template's author can cause any: ZeroDivisionError, RecursionError, MemoryError, ...
        words = " ".join(str(error).split()) or type(error).__name__
        reason = "".join(character if character.isprintable() else repr(character)[1:-1] for character in words)
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise TemplateError(f"{kind}{reason[:200]}") from None
    finally:
        _METER.reset(token)


class _Bounds(NodeTransformer):
    """Counting of loops, containers and concatenations, for which the sandbox has no hooks."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _wrap_in_filter(node.iter, "(rounds)")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _wrap_in_filter(nodes.List(node.nodes, lineno=node.lineno), "(concatenation)")

    def _container(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # the names that {% set a, b = ... %} sets
            return node
        return _wrap_in_filter(node, "(container)")

    visit_List = visit_Tuple = visit_Dict = _container


def _wrap_in_filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """The tag ``{% generation %}``, with which templates mark the model's text; its body is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write_body"), [], [], body).set_lineno(line)

    def _write_body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """The ``dict`` of a template, which only creates new ones."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """The ``namespace`` of a template, without names that Python reserves."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *positional = args
        values = dict(*positional, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateError(f"a namespace cannot hold {name!r}")


class _Environment(ImmutableSandboxedEnvironment):
    """The Jinja environment of transformers, with every operation counted that can be long or large."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.finalize = _check_output
        self.filters["tojson"] = _tojson
        del self.filters["random"]
        del self.globals["lipsum"]
        self.filters = {name: _count_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"(rounds)": _count_rounds, "(concatenation)": _concatenate, "(container)": _container}
        self.globals |= {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _Namespace}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        bounded = _Bounds().visit(source).set_environment(self)
        return super()._generate(bounded, *args, **kwargs)

    def concat(self, pieces: Iterable[str]) -> str:
        meter, parts = _METER.get(), []
        for piece in pieces:
            meter.spend(0, len(piece))
            parts.append(piece)
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, first: Any, second: Any) -> Any:
        meter = _METER.get()
        if isinstance(first, str) and operator == "%":
            _check_format(first)
            meter.measure(second)
        elif operator == "*" and isinstance(second, Sized):
            first, second = second, first
        if isinstance(first, Sized):
            length = len(first) * max(second, 1) if operator == "*" else len(first)
            length += len(second) if isinstance(second, Sized) else 0
            meter.spend(0, length) if isinstance(first, str) else meter.spend(length)
        elif isinstance(first, int) and isinstance(second, int):
            bits = first.bit_length() * second if operator == "**" else first.bit_length() + second.bit_length()
            if bits > _LONGEST_NUMBER:
                raise OutOfBounds(f"it computes a number of more than {_LONGEST_NUMBER:,} bits")
        return _measure_result(super().call_binop(context, operator, first, second), deep=False)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.spend(_CALL)
        name, text = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if isinstance(__obj, LoopContext):
            args = (_count_rounds(args[0]), *args[1:]) if args else args
        elif name in ("format", "format_map"):
            _check_format(getattr(getattr(__obj, "__wrapped__", None), "__self__", ""))
            meter.measure(*args, kwargs)
        elif isinstance(text, str):
            args = _bound_method(meter, name, text, args)
        return _measure_result(super().call(__context, __obj, *args, **kwargs))


def _bound_method(meter: _Meter, name: str, text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Count a call of a method of ``text`` and return its arguments. Raises OutOfBounds when the result would be too long."""
    if name in _SIZED_METHODS:
        _check_sizes(args)
        meter.spend(0, text.count("\t") * max([size for size in args if isinstance(size, int)], default=8))
    elif name == "replace" and len(args) > 1:
        meter.spend(0, _replaced_length(text, args[0], args[1]))
    elif name == "join" and args:
        items = _list_items(args[0])
        meter.measure(items)
        meter.spend(0, len(text) * len(items))
        return (items, *args[1:])
    elif name == "translate" and args and isinstance(args[0], dict):
        meter.spend(0, len(text) * max((len(new) for new in args[0].values() if isinstance(new, str)), default=1))
    return args


def _count_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the filter ``name`` so that its arguments and its result are counted."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or the environment come before the value

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        meter.spend()
        before, values = args[:first], list(args[first:])
        if name in _SHALLOW:
            meter.spend(sum(len(value) for value in values if isinstance(value, _CONTAINERS)))
        elif values:
            if isinstance(values[0], Iterator):
                values[0] = list(values[0])
            meter.measure(*values, kwargs)
        if name in _SIZED_FILTERS:
            _check_sizes((*values[1:], *kwargs.values()))
        if values:
            _check_filter(meter, name, values, kwargs)
        return _measure_result(function(*before, *values, **kwargs), deep=name not in _SHALLOW)

    return bounded


def _check_filter(meter: _Meter, name: str, values: list[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise OutOfBounds before a filter makes a text that is too long."""
    text, options = values[0], [*values[1:], *kwargs.values()]
    if name == "format":
        _check_format(str(text))
    elif name == "replace" and len(options) > 1:
        meter.spend(0, _replaced_length(str(text), str(options[0]), str(options[1])))
    elif name in ("join", "indent", "wordwrap", "tojson"):
        # each of these writes an option between, or before, the pieces of the text
        widths = [len(option) if isinstance(option, str) else option for option in options]
        widest = max([width for width in widths if isinstance(width, int)], default=1)
        pieces = len(text) if isinstance(text, Sized) else 1
        if name in ("indent", "wordwrap"):
            pieces = str(text).count("\n") + 1 if name == "indent" else len(str(text))
            widest = widest if name == "indent" else max([len(o) for o in options if isinstance(o, str)], default=1)
        if name == "tojson" and widest > 100:
            raise OutOfBounds("it indents JSON by more than 100 columns")
        meter.spend(0, pieces * widest)


def _check_sizes(values: Iterable[Any]) -> None:
    if any(isinstance(value, int | float) and abs(value) > _WIDEST for value in values):
        raise OutOfBounds(f"it asks for a width or a count above {_WIDEST:,}")


def _check_format(pattern: str) -> None:
    if _WIDE_FORMAT.search(pattern):
        raise OutOfBounds(f"it formats with a width above {_WIDEST:,}, or one that is computed")


def _replaced_length(text: str, old: str, new: str) -> int:
    """Bound the number of characters of ``text.replace(old, new)``."""
    return len(text) + text.count(old) * len(new)


def _list_items(value: Any) -> list[Any]:
    return list(_count_rounds(value))


def _count_rounds(value: Any) -> Any:
    """Return ``value`` as an iterable that counts each round of a loop."""
    meter = _METER.get()
    if isinstance(value, Sized):
        meter.spend(len(value))
        return value

    def counted() -> Iterator[Any]:
        for item in value:
            meter.spend()
            yield item

    return counted()


def _concatenate(values: list[Any]) -> str:
    return str(_measure_result("".join(str(_check_output(value)) for value in values)))


def _container(value: Any) -> Any:
    _METER.get().measure(value)
    return value


def _measure_result(value: Any, *, deep: bool = True) -> Any:
    """Count the characters and items of ``value`` and return it."""
    if isinstance(value, str):
        _METER.get().spend(0, len(value))
    elif deep and isinstance(value, _CONTAINERS):
        _METER.get().measure(value)
    return value


def _check_output(value: Any) -> Any:
    """Check that ``value`` may be written out, and return it.

    Raises TemplateError for a function, a macro or a namespace, whose text would contain an address that changes from
    process to process.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, _CONTAINERS):
        return _container(value)
    if not isinstance(value, _PLAIN):
        raise TemplateError(f"it writes out a {type(value).__name__}, which is no text")
    return value


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Write JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
