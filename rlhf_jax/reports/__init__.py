"""Self-contained HTML reports of runs."""

from rlhf_jax.reports.pipeline_page import headlines, number_cell, write_report

__all__ = [
    "headlines",
    "number_cell",
    "write_report",
]
