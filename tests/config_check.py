"""Build the objects that a config describes and stop before anything is computed. A program that tests/test_configs.py runs.

Each line of stdin is a command line of an experiment; each line of stdout its result, {"message": "" or the error for the
user, "stages": the command lines of a pipeline's stages}. gin has global state, so every command runs in its own fork.

Builders of records and rewards read no files before a run is assembled, so the paths in the macros need not exist.

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
from absl import flags

ROOT = Path(__file__).resolve().parents[1]
FEW = 24
sys.path.insert(0, str(ROOT))


class Built(BaseException):
    """Raised instead of running an experiment's body: everything is built. Not an Exception, so that no handler catches it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


NEEDED = ("run_dir", "steps", "seed", "loop", "records", "prompts")
"""Parameters that a run needs and a plan does not."""


def check_missing(arguments: dict[str, Any]) -> None:
    missing = [name for name in NEEDED if name in arguments and arguments[name] is None]
    if missing and flags.FLAGS.plan is None:
        raise InputError(f"run.{missing[0]}: has no value")


def make_stand_in(run: Callable[..., None]) -> Callable[..., None]:
    """Return a function with the signature of ``run`` that checks the bindings, as run's first line does, and stops."""
    signature = inspect.signature(run)

    def build(*arguments: Any, **keywords: Any) -> None:
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        parsing.bound_config()
        check_missing(bound.arguments)
        raise Built(bound.arguments)

    functools.update_wrapper(build, run)
    build.__annotations__ = typing.get_type_hints(run)  # resolved where run was written, not here
    build.__signature__ = signature  # type: ignore[attr-defined]
    del build.__wrapped__  # type: ignore[attr-defined]  # the launcher takes this for run's body
    return build


def replace_run(configurable: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap gin.configurable to register a stand-in for an experiment's ``run``."""
    return lambda function: configurable(make_stand_in(function) if function.__name__ == "run" else function)


gin.configurable = replace_run(gin.configurable)

import jax  # noqa: E402

from rlhf_jax import learn, models  # noqa: E402
from rlhf_jax.algorithms.models import check_tokenizer  # noqa: E402
from rlhf_jax.config import parsing, surface  # noqa: E402, F401
from rlhf_jax.data import support_desk_responses, tokenizer_builders  # noqa: E402
from rlhf_jax.errors import InputError  # noqa: E402
from rlhf_jax.io.source import ModelSource  # noqa: E402
from rlhf_jax.launch import launching  # noqa: E402


def short_corpus(desk: Any, split: str, start: int, count: int) -> Any:
    """Return a few documents, for tokenizers that are trained while a config is built."""
    return support_desk_responses.corpus_text(desk, split, start, min(count, FEW))


tokenizer_builders.corpus_text = short_corpus


def load(script: Path) -> Any:
    spec = importlib.util.spec_from_file_location("experiment", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiment"] = module
    spec.loader.exec_module(module)
    return module


def check_shapes(arguments: dict[str, Any]) -> None:
    """Build models and optimizers as shapes. Raises when they do not fit together."""
    steps, batch, ppo = arguments.get("steps") or 1, arguments.get("batch"), arguments.get("ppo")
    params: Any = {"kernel": jax.ShapeDtypeStruct((2, 2), "float32")}
    matrices: Any = {"kernel": True}
    for source in arguments.values():
        if isinstance(source, ModelSource) and source.config is not None:
            check_tokenizer(source.config, source.tokenizer)
            params, matrices = models.Model(source.config).abstract(), models.Model(source.config).matrices()
    for optimizer in arguments.values():
        if isinstance(optimizer, learn.OptimizerConfig):
            jax.eval_shape(learn.make_optimizer(optimizer, steps, matrices=matrices).init, params)
    if ppo is not None:
        jax.eval_shape(lambda rng: learn.minibatch_indices(rng, batch.batch_size, ppo), jax.random.key(0))


def check(argv: list[str]) -> dict[str, Any]:
    module = load(Path(argv[0]))
    sys.modules["__main__"] = module  # what --help would show, and where a toy finds itself
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            code = launching._launch(module.run, argv)
        return {"message": stderr.getvalue() or f"ended with exit code {code}", "stages": []}
    except Built as built:
        arguments = built.arguments
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}", "stages": []}
    try:
        check_shapes(arguments)
        if "stages" not in arguments:
            return {"message": "", "stages": []}
        stages, seed = arguments["stages"], arguments["seed"]
        module.check_bindings = lambda commands: None  # whoever asks looks at each stage by itself
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
