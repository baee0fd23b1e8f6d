"""The defaults of TRL's configurations, read from the source of a release: golden/trl_defaults.json.

pip download --no-deps trl && unzip trl-*.whl -d TRL && python tests/learn/make_trl_defaults.py TRL
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

CONFIGS = {"GRPOConfig": "grpo", "RLOOConfig": "rloo", "DPOConfig": "dpo", "RewardConfig": "reward"}
GOLDEN = Path(__file__).parent / "golden" / "trl_defaults.json"


def default_of(value: ast.expr) -> Any:
    """Of `field(default=...)` or `field(default_factory=lambda: ...)`; a constant that is no literal as its source."""
    if isinstance(value, ast.Call):
        settings = {keyword.arg: keyword.value for keyword in value.keywords}
        factory = settings.get("default_factory")
        value = factory.body if isinstance(factory, ast.Lambda) else settings.get("default", value)
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


def fields_of(source: str, name: str) -> dict[str, Any]:
    """{field: default} of the class ``name``."""
    (actual,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = (node for node in actual.body if isinstance(node, ast.AnnAssign) and node.value is not None)
    return {node.target.id: default_of(node.value) for node in fields if isinstance(node.target, ast.Name)}


def main(root: Path) -> None:
    trainer, (metadata,) = root / "trl" / "trainer", root.glob("trl-*.dist-info/METADATA")
    (version,) = re.findall(r"^Version: (.*)$", metadata.read_text(), re.MULTILINE)
    message: dict[str, Any] = {"version": version}
    for name, file in CONFIGS.items():
        message[name] = fields_of((trainer / f"{file}_config.py").read_text(), name)
    (epsilon,) = set(re.findall(r"\(std_rewards \+ (\S+)\)", (trainer / "grpo_trainer.py").read_text()))
    message["beside the deviation of a group"] = float(epsilon)
    GOLDEN.write_text(json.dumps(message, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
