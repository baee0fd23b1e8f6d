"""One self-contained HTML page about a pipeline run: stages, learning curves, evaluation, samples."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from rlhf_jax.types import InputError

_CURVES = (
    "loss",
    "heldout/loss",
    "accuracy",
    "heldout/accuracy",
    "score",
    "monitor/gold",
    "kl",
    "response_length",
    "entropy",
    "explained_variance",
)

_PAGE = jinja2.Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ title }}</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:auto;padding:1rem;color-scheme:light dark}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.3rem .7rem;border-bottom:1px solid #8886;
text-align:left;vertical-align:top}img{max-width:100%;background:#fff}pre{white-space:pre-wrap;margin:0}</style></head>
<body><h1>{{ title }}</h1>
{% for line in headlines %}<p><strong>{{ line }}</strong></p>{% endfor %}
<h2>Stages</h2><table><tr><th>stage<th>steps<th>seconds in steps<th>last metrics<th>started from
<th>seed<th>commit</tr>
{% for s in stages %}<tr><td>{{ s.name }}<td>{{ s.steps }}<td>{{ s.seconds }}<td>{{ s.last }}<td>{{ s.inputs }}
<td>{{ s.seed }}<td>{{ s.commit }}</tr>
{% endfor %}</table>
{% if policies %}<h2>{{ prompts }} prompts: mean [95 % interval]</h2><table><tr><th>score
{% for p in policies %}<th>{{ p.name }}{% endfor %}</tr>{% for key in keys %}<tr><td>{{ key }}{% for p in policies %}
<td>{% if key in p.scores %}{{ "%.3f [%.3f, %.3f]"|format(p.scores[key].mean, p.scores[key].low, p.scores[key].high) }}
{% else %}not scored{% endif %}{% endfor %}</tr>
{% endfor %}</table>{% else %}<p>No evaluation was run.</p>{% endif %}
{% if differences %}<h2>Paired differences on the same prompts: mean [95 % interval]</h2><table><tr><th>score
{% for d in differences %}<th>{{ d["from"] }} to {{ d.to }}{% endfor %}</tr>{% for key in keys %}<tr><td>{{ key }}
{% for d in differences %}<td>{% if key in d.paired %}{% set v = d.paired[key] %}{{ "%+.3f [%+.3f, %+.3f]"|format(v.mean,
v.low, v.high) }}{% if v.low > 0 or v.high < 0 %} *{% endif %}{% endif %}{% endfor %}</tr>
{% endfor %}</table><p>* the interval excludes zero.</p>{% endif %}
{% if samples %}<h2>Samples</h2><table><tr><th>prompt{% for p in policies %}<th>{{ p.name }}{% endfor %}</tr>
{% for s in samples %}<tr><td><pre>{{ turns(s.prompt) }}</pre>{% for p in policies %}<td><pre>{{ s.replies[p.name] }}</pre>
{% if s.gold %}<br><small>gold {{ "%.2f"|format(s.gold[p.name]) }}</small>{% endif %}{% endfor %}</tr>
{% endfor %}</table>{% endif %}
<h2>Learning curves</h2>{% for s in stages %}{% if s.picture %}<h3>{{ s.name }}</h3>
<img alt="learning curves of {{ s.name }}" src="data:image/png;base64,{{ s.picture }}">{% endif %}{% endfor %}
</body></html>
""")


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    """``text``, which begins at ``line`` of ``path``; raises InputError naming them when it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "continue the run or remove the line" if path.suffix == ".jsonl" else "run the stage again"
        raise InputError(f"{path}:{line + error.lineno - 1}: not JSON ({error.msg}); {remedy}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [_parsed(path, line, number) for number, line in enumerate(path.read_text().splitlines(), start=1)]


def _picture(rows: Sequence[dict[str, Any]]) -> str | None:
    """PNG, base64, one panel per known metric; None when there is none."""
    names = [name for name in _CURVES if any(row.get(name) is not None for row in rows)]
    if not names:
        return None
    columns = min(3, len(names))
    figure, axes = plt.subplots(
        -(-len(names) // columns), columns, squeeze=False, figsize=(4 * columns, 2.6 * -(-len(names) // columns))
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axis.set_visible(True)
        axis.plot(*zip(*points, strict=True), color="#0072b2")
        axis.set(title=name, xlabel="step")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _stage(directory: Path) -> dict[str, Any]:
    rows, timing = _lines(directory / "metrics.jsonl"), _lines(directory / "timing.jsonl")
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: row[key] for key in _CURVES if row.get(key) is not None}
    seconds, before = 0.0, 0
    for row in timing:
        seconds += row.get("seconds", 0.0) * (row["step"] - before)
        before = row["step"]
    provenance = directory / "provenance.json"
    facts = _parsed(provenance, provenance.read_text()) if provenance.is_file() else {}
    return {
        "name": directory.name if directory.is_dir() else f"{directory.name} (missing)",
        "steps": rows[-1]["step"] if rows else "",
        "seconds": f"{seconds:.0f}" if timing else "",
        "last": ", ".join(f"{key} {value:.3f}" for key, value in last.items()),
        "inputs": ", ".join(f"{entry['name']} ({entry['fingerprint'][:12]})" for entry in facts.get("inputs", [])),
        "seed": facts.get("seed", ""),
        "commit": ", ".join(dict.fromkeys(_commit(launch["git"]) for launch in facts.get("launches", []))),
        "picture": _picture(rows),
    }


def _commit(git: dict[str, Any]) -> str:
    """Of one start of a run."""
    changed = " with changes" if git["dirty"] else ""
    return f"{git['commit'][:12]}{changed}" if git["commit"] else "unknown"


def _turns(prompt: str | Sequence[dict[str, str]]) -> str:
    """A prompt as text: itself, or the turns of a dialogue."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def headlines(evaluation: dict[str, Any]) -> list[str]:
    """One sentence per pair of policies on what gold gained (without gold: the first score).

    It says so when an interval includes zero, and when lengths differ in a way that leaves the gain at equal length to
    the fitted line alone, or unknown.
    """
    sentences = []
    for entry in evaluation.get("differences", []):
        if not entry["paired"]:
            continue
        key = "gold" if "gold" in entry["paired"] else next(iter(entry["paired"]))
        gain = entry["paired"][key]
        gained = f"{entry['from']} to {entry['to']}: {key} {_numbers(gain)}{_doubt(gain)}"
        if "length_controlled" not in entry:
            sentences.append(gained)
            continue
        controlled = entry["length_controlled"]
        even = controlled["gain"]
        if math.isnan(even["mean"]):
            at_equal = "at equal length unknown: too few replies, or all longer or shorter by the same"
        else:
            line = ", extrapolated: no pair has replies of equal length" if controlled["extrapolated"] else ""
            at_equal = f"at equal length {_numbers(even)}{_doubt(even)}{line}"
        sentences.append(f"{gained}; {at_equal}")
    return sentences


def _numbers(interval: dict[str, Any]) -> str:
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def _doubt(interval: dict[str, Any]) -> str:
    sure = interval["low"] > 0 or interval["high"] < 0
    return "" if sure else " (the interval includes zero: no difference shown)"


def write_report(run_dir: Path, stages: Sequence[str]) -> Path:
    """Write RUN_DIR/report.html from what the stages left on disk; what is missing is left out or said to be missing.

    The evaluation shown is that of the last stage that wrote an evaluation.json.
    Returns its path. Raises InputError for a file that is not JSON.
    """
    written = [file for name in stages if (file := run_dir / name / "evaluation.json").is_file()]
    evaluation = _parsed(written[-1], written[-1].read_text()) if written else {}
    policies = evaluation.get("policies", [])
    page = _PAGE.render(
        title=f"{run_dir.name}: from base to PPO",
        headlines=headlines(evaluation),
        stages=[_stage(run_dir / name) for name in stages],
        policies=policies,
        keys=list(dict.fromkeys(key for policy in policies for key in policy["scores"])),
        differences=evaluation.get("differences", []),
        prompts=evaluation.get("prompts", ""),
        samples=evaluation.get("samples", []),
        turns=_turns,
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
