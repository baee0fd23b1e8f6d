"""A plan as a page: one HTML file that needs nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from rlhf_jax.plan.chips import GIB, Slice
from rlhf_jax.plan.compiled import Report
from rlhf_jax.plan.report import Table

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1.5em; color: #1b1f24 }
h1 { font-size: 1.4em; overflow-wrap: anywhere } h2 { font-size: 1.05em; margin: 2.2em 0 .6em }
.verdict { border-left: .4em solid; padding: .5em 1em; margin: 1em 0; background: #f4f6f8; overflow-wrap: anywhere }
.fits { border-color: #1a7f37 } .wrong { border-color: #cf222e }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
td, th { border-bottom: 1px solid #d8dee4; padding: 4px 9px; text-align: left; vertical-align: top }
th, th.number { background: #f4f6f8; font-weight: 600; vertical-align: bottom; white-space: normal; max-width: 9em }
tbody tr:hover { background: #f4f6f8 }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } .NO { color: #cf222e; font-weight: 700 }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .45em .8em; align-items: center }
.bar { display: flex; height: 1.5em; background: #eaeef2; position: relative } .bar i { height: 100%; min-width: 1px }
.bar b { position: absolute; top: -.25em; bottom: -.25em; border-left: 2px solid #cf222e }
.key span { display: inline-block; margin: .7em 1.2em 0 0 }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .4em }
""".strip()
_COLOURS = ("#0969da", "#8250df", "#57606a", "#9a6700", "#bf8700", "#1a7f37", "#d4a72c")


def as_html(
    sections: Iterable[Table], title: str, reports: Sequence[Report], where: Slice | None, verdict: str, fits: bool
) -> str:
    """Return the plan as an HTML page.

    sections: the tables of the plan.
    verdict: the result, in a sentence or two.
    fits: whether all phases fit.
    """
    banner = f'<p class="verdict {"fits" if fits else "wrong"}">{html.escape(verdict)}</p>'
    body = [f"<h1>{html.escape(title)}</h1>", banner if where is not None else "", _memory_bars(reports)]
    body += [_time_bars(reports), *map(_table, sections)]
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>\n{chr(10).join(filter(None, body))}\n</body></html>\n"


def _memory_bars(reports: Sequence[Report]) -> str:
    """Draw every phase's peak by kind, on one scale."""
    measured = [r for r in reports if r.memory is not None]
    kinds: dict[str, None] = {}
    rows = []
    for r in measured:
        assert r.memory is not None
        m = r.memory
        parts = {**m.resident, "batch, outputs and tiles": m.batch + m.outputs + m.tiles}
        parts |= {"temporaries": m.temporaries, "code": m.code}
        kinds |= dict.fromkeys(parts)
        rows.append((r.phase.name, parts))
    if not rows:
        return ""
    usable = measured[0].usable
    full = max([usable or 0.0, *(float(sum(parts.values())) for _, parts in rows)])
    colours = dict(zip(kinds, _COLOURS, strict=False))
    limit = (
        ""
        if usable is None
        else f'<b style="left:{100 * usable / full:.2f}%" title="usable {usable / GIB:.2f} GiB"></b>'
    )
    lines = []
    for name, parts in rows:
        pieces = [(kind, size, colours.get(kind, "#6e7781")) for kind, size in parts.items()]
        bar = "".join(_piece(f"{kind} {size / GIB:.2f} GiB", size / full, colour) for kind, size, colour in pieces)
        lines.append((name, bar + limit, f"{sum(parts.values()) / GIB:.2f} GiB"))
    heading = "HBM a chip" if usable is None else f"HBM a chip, of {usable / GIB:.2f} GiB that a program may use"
    return _bars(heading, lines, colours)


def _time_bars(reports: Sequence[Report]) -> str:
    """Draw the three times of every phase, the longest of all as wide as the page."""
    colours = {"compute": "#0969da", "hbm": "#9a6700", "ici": "#8250df"}
    times = [(r.phase.name, r.seconds) for r in reports if r.seconds is not None and r.seconds.bound >= 1e-6]
    if not times:
        return ""
    full = max(seconds.bound for _, seconds in times)
    lines = []
    for name, seconds in times:
        for kind, colour in colours.items():
            size = getattr(seconds, kind)
            longest = " (longest)" if kind == seconds.limit else ""
            label = f"{size * 1e3:,.1f} ms{longest}"
            lines.append((name if kind == "compute" else "", _piece(label, size / full, colour), label))
    return _bars("Least time of one call by compute, HBM and links between chips", lines, colours)


def _piece(title: str, share: float, colour: str) -> str:
    return f'<i style="width:{100 * share:.2f}%;background:{colour}" title="{html.escape(title)}"></i>'


def _bars(heading: str, lines: Iterable[tuple[str, str, str]], colours: dict[str, str]) -> str:
    rows = "".join(
        f'<span>{html.escape(name)}</span><span class="bar">{bar}</span><span class="number">{html.escape(label)}</span>'
        for name, bar, label in lines
    )
    key = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(kind)}</span>' for kind, colour in colours.items()
    )
    return f'<h2>{html.escape(heading)}</h2><div class="bars">{rows}</div><div class="key">{key}</div>'


def _table(table: Table) -> str:
    """Format a table: numbers to the right, items between semicolons on separate lines."""
    numeric = [all(map(_is_number, column)) for column in zip(*table.rows, strict=True)] or [False] * len(table.header)

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(_cell(tag, cell, right) for cell, right in zip(cells, numeric, strict=True)) + "</tr>"

    rows = "".join(line("td", row) for row in table.rows)
    inside = f"<table><thead>{line('th', table.header)}</thead><tbody>{rows}</tbody></table>"
    return f'<h2>{html.escape(table.title)}</h2><div class="wide">{inside}</div>'


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"-|host|[\d.,]+(e-?\d+)?( ?(%|ms|GiB))?|", cell) is not None


def _cell(tag: str, cell: str, right: bool) -> str:
    content = (
        f'<a href="{html.escape(cell)}">{html.escape(cell)}</a>' if cell.startswith("https://") else html.escape(cell)
    )
    classes = ("number",) if right else (cell,) if cell == "NO" else ()
    marked = f' class="{classes[0]}"' if classes else ""
    return f"<{tag}{marked}>{content.replace('; ', ';<br>')}</{tag}>"
