"""The command line of `rlhf-jax`: a verb for each experiment, and those that list, describe and create configurations."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable

import click

import rlhf_jax
from rlhf_jax.cli.listing import config_rows, experiment_rows
from rlhf_jax.errors import InputError
from rlhf_jax.messages import one_line
from rlhf_jax.storage.shipped import config_path, experiments, script_path

TRAINING = tuple(name for name in experiments() if name.startswith("train_"))
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def start(experiment: str, arguments: list[str]) -> None:
    """Run the script of an experiment in place of this process: its flags, messages and exit codes are the command's."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", str(script_path(experiment)), *arguments])


def script_arguments(words: list[str]) -> list[str]:
    """Translate --config NAME and --set KEY=VALUE to the flags of the scripts; every other word is passed on.

    Raises InputError for an unknown configuration and for a flag without its value.
    """
    arguments, remaining = [], iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "--set"):
            arguments.append(word)
            continue
        if not equals:
            value = next(remaining, "")
        if not value:
            raise InputError(f"{flag}: give it a value")
        arguments.append(
            f"--gin_file={config_path(value)}" if flag == "--config" else f"--gin_bindings={binding(value)}"
        )
    return arguments


def binding(text: str) -> str:
    """Return KEY=VALUE as a gin binding.

    A value that is neither a Python literal nor a reference (@X(), %X, also inside brackets) is a text: 'run.run_dir=runs/x'.
    Raises InputError for anything that is not KEY=VALUE.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {text}: give KEY=VALUE, for instance PPOConfig.kl_coefficient=0.05")
    value = value.strip()
    if value and value[0] in "@%([{":
        return f"{key.strip()} = {value}"
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = repr(value)
    return f"{key.strip()} = {value}"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rlhf_jax.__version__, prog_name="rlhf-jax")
def cli() -> None:
    """Train language models from human feedback in JAX.

    `rlhf-jax list` shows experiments and configurations. A verb such as train-ppo starts the experiment of that name:

        rlhf-jax train-ppo --config support_desk/ppo --set PPOConfig.kl_coefficient=0.05

    --config takes a shipped configuration or a gin file, --set binds one key. Every other flag is the script's own;
    `rlhf-jax train-ppo --help` lists them.
    """


def _add_experiment(name: str, words: str) -> None:
    @cli.command(name.replace("_", "-"), help=words, short_help=words, context_settings=PASS_ON)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def experiment_command(arguments: tuple[str, ...]) -> None:
        start(name, script_arguments(list(arguments)))


for _name, _words in experiment_rows():
    if _name not in ("doctor", "plan"):
        _add_experiment(_name, _words)


def _add_mode(verb: str, translate: Callable[[list[str]], list[str]], words: str) -> None:
    @cli.command(verb, help=words, short_help=words, context_settings=PASS_ON)
    @click.argument("experiment")
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def mode_command(experiment: str, arguments: tuple[str, ...]) -> None:
        name = experiment.replace("-", "_")
        if name not in TRAINING:
            raise InputError(f"{verb} {experiment}: name a training experiment: {', '.join(TRAINING)}")
        start(name, script_arguments(translate(list(arguments))))


def plan_flags(words: list[str]) -> list[str]:
    """Translate --slice to the --plan of the scripts. Raises InputError without it."""
    flags = [word.partition("=")[0] for word in words]
    if "--slice" not in flags:
        raise InputError("plan: give --slice, for instance --slice=v5p:2x2x4, or --slice=local")
    return [
        word.replace("--slice", "--plan", 1) if flag == "--slice" else word
        for word, flag in zip(words, flags, strict=True)
    ]


_add_mode(
    "doctor",
    lambda words: ["--doctor", *words],
    "Check configuration, data and one step of a training experiment.",
)
_add_mode("preview", lambda words: ["--preview=3", *words], "Show the first examples as the model sees them.")
_add_mode("plan", plan_flags, "Compile a training experiment for a TPU slice, and say whether it fits.")


@cli.command("list")
def list_command() -> None:
    """List experiments, and configurations with their first comment."""
    from rlhf_jax.cli.tables import print_rows

    print_rows("experiments", experiment_rows())
    print_rows("configurations", config_rows())


@cli.command()
@click.argument("experiment")
@click.argument("pattern", default="")
def describe(experiment: str, pattern: str) -> None:
    """List every key of an experiment with type, default, meaning and place. PATTERN: only keys that contain it."""
    from rlhf_jax.cli.tables import print_keys
    from rlhf_jax.launch.describe import experiment_keys

    keys = [key for key in experiment_keys(experiment) if pattern.lower() in key.name.lower()]
    if not keys:
        raise InputError(f"describe {experiment}: no key contains {pattern!r}")
    print_keys(keys)


@cli.command()
@click.argument("name")
@click.option("--from", "source", required=True, help="A shipped configuration or a gin file to begin from.")
def new(name: str, source: str) -> None:
    """Write NAME.gin: a configuration that begins from another one, with every key and its meaning as comments."""
    from rlhf_jax.cli.new_config import write_config

    print(write_config(name, source))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell: eval "$(rlhf-jax completion bash)"."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(cli, {}, "rlhf-jax", "_RLHF_JAX_COMPLETE").source())


def main() -> None:
    """Run the command. What cannot be used is one line and exit code 2."""
    try:
        cli.main(prog_name="rlhf-jax", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.UsageError as error:
        place = error.ctx.command_path if error.ctx else "rlhf-jax"
        print(f"error: {place}: {one_line(error.format_message())} ({place} --help)", file=sys.stderr)
        sys.exit(2)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        from rlhf_jax.launch.command import error_line, exit_code_for  # late: it imports jax

        print(error_line(error), file=sys.stderr)
        sys.exit(exit_code_for(error))
