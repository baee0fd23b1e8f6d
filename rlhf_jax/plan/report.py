"""Plans as tables (text, Markdown) and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_jax.plan.chips import GIB, Slice
from rlhf_jax.plan.compiled import Report
from rlhf_jax.storage.files import json_text


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are shown."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def _gib(size: float | None) -> str:
    """Format bytes as GiB, with the digits that small plans need."""
    return "-" if size is None else f"{size / GIB:.2f}" if size >= GIB / 100 or not size else f"{size / GIB:.1e}"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.2f}" if flops >= 1e10 or not flops else f"{flops / 1e12:.1e}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds else "0"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A candidate that a search compiled, as bindings, and its reports."""

    bindings: str
    reports: Sequence[Report]


def tables(reports: Sequence[Report], where: Slice | None, attempts: Sequence[Attempt] = ()) -> list[Table]:
    """Return tables of memory, work and time of every phase, the constants behind the times, and the attempts of a search."""
    sections = [_memory(reports), _work(reports), _time(reports)]
    sections += [_constants(where)] if where is not None else []
    return [*sections, _attempts_table(attempts)] if attempts else sections


def _memory(reports: Sequence[Report]) -> Table:
    kinds = list(dict.fromkeys(kind for r in reports for kind in r.phase.resident))
    inside = list(dict.fromkeys(kind for r in reports for kind in r.phase.inside))
    header = ("phase", "fits", *kinds, "batch", "outputs", "tiles", "temporaries")
    header += (*(f"of these: {kind} (analytic)" for kind in inside), "code", "peak", "analytic sum", "usable")
    rows = []
    for r in reports:
        verdict = "yes" if r.fits else "NO"
        if r.memory is None:
            rows.append((r.phase.name, verdict, *["-"] * (len(header) - 3), _gib(r.usable)))
            continue
        m = r.memory
        parts = [_gib(m.resident[kind]) if kind in m.resident else "host" for kind in kinds] + [
            _gib(m.batch),
            _gib(m.outputs),
            _gib(m.tiles),
            _gib(m.temporaries),
        ]
        parts += [_gib(r.phase.inside.get(kind)) for kind in inside]
        rows.append((r.phase.name, verdict, *parts, _gib(m.code), _gib(m.peak), _gib(r.phase.analytic), _gib(r.usable)))
    return Table("HBM a chip, GiB", header, rows)


def _work(reports: Sequence[Report]) -> Table:
    rows = []
    for r in reports:
        if r.cost is None:
            continue
        c, model = r.cost, r.phase.flops / r.chips
        moved = [
            f"{kind} {axes} {_gib(c.moved[kind, axes])} GiB ({c.counts[kind, axes]}x)"
            for kind, axes in sorted(c.moved, key=lambda key: -c.moved[key])
        ]
        loops = [f"{n}x of a loop of at most {count}" for count, n in sorted(c.bounded.items())]
        loops += [f"{c.unknown} loops of unknown length, counted once"] if c.unknown else []
        loops += [f"kernel {name} ({n}x) gives no cost" for name, n in c.silent.items()]
        share = f"{c.flops / model:.2f}" if model else "-"
        cells = (_tera(c.flops), _tera(model), share, _gib(c.hbm_bytes))
        rows.append((r.phase.name, *cells, "; ".join(moved) or "none", "; ".join(loops) or "all counted"))
    header = ("phase", "TFLOP", "of the model (analytic)", "ratio", "HBM traffic GiB", "sent to other chips", "loops")
    return Table("Work a chip in one call of each phase, loops multiplied out", header, rows)


def _time(reports: Sequence[Report]) -> Table:
    rows = []
    for r in reports:
        cells: tuple[str, ...] = ("-",) * 6
        if r.seconds is not None:
            s = r.seconds
            rate = "-" if r.tokens_per_second is None or not r.phase.flops else f"{r.tokens_per_second:,.0f}"
            cells = (_ms(s.compute), _ms(s.hbm), _ms(s.ici), s.limit, _percent(r.utilisation), rate)
        rows.append((r.phase.name, *cells, f"{r.compile_seconds:.1f}", r.sha256[:12]))
    timed = [r for r in reports if r.seconds is not None]
    if len(timed) == len(reports) > 2:  # the phases of one iteration
        whole = sum(r.seconds.bound for r in timed if r.seconds is not None)
        tokens = next(r for r in reports if r.phase.name == "generate").phase.tokens
        rate = f"{tokens / reports[0].chips / whole:,.0f}"
        total = sum(r.compile_seconds for r in reports)
        rows.append(("iteration", "", "", "", f"{_ms(whole)} ms", "", rate, f"{total:.1f}", ""))
    times = ("compute ms", "HBM ms", "ICI ms", "longest")
    header = ("phase", *times, "utilisation (ESTIMATE)", "tokens/s/chip (ESTIMATE)", "compile s", "program")
    return Table(
        "Roofline: the least time of one call, and estimates as if the longest of the three were all", header, rows
    )


def seconds_a_token(reports: Sequence[Report]) -> float:
    """Return the roofline times of all phases over the tokens of the first, all chips together."""
    return sum(r.seconds.bound for r in reports if r.seconds) / reports[0].phase.tokens


def rank(reports: Sequence[Report]) -> tuple[bool, float, float]:
    """Return a key for sorting; smaller is better: fitting plans, then the time a token to three digits, then the largest peak."""
    peaks = [float("inf") if r.memory is None else r.memory.peak for r in reports]
    return not all(r.fits for r in reports), float(f"{seconds_a_token(reports):.3g}"), max(peaks)


def _attempts_table(attempts: Sequence[Attempt]) -> Table:
    """Return the table of attempts, the best first, by `rank`."""
    rows = []
    for one in sorted(attempts, key=lambda one: rank(one.reports)):
        wrong = [r.phase.name for r in one.reports if not r.fits]
        sizes = [r.memory.peak if r.memory is not None else None for r in one.reports]
        peak = _gib(max(size for size in sizes if size is not None)) if None not in sizes else "too much to compile"
        whole = sum(r.seconds.bound for r in one.reports if r.seconds)
        rate = f"{1 / seconds_a_token(one.reports) / one.reports[0].chips:,.0f}" if not wrong else "-"
        fits = f"NO: {', '.join(wrong)}" if wrong else "yes"
        compiled = sum(r.compile_seconds for r in one.reports)
        rows.append((one.bindings, fits, peak, _ms(whole) if not wrong else "-", rate, f"{compiled:.1f}"))
    header = ("change", "fits", "peak GiB", "all phases ms", "tokens/s/chip (ESTIMATE)", "compile s")
    return Table("Search: what was compiled, the best first; the tables above are of the first line", header, rows)


def _constants(where: Slice) -> Table:
    chip = where.chip
    size = (
        f"{where.name}, {where.chips} chips",
        f"{chip.flops / 1e12:.0f} TFLOP/s bf16",
        f"{chip.hbm_bytes / 1e9:.0f} GB",
    )
    rates = (f"{chip.hbm_bandwidth / 1e9:.0f} GB/s", f"{chip.ici_bandwidth / 1e9:.0f} GB/s")
    header = ("slice", "peak a chip", "HBM", "usable (libtpu 0.0.42)", "HBM bandwidth", "ICI, all links", "source")
    return Table("Constants", header, [(*size, f"{_gib(chip.hbm_usable)} GiB", *rates, chip.source)])


def as_text(sections: Iterable[Table], width: int = 34) -> str:
    """Return the tables as text with aligned columns; a cell longer than ``width`` ends its line."""
    parts = []
    for table in sections:
        lines = [table.header, *table.rows]
        sizes = [max(len(line[i]) if len(line[i]) <= width else 0 for line in lines) for i in range(len(table.header))]
        parts.append(table.title)
        parts += ["  " + "  ".join(c.ljust(s) for c, s in zip(line, sizes, strict=True)).rstrip() for line in lines]
        parts.append("")
    return "\n".join(parts)


def as_markdown(sections: Iterable[Table], title: str) -> str:
    """Return the tables as a Markdown page for docs."""
    parts = [f"# {title}", ""]
    for table in sections:
        parts += [f"{table.title}:", "", f"| {' | '.join(table.header)} |", "|" + "---|" * len(table.header)]
        parts += [f"| {' | '.join(row)} |" for row in table.rows]
        parts.append("")
    return "\n".join(parts)


def as_json(
    reports: Sequence[Report],
    where: Slice | None,
    settings: dict[str, Any],
    attempts: Sequence[Attempt] = (),
    change: str = "",
) -> str:
    """Return the plan as JSON, in bytes, operations and seconds.

    settings: the planned settings.
    change: the nearest change with which the plan would fit.
    """

    def one(r: Report) -> dict[str, Any]:
        row: dict[str, Any] = {"phase": r.phase.name, "fits": r.fits, "problem": r.problem, "program_sha256": r.sha256}
        row |= {"compile_seconds": round(r.compile_seconds, 2), "tokens": r.phase.tokens, "model_flops": r.phase.flops}
        row |= {"largest": r.largest, "analytic": dict(r.phase.inside)}
        if r.memory is not None and r.cost is not None:
            row["memory"] = dataclasses.asdict(r.memory) | {"peak": r.memory.peak}
            row["flops"], row["hbm_bytes"] = r.cost.flops, r.cost.hbm_bytes
            row["collectives"] = [
                {"kind": kind, "axes": axes, "bytes": sent, "count": r.cost.counts[kind, axes]}
                for (kind, axes), sent in sorted(r.cost.moved.items())
            ]
            row["loops_at_most"], row["loops_unknown"] = dict(r.cost.bounded), r.cost.unknown
        if r.seconds is not None:
            row["roofline_seconds"] = dataclasses.asdict(r.seconds)
            row["estimates"] = {"utilisation": r.utilisation, "tokens_per_second_per_chip": r.tokens_per_second}
        return row

    chip = None if where is None else dataclasses.asdict(where.chip)
    name = None if where is None else where.name
    whole: dict[str, Any] = {"topology": name, "chip": chip, "settings": settings}
    whole["phases"] = [one(r) for r in reports]
    if attempts:
        header, *rows = (_attempts_table(attempts).header, *_attempts_table(attempts).rows)
        whole["tried"] = [dict(zip(header, row, strict=True)) for row in rows]
    return json_text(whole | ({"nearest_change": change} if change else {}), indent=2)
