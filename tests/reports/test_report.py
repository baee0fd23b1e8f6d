"""The page about a run: complete, self-contained, and rendered whatever is missing."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.reports import headlines, number_cell, write_report

STAGES = ["sft", "reward", "ppo", "comparison"]


def interval(mean: float, low: float, high: float) -> dict:
    return {"mean": mean, "low": low, "high": high, "n": 10}


def write_stage(directory: Path, rows, timing=(), inputs=None) -> None:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if timing:
        (directory / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    if inputs is not None:
        launches = [{"git": {"commit": "abcdef0123456789", "dirty": dirty}} for dirty in (False, True, True)]
        (directory / "provenance.json").write_text(json.dumps({"seed": 17, "inputs": inputs, "launches": launches}))


EVALUATION = {
    "policies": [
        {"name": "sft", "scores": {"gold": interval(0.5, 0.4, 0.6), "length": interval(20, 18, 22)}},
        {"name": "ppo", "scores": {"gold": interval(0.7, 0.6, 0.8), "length": interval(21, 19, 23)}},
    ],
    "differences": [
        {
            "from": "sft",
            "to": "ppo",
            "paired": {"gold": interval(0.2, 0.1, 0.3), "length": interval(1, -1, 3)},
            "length_controlled": {"gain": interval(0.15, 0.05, 0.25), "slope": 0.1, "extrapolated": False},
        }
    ],
    "samples": [
        {"prompt": "Where is <b>my</b> order?", "replies": {"sft": "It's & here", "ppo": "<script>x</script>"}},
        {"prompt": "And now?", "replies": {"sft": "a", "ppo": "b"}, "gold": {"sft": 0.25, "ppo": 0.875}},
    ],
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "desk"
    rows = [{"step": n, "stage": "sft", "loss": 3.0 / n, "entropy": None if n == 1 else 1.0} for n in (1, 2, 3)]
    timing = [{"step": 1, "seconds": 4.0}, {"step": 3, "seconds": 1.5}]  # seconds a step since the line before
    write_stage(run / "sft", rows, timing, [{"name": "model", "fingerprint": "0123456789abcdef"}])
    write_stage(run / "reward", [{"step": 5, "accuracy": 0.75, "heldout/accuracy": 0.7}])
    write_stage(run / "ppo", [{"step": 1, "score": 0.25, "kl": 0.5}, {"step": 2, "score": None, "kl": 0.75}])
    (run / "comparison").mkdir()
    (run / "comparison" / "evaluation.json").write_text(json.dumps(EVALUATION))
    return run


class Page(HTMLParser):
    """Text of every cell, and every address the page refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.sources, self.tags = "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data + "|"


def test_the_whole_page(run_dir):
    path = write_report(run_dir, STAGES)
    assert path == run_dir / "report.html"
    page = Page(path)
    assert "desk: from base to PPO" in page.text
    assert "sft to ppo: gold +0.200 [+0.100, +0.300]; at equal length +0.150 [+0.050, +0.250]" in page.text
    assert "0.500 [0.400, 0.600]" in page.text and "21.000 [19.000, 23.000]" in page.text
    assert "+1.000 [-1.000, +3.000]" in page.text  # includes zero: no star
    assert "+0.200 [+0.100, +0.300] *" in page.text and "+1.000 [-1.000, +3.000] *" not in page.text
    assert "gold 0.25" in page.text and "gold 0.88" in page.text
    assert "loss 1.000, entropy 1.000" in page.text and "model (0123456789ab)" in page.text
    assert re.search(r"sft\|.*3\|.*7\|", page.text.replace("\n", "")), "3 steps, 4 + 2 * 1.5 = 7 seconds"
    assert "accuracy 0.750" in page.text and "score 0.250" in page.text  # the last number there is, not the last line
    assert page.tags.count("img") == 3
    assert "17|abcdef012345, abcdef012345 with changes|" in page.text.replace("\n", "")


def test_the_page_is_self_contained_and_has_pictures(run_dir):
    page = Page(write_report(run_dir, STAGES))
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    for source in page.sources:
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG\r\n")


def test_texts_of_models_are_shown_not_run(run_dir):
    page = Page(write_report(run_dir, STAGES))
    assert "script" not in page.tags and "b" not in page.tags
    assert "Where is <b>my</b> order?" in page.text and "<script>x</script>" in page.text and "It's & here" in page.text


def test_a_dialogue_is_shown_by_turns(run_dir):
    file = run_dir / "comparison" / "evaluation.json"
    evaluation = json.loads(file.read_text())
    evaluation["samples"][1]["prompt"] = [{"role": "system", "content": "<i>"}, {"role": "user", "content": "And now?"}]
    file.write_text(json.dumps(evaluation))
    assert "<pre>system: &lt;i&gt;\nuser: And now?</pre>" in write_report(run_dir, STAGES).read_text()


def test_what_is_missing_is_said(tmp_path):
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    page = Page(write_report(unknown, STAGES))
    assert page.text.count("(missing)") == 4 and "No evaluation was run." in page.text and "img" not in page.tags

    write_stage(unknown / "sft", [])  # begun, nothing logged yet
    (unknown / "reward").mkdir()
    page = Page(write_report(unknown, STAGES))
    assert page.text.count("(missing)") == 2

    (unknown / "comparison").mkdir()
    file = unknown / "comparison" / "evaluation.json"
    file.write_text(json.dumps({"policies": EVALUATION["policies"][:1]}))  # one policy: nothing to compare
    page = Page(write_report(unknown, STAGES))
    assert "0.500 [0.400, 0.600]" in page.text and "Samples" not in page.text


def test_a_policy_with_other_scores_still_has_a_row(run_dir):
    """A score that only some policies have is shown for those."""
    file = run_dir / "comparison" / "evaluation.json"
    changed = json.loads(file.read_text())
    changed["policies"][1]["scores"]["reward"] = interval(1.0, 0.9, 1.1)
    del changed["policies"][1]["scores"]["length"]
    file.write_text(json.dumps(changed))
    page = Page(write_report(run_dir, STAGES))
    assert "1.000 [0.900, 1.100]" in page.text and "20.000 [18.000, 22.000]" in page.text


def test_an_interval_around_zero_shows_no_difference():
    unsure = json.loads(json.dumps(EVALUATION))
    unsure["differences"][0]["paired"]["gold"] = interval(0.1, -0.1, 0.3)
    assert "(the interval includes zero: no difference shown)" in headlines(unsure)[0]
    assert "includes zero" not in headlines(EVALUATION)[0]
    worse = json.loads(json.dumps(EVALUATION))
    worse["differences"][0]["paired"]["gold"] = interval(-0.2, -0.3, -0.1)
    assert "gold -0.200" in headlines(worse)[0] and "includes zero" not in headlines(worse)[0]
    for unknown in (None, float("nan")):  # of one prompt; earlier versions wrote NaN
        single = json.loads(json.dumps(EVALUATION))
        single["differences"][0]["paired"]["gold"] = interval(0.2, unknown, unknown)
        assert headlines(single)[0].startswith("sft to ppo: gold +0.200 (no interval: no difference shown); at equal")
    assert headlines({}) == [] and headlines({"differences": [{"from": "a", "to": "b", "paired": {}}]}) == []


def test_without_gold_the_headline_has_the_first_score():
    entry = {"from": "a", "to": "b", "paired": {"praise": interval(0.2, 0.1, 0.3), "length": interval(3.0, 1.0, 5.0)}}
    assert headlines({"differences": [entry]}) == ["a to b: praise +0.200 [+0.100, +0.300]"]


def test_the_headline_has_the_gain_at_equal_length():
    """The headline marks a gain at equal length that may be zero, is extrapolated, or is unknown."""
    changed = json.loads(json.dumps(EVALUATION))
    controlled = changed["differences"][0]["length_controlled"]
    assert headlines(changed) == ["sft to ppo: gold +0.200 [+0.100, +0.300]; at equal length +0.150 [+0.050, +0.250]"]
    controlled["gain"] = interval(0.02, -0.05, 0.09)
    assert headlines(changed)[0].endswith("+0.020 [-0.050, +0.090] (the interval includes zero: no difference shown)")
    controlled |= {"gain": interval(0.15, 0.05, 0.25), "extrapolated": True}
    assert headlines(changed)[0].endswith("[+0.050, +0.250], extrapolated: no pair has responses of equal length")
    for unknown in (None, float("nan")):
        controlled["gain"] = interval(unknown, unknown, unknown)
        assert headlines(changed)[0].endswith(
            "; at equal length unknown: too few responses, or all longer or shorter by the same"
        )


def test_the_page_without_intervals(run_dir):
    """One prompt gives means and no bounds; a response may lack a score."""
    file = run_dir / "comparison" / "evaluation.json"
    changed = json.loads(file.read_text())
    changed["policies"][0]["scores"]["gold"] = interval(0.5, None, None)
    changed["differences"][0]["paired"]["gold"] = interval(0.2, None, None)
    changed["samples"][1]["gold"]["sft"] = None
    file.write_text(json.dumps(changed))
    text = Page(write_report(run_dir, STAGES)).text
    assert "0.500 (no interval)" in text and "+0.200 (no interval)" in text and "gold 0.88" in text
    assert number_cell(None, ".3f") == "not scored" and number_cell(interval(None, None, None), ".3f") == "unknown"


def test_a_damaged_file_is_named(run_dir, capsys):
    """A run killed in the middle of a line; a file edited by hand."""
    metrics = run_dir / "sft" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 4, "lo')
    assert "sft/metrics.jsonl: the last line is torn" in write_report(run_dir, STAGES).read_text()
    assert "metrics.jsonl: the last line is torn" in capsys.readouterr().err
    metrics.write_text(whole)
    (run_dir / "comparison" / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json:1: not JSON"):
        write_report(run_dir, STAGES)
