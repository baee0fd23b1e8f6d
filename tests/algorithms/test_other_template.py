"""Programs refuse a model that was trained on conversations of another template than their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from rlhf_jax.algorithms.models import Loaded, load_model
from rlhf_jax.algorithms.roles import Roles
from rlhf_jax.data import Form, Template
from rlhf_jax.errors import InputError
from rlhf_jax.io import export_pretrained
from rlhf_jax.io.source import ModelSource
from rlhf_jax.parallel import MeshConfig, make_mesh
from rlhf_jax.testing import byte_tokenizer, tiny_model

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>\n{% endfor %}"
PLAIN, CHAT = Template(style="plain"), Template()


def loaded(
    path: Path, template: Template | None, head: Any = "lm", chat_template: str | None = CHATML, **source: Any
) -> Loaded:
    """A model that was exported from a run trained with ``template``."""
    if not path.exists():
        model, params = tiny_model(vocab_size=272, head=head)
        export_pretrained(path, model, params, byte_tokenizer(chat_template), template=template)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return load_model(ModelSource(path=str(path), **source), head, mesh, None)


def roles(policy: Loaded, judge: Loaded | None) -> Roles:
    return Roles(policy, judge, {"policy": policy.model}, {}, {})


def test_policy_and_reward_model_share_the_template(tmp_path: Path) -> None:
    policy, judge = loaded(tmp_path / "policy", CHAT), loaded(tmp_path / "reward", PLAIN, "scalar")
    roles(policy, None).check_template(CHAT)
    with pytest.raises(
        InputError, match="reward: was trained on .* another template: .*style was 'plain', is 'chat'.*or set"
    ):
        roles(policy, judge).check_template(CHAT)
    with pytest.raises(InputError, match="policy: was trained on .*set ModelSource.other_template = True"):
        roles(policy, judge).check_template(PLAIN)
    allowed = loaded(tmp_path / "reward", PLAIN, "scalar", other_template=True)
    roles(policy, allowed).check_template(CHAT)
    with pytest.raises(InputError, match="ModelSource.other_template = 1: give True or False"):
        ModelSource(path="x", other_template=1)  # type: ignore[arg-type]


def test_models_that_say_nothing_are_compared_by_chat_template(tmp_path: Path) -> None:
    policy, judge = loaded(tmp_path / "policy", None), loaded(tmp_path / "reward", None, "scalar")
    for template in (CHAT, PLAIN, Template(style="raw")):
        roles(policy, judge).check_template(template)
    other = loaded(tmp_path / "other", None, "scalar", CHATML.replace("<|eos|>", "<|pad|>"))
    roles(policy, other).check_template(PLAIN)  # nothing says how it learned
    with pytest.raises(InputError, match="other: was trained on .* the chat templates differ: it learned"):
        roles(policy, other).check_template(CHAT)


def test_the_remedy_is_the_programs_own(tmp_path: Path) -> None:
    """An export serves its plain format as a chat template: written as chat it agrees, in another format it does not."""
    policy = loaded(tmp_path / "policy", PLAIN)
    policy.check_template(Form(CHAT, policy.tokenizer), responses=False)
    other = Form(Template(style="plain", prompt_format="{prompt}"), policy.tokenizer)
    with pytest.raises(InputError, match="or name the policy in run.other_template"):
        policy.check_template(other, responses=False, remedy="name the policy in run.other_template")
