"""The table of killed runs that scripts/chaos.py prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kill:
    """One SIGKILL: seconds after the process began; aimed: by an injected fault. logged, saved: steps on disk then."""

    seconds: float
    phase: str
    step: int
    logged: int
    saved: int
    aimed: bool = False


@dataclass
class Trial:
    """A run and what became of it. verdict: 'same', 'different: ...', 'lost: ...' or 'orphan: ...'."""

    number: int
    directory: Path
    kills: list[Kill] = field(default_factory=list)
    verdict: str = ""


def hit(trials: Sequence[Trial], phases: Sequence[str]) -> Counter[str]:
    """Count the kills in each phase; one in 'log + hash' counts for both."""
    parts = [part for trial in trials for kill in trial.kills for part in kill.phase.split(" + ")]
    return Counter(part for part in parts if part in phases)


def table(stage: str, phases: Sequence[str], seconds: float, trials: Sequence[Trial]) -> str:
    """Return Markdown: a line for each kill, then the sums. phases: those of ``stage``. seconds: of an unbroken run."""
    lines = [
        "| trial | killed at | phase | step | newest checkpoint | steps done again | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for trial in trials:
        for index, kill in enumerate(trial.kills):
            moment = "aimed" if kill.aimed else f"{kill.seconds:.2f} s"
            again = max(kill.logged - kill.saved, 0)
            result = trial.verdict if index == len(trial.kills) - 1 else "killed again"
            cells = (trial.number, moment, kill.phase, kill.step or "", kill.saved or "none", again, result)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        if not trial.kills:
            lines.append(f"| {trial.number} | not killed | | | | | {trial.verdict} |")
    counted = hit(trials, phases)
    kills = sum(len(trial.kills) for trial in trials)
    lines += ["", f"{stage}: {len(trials)} trials, {kills} kills over {seconds:.1f} s of an unbroken run. "]
    lines += ["Phases hit: " + ", ".join(f"{phase} {counted[phase]}" for phase in phases) + ". "]
    lines += [counts(trials)]
    return "\n".join(lines) + "\n"


def counts(trials: Sequence[Trial]) -> str:
    """Return 'lost = 0, different = 0, orphan = 0, same = 3'."""
    verdicts = Counter(trial.verdict.split(":")[0] for trial in trials)
    return ", ".join(f"{name} = {verdicts[name]}" for name in ("lost", "different", "orphan", "same"))


def sums(trials: Mapping[str, Sequence[Trial]]) -> str:
    """Return Markdown: a line for each stage, and one for all of them."""
    lines = ["| stage | trials | kills | lost | different | orphan | same |", "|---|---|---|---|---|---|---|"]
    whole = [trial for created in trials.values() for trial in created]
    for name, created in (*trials.items(), ("all", whole)):
        verdicts = Counter(trial.verdict.split(":")[0] for trial in created)
        cells = [name, len(created), sum(len(trial.kills) for trial in created)]
        cells += [verdicts[verdict] for verdict in ("lost", "different", "orphan", "same")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
