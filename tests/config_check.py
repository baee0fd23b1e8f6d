"""Builds what a config describes and stops before anything is computed. A program, not a test: tests/test_configs.py runs it.

Each line of stdin is a command line of an experiment; each line of stdout its verdict, {"message": "" or what a user would
see, "stages": the command lines of a pipeline's stages}. gin keeps its state for the whole process, so every command gets
a fork of its own.

Builders that read files (all but those of the support desk) are replaced by ones that check their arguments and give
something empty: the files are wherever the macros will say. The support desk makes a few records instead of thousands.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import json
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FEW = 24


class Built(BaseException):
    """Raised in the place of run's body: everything is built. Not an Exception, so that nobody takes it for an error."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


def without_files(register: Callable[..., Any]) -> Callable[..., Any]:
    """gin.register that puts an empty thing in the place of what a function would read from files."""

    def registering(made: Any = None, **named: Any) -> Any:
        if made is None:
            return functools.partial(registering, **named)
        if not inspect.isfunction(made) or made.__name__.startswith("desk_") or made.__name__ == "byte_tokenizer":
            return register(made, **named)
        signature = inspect.signature(made)

        @functools.wraps(made)
        def empty(*arguments: Any, **keywords: Any) -> Any:
            signature.bind(*arguments, **keywords)
            room = sys.modules["rlhf_jax.config.surface"]
            kinds = {"Records": room.Records([], [], room.Template(style="raw")), "Reward": room.support_desk.score}
            return kinds[made.__annotations__["return"]]

        empty.__signature__ = signature  # type: ignore[attr-defined]
        return register(empty, **named)

    return registering


def in_place_of(run: Callable[..., None]) -> Callable[..., None]:
    """A function that gin calls as it would call ``run``. It checks the bindings, as run's first line does, and stops."""
    signature = inspect.signature(run)

    def build(*arguments: Any, **keywords: Any) -> None:
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        parsing.bound_config()
        raise Built(bound.arguments)

    functools.update_wrapper(build, run)
    build.__annotations__ = typing.get_type_hints(run)  # resolved where run was written, not here
    build.__signature__ = signature  # type: ignore[attr-defined]
    del build.__wrapped__  # type: ignore[attr-defined]  # the launcher takes this for run's body
    return build


def without_run(configurable: Callable[..., Any]) -> Callable[..., Any]:
    """gin.configurable that registers a stand-in for an experiment's ``run``."""
    return lambda made: configurable(in_place_of(made) if made.__name__ == "run" else made)


gin.register = without_files(gin.register)
gin.configurable = without_run(gin.configurable)

import jax  # noqa: E402

from rlhf_jax import learn, models  # noqa: E402
from rlhf_jax.algorithms.models import refuse_tokenizer  # noqa: E402
from rlhf_jax.config import parsing, surface  # noqa: E402, F401
from rlhf_jax.data import (  # noqa: E402
    record_builders,
    support_desk_replies,
)
from rlhf_jax.io.source import ModelSource  # noqa: E402
from rlhf_jax.launch import launching  # noqa: E402


def few(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda desk, split, start, count: make(desk, split, start, min(count, FEW))


for name in ("corpus_text", "demonstration_records", "prompt_records"):
    setattr(record_builders, name, few(getattr(support_desk_replies, name)))


def load(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location("experiment", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiment"] = module
    spec.loader.exec_module(module)
    return module


def look_into(arguments: dict[str, Any]) -> None:
    """Models and optimisers as shapes. Raises where they do not fit together."""
    steps, batch, ppo = arguments.get("steps", 1), arguments.get("batch"), arguments.get("ppo")
    params: Any = {"kernel": jax.ShapeDtypeStruct((2, 2), "float32")}
    matrices: Any = {"kernel": True}
    for source in arguments.values():
        if isinstance(source, ModelSource) and source.config is not None:
            refuse_tokenizer(source.config, source.tokenizer)
            params, matrices = models.Model(source.config).abstract(), models.Model(source.config).matrices()
    for optimizer in arguments.values():
        if isinstance(optimizer, learn.OptimizerConfig):
            jax.eval_shape(learn.make_optimizer(optimizer, steps, matrices=matrices).init, params)
    if ppo is not None:
        jax.eval_shape(lambda rng: learn.minibatch_indices(rng, batch.batch_size, ppo), jax.random.key(0))


def check(argv: list[str]) -> dict[str, Any]:
    module = load(Path(argv[0]))
    sys.modules["__main__"] = module  # what --help would show, and where a toy finds itself
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            code = launching._launch(module.run, argv)
        return {"message": told.getvalue() or f"ended with exit code {code}", "stages": []}
    except Built as built:
        arguments = built.arguments
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}", "stages": []}
    try:
        look_into(arguments)
        if "stages" not in arguments:
            return {"message": "", "stages": []}
        stages, seed = arguments["stages"], arguments["seed"]
        module.check(stages, seed)
        return {"message": "", "stages": [module.command(stage, Path("pipeline"), seed)[1:] for stage in stages]}
    except ValueError as error:  # InputError is one
        return {"message": str(error), "stages": []}


def main() -> None:
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, json.dumps(check(json.loads(line))).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        print(
            text or json.dumps({"message": "the check itself failed; run tests/config_check.py", "stages": []}),
            flush=True,
        )


if __name__ == "__main__":
    main()
