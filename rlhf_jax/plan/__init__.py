"""Ahead-of-time compilation for TPU slices: does a run fit, and what will it cost."""

from rlhf_jax.plan.analytic import sent_bytes
from rlhf_jax.plan.chips import CHIPS, GIB, Chip, Slice, parse_slice
from rlhf_jax.plan.compiled import Memory, Report, Seconds, compile_phase, roofline
from rlhf_jax.plan.cost import Cost, count
from rlhf_jax.plan.hlo import parse_module
from rlhf_jax.plan.mode import PlanOptions, plan_run
from rlhf_jax.plan.page import as_html
from rlhf_jax.plan.phases import PlannedPhase, planned
from rlhf_jax.plan.report import Attempt, Table, as_json, as_markdown, as_text, tables
from rlhf_jax.plan.search import (
    Build,
    Candidate,
    Keys,
    Remat,
    better,
    promising,
    repair,
    summary,
    variations,
    verdict,
    why,
)
from rlhf_jax.plan.sharding import sharding_tables, strategies

__all__ = [
    "CHIPS",
    "GIB",
    "Attempt",
    "Build",
    "Candidate",
    "Chip",
    "Cost",
    "Keys",
    "Memory",
    "PlanOptions",
    "PlannedPhase",
    "Remat",
    "Report",
    "Seconds",
    "Slice",
    "Table",
    "as_html",
    "as_json",
    "as_markdown",
    "as_text",
    "better",
    "compile_phase",
    "count",
    "parse_module",
    "parse_slice",
    "plan_run",
    "planned",
    "promising",
    "repair",
    "roofline",
    "sent_bytes",
    "sharding_tables",
    "strategies",
    "summary",
    "tables",
    "variations",
    "verdict",
    "why",
]
