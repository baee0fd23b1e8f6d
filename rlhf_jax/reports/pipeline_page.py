"""The self-contained HTML report of a pipeline run: stages, learning curves, evaluation, samples."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from rlhf_jax.errors import InputError
from rlhf_jax.storage.files import read_object
from rlhf_jax.storage.metric_files import read_metrics
from rlhf_jax.storage.names import PROVENANCE

REMEDY = "run the stage again"
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
{% for s in stages %}{% for problem in s.problems %}<p>Problem: {{ problem }}</p>{% endfor %}{% endfor %}
{% if policies %}<h2>{{ prompts }} prompts: mean [95 % interval]</h2><table><tr><th>score
{% for p in policies %}<th>{{ p.name }}{% endfor %}</tr>{% for key in keys %}<tr><td>{{ key }}{% for p in policies %}
<td>{{ cell(p.scores.get(key), ".3f") }}{% endfor %}</tr>
{% endfor %}</table>{% else %}<p>No evaluation was run.</p>{% endif %}
{% if differences %}<h2>Paired differences on the same prompts: mean [95 % interval]</h2><table><tr><th>score
{% for d in differences %}<th>{{ d["from"] }} to {{ d.to }}{% endfor %}</tr>{% for key in keys %}<tr><td>{{ key }}
{% for d in differences %}<td>{% if key in d.paired %}{{ cell(d.paired[key], "+.3f") }}{% if sure(d.paired[key]) %} *{% endif %}
{% endif %}{% endfor %}</tr>
{% endfor %}</table><p>* the interval excludes zero.</p>{% endif %}
{% if samples %}<h2>Samples</h2><table><tr><th>prompt{% for p in policies %}<th>{{ p.name }}{% endfor %}</tr>
{% for s in samples %}<tr><td><pre>{{ turns(s.prompt) }}</pre>{% for p in policies %}<td><pre>{{ s.replies[p.name] }}</pre>
{% if s.gold and s.gold[p.name] is not none %}
<br><small>gold {{ "%.2f"|format(s.gold[p.name]) }}</small>{% endif %}{% endfor %}</tr>
{% endfor %}</table>{% endif %}
<h2>Learning curves</h2>{% for s in stages %}{% if s.picture %}<h3>{{ s.name }}</h3>
<img alt="learning curves of {{ s.name }}" src="data:image/png;base64,{{ s.picture }}">{% endif %}{% endfor %}
</body></html>
""")


def _draw_curves(rows: Sequence[dict[str, Any]]) -> str | None:
    """Draw the learning curves, one panel per metric, as a PNG in base64; None when no metric is known."""
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


def _describe_stage(directory: Path) -> dict[str, Any]:
    finished = max((int(p.name) for p in directory.glob("checkpoints/*") if p.name.isdecimal()), default=None)
    metrics, times = read_metrics(directory, finished)
    rows, timing = metrics.rows, times.rows
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: row[key] for key in _CURVES if row.get(key) is not None}
    seconds, before = 0.0, 0
    for row in timing:
        seconds += (row.get("seconds") or 0.0) * (row["step"] - before)
        before = row["step"]
    return {
        "name": directory.name if directory.is_dir() else f"{directory.name} (missing)",
        "steps": rows[-1]["step"] if rows else "",
        "seconds": f"{seconds:.0f}" if timing else "",
        "last": ", ".join(f"{key} {value:.3f}" for key, value in last.items()),
        "picture": _draw_curves(rows),
        "problems": metrics.problems,
        **_read_provenance(directory / PROVENANCE),
    }


def _read_provenance(file: Path) -> dict[str, Any]:
    """Return the inputs, the seed and the commits of a stage; empty texts when it has no provenance.json."""
    facts = read_object(file, REMEDY) if file.is_file() else {}
    try:
        return {
            "inputs": ", ".join(f"{entry['name']} ({entry['fingerprint'][:12]})" for entry in facts.get("inputs", [])),
            "seed": facts.get("seed", ""),
            "commit": ", ".join(dict.fromkeys(_commit_text(launch["git"]) for launch in facts.get("launches", []))),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not what a run writes ({type(error).__name__}: {error}); {REMEDY}") from error


def _commit_text(git: dict[str, Any]) -> str:
    """Return the commit of one start of a run, as text."""
    changed = " with changes" if git["dirty"] else ""
    return f"{git['commit'][:12]}{changed}" if git["commit"] else "unknown"


def _prompt_text(prompt: str | Sequence[dict[str, str]]) -> str:
    """Format a prompt as text: itself, or the turns of a dialogue, one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def headlines(evaluation: dict[str, Any]) -> list[str]:
    """Return one sentence per pair of policies about the gain in gold (without gold: in the first score).

    The sentence says when an interval includes zero, and when the gain at equal length is extrapolated or unknown.
    """
    sentences = []
    for entry in evaluation.get("differences", []):
        if not entry["paired"]:
            continue
        key = "gold" if "gold" in entry["paired"] else next(iter(entry["paired"]))
        gain = entry["paired"][key]
        gained = f"{entry['from']} to {entry['to']}: {key} {_numbers(gain)}{_caveat(gain)}"
        if "length_controlled" not in entry:
            sentences.append(gained)
            continue
        controlled = entry["length_controlled"]
        gain_at_equal_length = controlled["gain"]
        if not _is_known(gain_at_equal_length["mean"]):
            at_equal = "at equal length unknown: too few responses, or all longer or shorter by the same"
        else:
            remark = ", extrapolated: no pair has responses of equal length" if controlled["extrapolated"] else ""
            numbers = f"{_numbers(gain_at_equal_length)}{_caveat(gain_at_equal_length)}"
            at_equal = f"at equal length {numbers}{remark}"
        sentences.append(f"{gained}; {at_equal}")
    return sentences


def number_cell(interval: dict[str, Any] | None, form: str) -> str:
    """Format an interval of evaluation.json as '0.500 [0.400, 0.600]'; without bounds as '0.500 (no interval)'.

    None is 'not scored', and an unknown mean 'unknown'. form: the format of the numbers, such as '.3f'.
    """
    if interval is None or not _is_known(interval["mean"]):
        return "not scored" if interval is None else "unknown"
    if not (_is_known(interval["low"]) and _is_known(interval["high"])):
        return f"{interval['mean']:{form}} (no interval)"
    return f"{interval['mean']:{form}} [{interval['low']:{form}}, {interval['high']:{form}}]"


def _is_known(number: float | None) -> bool:
    """Return False for None, and for NaN, which files of earlier versions have."""
    return number is not None and not math.isnan(number)


def _excludes_zero(interval: dict[str, Any]) -> bool:
    """Return whether there is an interval that excludes zero."""
    bounds = _is_known(interval["low"]) and _is_known(interval["high"])
    return bounds and (interval["low"] > 0 or interval["high"] < 0)


def _numbers(interval: dict[str, Any]) -> str:
    return number_cell(interval, "+.3f").removesuffix(" (no interval)")  # `_caveat` says so


def _caveat(interval: dict[str, Any]) -> str:
    """Return the remark on a difference that is not shown to exist; empty when its interval excludes zero."""
    if _excludes_zero(interval):
        return ""
    bounds = _is_known(interval["low"]) and _is_known(interval["high"])
    return f" ({'the interval includes zero' if bounds else 'no interval'}: no difference shown)"


def write_report(run_dir: Path, stages: Sequence[str]) -> Path:
    """Write RUN_DIR/report.html from the files of the stages and return its path.

    Missing files are left out or reported as missing. The evaluation is that of the last stage with an evaluation.json.
    Damaged or missing lines of metric files are named on the page and on stderr. Raises InputError for any other damaged
    file.
    """
    evaluations = [file for name in stages if (file := run_dir / name / "evaluation.json").is_file()]
    evaluation = (
        read_object(evaluations[-1], REMEDY, finite=False) if evaluations else {}
    )  # NaN: an interval of one response
    described = [_describe_stage(run_dir / name) for name in stages]
    for problem in [problem for stage in described for problem in stage["problems"]]:
        print(f"warning: {problem}", file=sys.stderr)
    try:
        page = _render(run_dir, described, evaluation)
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.TemplateError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"{evaluations[-1]}: not what evaluate.py writes ({problem}); {REMEDY}") from error
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _render(run_dir: Path, stages: Sequence[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    policies = evaluation.get("policies", [])
    return _PAGE.render(
        title=f"{run_dir.name}: from base to PPO",
        headlines=headlines(evaluation),
        stages=stages,
        policies=policies,
        keys=list(dict.fromkeys(key for policy in policies for key in policy["scores"])),
        differences=evaluation.get("differences", []),
        prompts=evaluation.get("prompts", ""),
        samples=evaluation.get("samples", []),
        turns=_prompt_text,
        cell=number_cell,
        sure=_excludes_zero,
    )
