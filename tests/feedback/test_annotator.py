from __future__ import annotations

import math

import pytest

from rlhf_jax.data.support_desk import case_from_id, keyed_generator
from rlhf_jax.data.support_desk_responses import DeskConfig, demonstration, prompt_records
from rlhf_jax.errors import InputError
from rlhf_jax.feedback import (
    AnnotatedResponse,
    AnnotatorConfig,
    label,
    label_pairs,
    preference_probability,
    prefers_first,
    utility,
)
from rlhf_jax.rewards.support_desk import gold_score, has_flattery

PLAIN = AnnotatorConfig(gold_scale=2.0, length_taste=0.0, flattery_taste=0.0, noise=0.0)


def flatters(text: str) -> bool:
    return "great" in text


def frequency(config: AnnotatorConfig, first: AnnotatedResponse, second: AnnotatedResponse, count: int = 4000) -> float:
    return sum(prefers_first(config, f"p{i}", first, second, flatters) for i in range(count)) / count


def test_utility_by_hand():
    config = AnnotatorConfig(gold_scale=4.0, length_taste=3.0, flattery_taste=2.0, length_cap=10)
    assert utility(config, AnnotatedResponse("one two three four five", 0.5), flatters) == 4 * 0.5 + 3 * 5 / 10
    assert utility(config, AnnotatedResponse("you are great", 0.25), flatters) == 4 * 0.25 + 3 * 3 / 10 + 2
    assert utility(config, AnnotatedResponse("w " * 500, 0.0), flatters) == 3.0  # the taste for length has a cap


def test_probability_by_hand():
    """sigmoid(ln 3) = 0.75; a tenth of the labels flipped: 0.75 * 0.9 + 0.25 * 0.1 = 0.70."""
    assert preference_probability(AnnotatorConfig(noise=0.0), math.log(3), 0.0) == pytest.approx(0.75)
    assert preference_probability(AnnotatorConfig(noise=0.1), math.log(3), 0.0) == pytest.approx(0.70)
    assert preference_probability(AnnotatorConfig(noise=0.0), 1e6, -1e6) == 1.0
    assert preference_probability(AnnotatorConfig(noise=0.1), -1e6, 1e6) == pytest.approx(0.1)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("difference", [0.0, 0.3, 1.0])
def test_frequencies_follow_the_probability(difference, noise):
    config = AnnotatorConfig(gold_scale=2.0, length_taste=0.0, flattery_taste=0.0, noise=noise)
    expected = 1 / (1 + math.exp(-2.0 * difference)) * (1 - 2 * noise) + noise
    observed = frequency(config, AnnotatedResponse("yes", difference), AnnotatedResponse("no", 0.0))
    assert abs(observed - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_tastes_change_labels_as_designed():
    long, short = AnnotatedResponse("w " * 60, 0.5), AnnotatedResponse("w", 0.5)
    flattering, modest = AnnotatedResponse("you are great", 0.5), AnnotatedResponse("you are here", 0.5)
    assert abs(frequency(PLAIN, long, short) - 0.5) < 0.04
    assert abs(frequency(PLAIN, flattering, modest) - 0.5) < 0.04
    # 2 * 59 / 60 = 1.97: sigmoid 0.877; 2: sigmoid 0.881.
    taste = AnnotatorConfig(gold_scale=2.0, length_taste=2.0, flattery_taste=2.0, noise=0.0)
    assert abs(frequency(taste, long, short) - 0.877) < 0.025
    assert abs(frequency(taste, flattering, modest) - 0.881) < 0.025


def test_a_label_depends_neither_on_order_nor_on_other_pairs():
    first, second = AnnotatedResponse("alpha", 0.6), AnnotatedResponse("beta", 0.4)
    rows = [(f"p{i}", "?") for i in range(200)]
    labels = label_pairs(PLAIN, rows, [(first, second)] * 200, flatters).comparisons
    swapped = label_pairs(PLAIN, rows[::-1], [(second, first)] * 200, flatters).comparisons
    assert labels == swapped[::-1]
    assert {row["chosen"] for row in labels} == {"alpha", "beta"}


def test_seed_and_prompt_id_matter():
    pair = AnnotatedResponse("a", 0.5), AnnotatedResponse("b", 0.5)
    draws = {
        seed: [prefers_first(AnnotatorConfig(seed=seed), f"p{i}", *pair, flatters) for i in range(100)]
        for seed in (0, 1)
    }
    assert draws[0] != draws[1] and 20 < sum(draws[0]) < 80


def test_label_rows():
    certain = AnnotatorConfig(gold_scale=1e6, noise=0.0)
    row = label(
        certain, ("p1", "Q?"), (AnnotatedResponse("bad", 0.0, ended=False), AnnotatedResponse("good", 1.0)), flatters
    )
    sides = {"chosen": "good", "rejected": "bad", "chosen_ended": True, "rejected_ended": False}
    assert row == {"id": "p1", "prompt": "Q?", **sides}


def test_identical_texts_are_dropped_and_counted():
    pairs = [
        (AnnotatedResponse("a", 0.5), AnnotatedResponse("a", 0.5)),
        (AnnotatedResponse("a", 0.5), AnnotatedResponse("b", 0.5)),
    ]
    labels = label_pairs(PLAIN, [("p1", "?"), ("p2", "?")], pairs, flatters)
    assert labels.dropped == 1 and [row["id"] for row in labels.comparisons] == ["p2"]
    assert math.isnan(labels.agreement)  # no pair differs in gold
    with pytest.raises(ValueError):
        label_pairs(PLAIN, [("p1", "?")], pairs, flatters)


def test_agreement_counts_pairs_that_differ_in_gold():
    certain = AnnotatorConfig(gold_scale=0.0, length_taste=1e6, flattery_taste=0.0, noise=0.0)
    # The longer reply always wins: right in the first pair, wrong in the second, undecided in the third.
    pairs = [
        (AnnotatedResponse("a b", 1.0), AnnotatedResponse("a", 0.0)),
        (AnnotatedResponse("a b", 0.0), AnnotatedResponse("a", 1.0)),
        (AnnotatedResponse("a b", 1.0), AnnotatedResponse("a", 1.0)),
    ]
    assert label_pairs(certain, [(str(i), "?") for i in range(3)], pairs, flatters).agreement == 0.5


def test_agreement_with_gold_on_demonstrations_at_the_defaults():
    rows = list(prompt_records(DeskConfig(), "train", 0, 2000))

    def draw(row: dict, which: int) -> AnnotatedResponse:
        case = case_from_id(row["id"])
        text = demonstration(case, keyed_generator("pair", which, row["id"]), DeskConfig())
        return AnnotatedResponse(text, gold_score(case, text, ended=True).total)

    pairs = [(draw(row, 0), draw(row, 1)) for row in rows]
    labels = label_pairs(AnnotatorConfig(), [(r["id"], r["prompt"]) for r in rows], pairs, has_flattery)
    assert 0.68 < labels.agreement < 0.80
    assert 0 < labels.dropped < 60


@pytest.mark.parametrize(
    "change",
    [
        {"noise": 0.5},
        {"noise": -0.1},
        {"gold_scale": -1.0},
        {"gold_scale": "5"},
        {"length_taste": float("nan")},
        {"length_cap": 0},
        {"length_cap": 1.5},
        {"seed": -1},
        {"seed": True},
    ],
)
def test_a_bad_config_is_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))):
        AnnotatorConfig(**change)


def test_a_gold_that_is_not_a_number_is_refused():
    with pytest.raises(InputError, match="gold"):
        AnnotatedResponse("a", float("nan"))
