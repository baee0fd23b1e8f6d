"""Checks of a training configuration, each a `Finding` with its remedy. `examine` lists them (--doctor)."""

from rlhf_jax.doctor.disk import disk_checks
from rlhf_jax.doctor.findings import Finding, judge
from rlhf_jax.doctor.mode import examine
from rlhf_jax.doctor.numbers import gradient_check, memory_check, probe_check, timed_steps
from rlhf_jax.doctor.preview import preview
from rlhf_jax.doctor.rollouts import rollout_checks
from rlhf_jax.doctor.text import arithmetic_check, template_check, text_checks, token_checks, vocabulary_check

__all__ = [
    "Finding",
    "arithmetic_check",
    "disk_checks",
    "examine",
    "gradient_check",
    "judge",
    "memory_check",
    "preview",
    "probe_check",
    "rollout_checks",
    "template_check",
    "text_checks",
    "timed_steps",
    "token_checks",
    "vocabulary_check",
]
