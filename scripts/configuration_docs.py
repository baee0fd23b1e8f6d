"""Write docs/configuration.md: every key that a gin file may bind, from the code.

python scripts/configuration_docs.py            # write the page
python scripts/configuration_docs.py --check    # exit code 1 when the page is not what the code says
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_jax.launch.describe import Key, configurable_keys, keys_of, run_function

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
EXPERIMENTS = ("train_sft", "train_reward", "train_dpo", "train_ppo", "train_grpo", "generate", "evaluate", "pipeline")
HEAD = """# Configuration keys

`scripts/configuration_docs.py` writes this page from the code; `rlhf-jax describe EXPERIMENT` prints the same on the terminal.
"required"
is a key without a default. A default that begins with @ is a configuration with its own defaults.
"""


def page() -> str:
    """Return the text of the page."""
    parts = [HEAD, "## Experiments\n"]
    for experiment in EXPERIMENTS:
        parts.append(section(f"### {experiment}", keys_of("run", run_function(experiment))))
    parts.append("## Configurations and builders\n")
    parts += [section(f"### {name}", keys) for name, keys in configurable_keys().items()]
    return "\n".join(parts)


def section(title: str, keys: list[Key]) -> str:
    """Return a heading and a table with a row for each key."""
    place = keys[0].place.rpartition(":")[0] if keys else ""
    rows = [f"| `{key.name}` | {cell(key.type)} | {cell(key.default)} | {prose(key.meaning)} |" for key in keys]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows] if keys else ["It has no keys."]
    return "\n".join([f"{title}\n", *([f"Defined in `{place}`.\n"] if place else []), *table, ""])


def cell(text: str) -> str:
    """Return code for a table cell."""
    return f"`{text}`".replace("|", "\\|")


def prose(text: str) -> str:
    """Return prose for a table cell."""
    return text.replace("|", "\\|").replace("``", "`").replace("<", "&lt;")


def main() -> int:
    """Write or check the page; return the exit code."""
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
