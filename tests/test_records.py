"""The response that a reward scores."""

from __future__ import annotations

import pickle

from rlhf_jax.data import Message
from rlhf_jax.records import Failed, Response


def test_a_response_and_a_failure_cross_processes():
    """Reward workers get responses, and give failures back, as pickles."""
    extra = {"tests": [{"input": "1", "output": None}], "strict": True}
    response = Response((Message("user", "Add."),), "2", ended=False, extra=extra, id="q1")
    assert pickle.loads(pickle.dumps(response)) == response and response.extra["tests"][0]["output"] is None
    assert pickle.loads(pickle.dumps(Failed("no sandbox"))).reason == "no sandbox"


def test_a_response_needs_its_prompt_and_text_alone():
    response = Response((Message("user", "Add."),), "2")
    assert response.ended and response.extra == {} and response.id == ""
