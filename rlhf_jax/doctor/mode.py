"""Checks of a training configuration before it costs days. Nothing is trained; its run directory stays untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import data
from rlhf_jax.algorithms import Algorithm, assemble
from rlhf_jax.algorithms.rehearsal import Rehearsal
from rlhf_jax.doctor.disk import disk_checks
from rlhf_jax.doctor.findings import Finding, judge
from rlhf_jax.doctor.numbers import gradient_check, memory_check, probe_check, timed_steps
from rlhf_jax.doctor.rollouts import rollout_checks
from rlhf_jax.doctor.text import arithmetic_check, template_check, text_checks, token_checks, vocabulary_check
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.io import largest_token, locate
from rlhf_jax.loop import LoopConfig
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.rewards import Scores
from rlhf_jax.rundir import fetch


def examine(
    algorithm: Algorithm[Any], *, mesh: MeshConfig, steps: int, seed: int, run_dir: str, loop: LoopConfig
) -> None:
    """Print a line for each check: ok, note, or WRONG with the remedy. Raises RunStopped when something is wrong."""
    findings: list[Finding] = []

    def show(finding: Finding) -> None:
        findings.append(finding)
        print(f"{finding.verdict:5}  {finding.check}: {finding.words}", flush=True)

    try:
        job = assemble(algorithm, mesh=make_mesh(mesh), steps=steps, seed=seed, run_dir=run_dir)
        state = _show_checks(job, steps, seed, show)
        for finding in disk_checks(state, Path(run_dir).expanduser().absolute(), loop):
            show(finding)
    except InputError as error:  # the program itself would refuse; what was seen before it stays on the screen
        show(Finding("WRONG", "refused", str(error)))
    wrong = [finding.check for finding in findings if finding.verdict == "WRONG"]
    if wrong:
        raise RunStopped(f"doctor: {len(wrong)} of {len(findings)} checks: {', '.join(wrong)}")
    print(f"nothing wrong in {len(findings)} checks")


def _show_checks(job: Any, steps: int, seed: int, show: Callable[[Finding], None]) -> Any:
    """Show every check of a job; return a state of it, as a checkpoint would hold it."""
    for finding in (*_model_checks(job), *_data_checks(job, steps)):
        show(finding)
    rehearsal: Rehearsal = job.rehearse(seed)
    for finding in _number_checks(job, rehearsal, steps, seed):
        show(finding)
    return rehearsal.state()


def _model_checks(job: Any) -> Iterator[Finding]:
    trained = next(iter(job.loaded.values()))
    yield vocabulary_check(largest_token(trained.tokenizer)[0] + 1, trained.model.config.vocab_size)
    if len(job.models) > 1:
        yield Finding("ok", "tokenizers", f"one vocabulary: {', '.join(job.models)}")
    form = data.Form(job.data.records.template, trained.tokenizer)
    for role, model in job.loaded.items():
        if role == "reward" and model.input is not None:
            yield probe_check(locate(model.input).path, model.model, model.params)
        if role in job.templates_compared:
            difference = model.template_difference(form, responses=job.templates_compared[role])
            yield template_check(job.role_names.get(role, role), model.template is not None, difference)


def _data_checks(job: Any, steps: int) -> Iterator[Finding]:
    facts, tokenizer = job.data_facts(), next(iter(job.loaded.values())).tokenizer
    if facts.documents is not None:
        yield from text_checks(facts.documents, facts.left_out, tokenizer, facts.template, facts.length, facts.pairs)
    else:
        yield from token_checks(facts.prompts, tokenizer)
    if facts.heldout is not None:
        yield Finding("note" if facts.note else "ok", "held-out records", f"{facts.heldout}{facts.note}")
    yield arithmetic_check(facts.examples, facts.examples_a_step, steps)


def _number_checks(job: Any, rehearsal: Rehearsal, steps: int, seed: int) -> Iterator[Finding]:
    yield memory_check(job.state, job.frozen)
    for name, columns in rehearsal.text_scores.items():
        failed = any(column.failed for column in columns.values())
        words = ", ".join(_describe_column(key, column) for key, column in sorted(columns.items()))
        yield Finding("note" if failed else "ok", name, words)
        key = rehearsal.keys.get(name)
        if key is not None:
            yield judge("reward_key", key in columns, repr(key), f"one of {', '.join(sorted(columns))}")
    if rehearsal.rollout is not None:
        yield from rollout_checks(rehearsal.rollout.metrics, rehearsal.rollout.limits, rehearsal.rollout.max_new_tokens)
    if rehearsal.gradient is not None:
        rng = jax.random.key(seed, impl="threefry2x32")
        loss, params, batch, frozen, microbatches = rehearsal.gradient
        yield gradient_check(loss, params, batch, microbatches, rng, frozen)
    yield timed_steps(rehearsal.step, steps)
    values = [value for value in fetch(rehearsal.step()).values() if value is not None]
    finite = bool(np.isfinite(values).all())
    yield judge("first steps", finite, "finite numbers", "a number is not finite: lower the learning rate")


def _describe_column(key: str, column: Scores) -> str:
    """Describe a column of scores: 'gold 0.5', and why some responses have no score."""
    mean = "no score" if column.mean is None else f"{column.mean:.3g}"
    return f"{key} {mean}" + (f" ({column.failed} failed: {column.reason})" if column.failed else "")
