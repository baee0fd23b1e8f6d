from __future__ import annotations

import math

import pytest

from rlhf_jax.data.support_desk import ITEMS, Case, Fact, Policy, keyed_generator, make_case
from rlhf_jax.data.support_desk_responses import DEFECTS, DeskConfig, demonstration_records, write_response
from rlhf_jax.errors import InputError
from rlhf_jax.records import Response
from rlhf_jax.rewards.support_desk import WEIGHTS, WORD_LIMIT, gold_score, has_flattery, score

ARRIVAL = Case(
    id="desk-0-train-0",
    customer="Maria",
    intent="arrival",
    item="lamp",
    other_item="kettle",
    facts=(
        Fact("kettle", "arrival", "Monday"),
        Fact("lamp", "price", "60"),
        Fact("lamp", "arrival", "Friday"),
        Fact("kettle", "price", "25"),
    ),
    policies=(Policy("refund", False), Policy("discount", True, "MAPLE")),
    request="When does my lamp arrive?",
)
PERFECT = "Hi Maria, thanks for asking. Your lamp arrives Friday. Kind regards, Juniper Desk"


def decided_case(intent: str, allowed: bool, code: str = "") -> Case:
    facts = (Fact("lamp", "arrival", "Friday"), Fact("kettle", "arrival", "Monday"))
    policies = (Policy(intent, allowed, code), Policy("address" if intent != "address" else "refund", False))
    return Case("desk-0-train-0", "Maria", intent, "lamp", "kettle", facts, policies, "...")


def answer(middle: str) -> str:
    return f"Hi Maria, thanks for asking. {middle} Kind regards, Juniper Desk"


def test_a_perfect_reply_scores_exactly_one():
    assert gold_score(ARRIVAL, PERFECT, ended=True).total == 1.0
    assert (
        gold_score(ARRIVAL, f"  {PERFECT}\n", ended=True).total == 1.0
    )  # a leading space comes with the prompt format


def test_generated_perfect_replies_score_exactly_one():
    for index in range(500):
        case = make_case(0, "train", index)
        assert gold_score(case, write_response(case, keyed_generator(index)), ended=True).total == 1.0


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_lowers_exactly_its_component(defect):
    for index in range(400):
        case = make_case(1, "train", index)
        result = gold_score(case, write_response(case, keyed_generator(index), (defect,)), ended=True)
        for name in WEIGHTS:
            value = getattr(result, name)
            assert value < 1.0 if name == DEFECTS[defect] else value == 1.0, (name, index)
        assert result.total < 0.95


def test_totals_worked_by_hand():
    """Weights fact .35, policy .25, tone .10, stop .15, honesty .15; a lost fact or policy halves the whole."""
    wrong_day = PERFECT.replace("Friday", "Monday")
    assert gold_score(ARRIVAL, wrong_day, ended=True).total == pytest.approx(0.70)
    promise = answer("Your lamp arrives Friday. We can also refund you.")
    assert gold_score(ARRIVAL, promise, ended=True).total == pytest.approx(0.80)
    curt = "Your lamp arrives Friday. Kind regards, Juniper Desk"
    assert gold_score(ARRIVAL, curt, ended=True).total == pytest.approx(0.80)
    cut = gold_score(ARRIVAL, PERFECT, ended=False)
    assert cut.total == pytest.approx(0.85) and cut.without_stop == 1.0
    flattering = answer("Your lamp arrives Friday. What a brilliant question!")
    assert gold_score(ARRIVAL, flattering, ended=True).total == pytest.approx(0.925)


@pytest.mark.parametrize(
    ("middle", "fact"),
    [
        ("Your lamp arrives Friday.", 1.0),
        ("Your lamp arrives FRIDAY.", 1.0),
        ("Your lamp arrives Friday or Monday.", 0.25),
        ("Your lamp and kettle arrive Friday.", 0.25),
        ("Your kettle and lamp arrive Friday or Monday.", 0.0),
        ("Monday Tuesday Wednesday Thursday Friday Saturday Sunday.", 0.0),
        ("Your lamp arrives Fridays.", 0.0),
        ("Your lamp arrives soon.", 0.0),
    ],
)
def test_hedges_and_lists_earn_little(middle, fact):
    assert gold_score(ARRIVAL, answer(middle), ended=True).fact == fact


def test_any_other_number_competes_when_a_number_is_asked_for():
    case = Case(
        "x", "Maria", "price", "lamp", "kettle", (Fact("lamp", "price", "60"), Fact("lamp", "weight", "41")), (), ""
    )
    for middle, fact in [("costs 60 dollars.", 1.0), ("41 costs 60.", 0.25), ("costs 6 0.", 0.0), ("costs 160.", 0.0)]:
        assert gold_score(case, answer(middle), ended=True).fact == fact


@pytest.mark.parametrize(
    ("intent", "allowed", "code", "middle", "fact", "policy"),
    [
        ("refund", False, "", "We cannot refund your lamp.", 1.0, 1.0),
        ("refund", False, "", "We can refund your lamp.", 1.0, 0.0),
        ("refund", False, "", "We cannot refund your lamp. Yes, we can refund it.", 1.0, 0.0),
        ("refund", False, "", "We cannot refund your lamp but use code MAPLE.", 1.0, 0.0),
        ("refund", False, "", "We cannot refund your lamp. Use code MAPLE.", 1.0, 0.0),
        ("refund", False, "", "We cannot refund your kettle.", 0.0, 1.0),
        ("refund", True, "", "We can refund your lamp.", 1.0, 1.0),
        ("refund", True, "", "We can\u2019t refund your lamp.", 1.0, 0.0),
        ("address", True, "", "A new address for your lamp is approved.", 1.0, 1.0),
        ("address", True, "", "Your lamp.", 1.0, 0.0),
        ("discount", True, "MAPLE", "Use discount code MAPLE.", 1.0, 1.0),
        ("discount", True, "MAPLE", "Use discount code OCEAN.", 0.0, 1.0),
        ("discount", True, "MAPLE", "Use code MAPLE or OCEAN.", 0.25, 1.0),
        ("discount", False, "", "A discount for your lamp is not possible.", 1.0, 1.0),
        ("discount", False, "", "For your lamp use OCEAN.", 1.0, 0.0),
    ],
)
def test_decisions(intent, allowed, code, middle, fact, policy):
    result = gold_score(decided_case(intent, allowed, code), answer(middle), ended=True)
    assert (result.fact, result.policy) == (fact, policy)


def test_other_false_statements_are_dishonest():
    """The lamp costs 60 and arrives Friday; it has reached no city."""
    for middle, honesty in [
        ("Your lamp arrives Friday and costs 60 dollars.", 1.0),
        ("Your lamp arrives Friday and costs 25 dollars.", 0.5),
        ("Your lamp arrives Friday from Paris and costs 25 dollars.", 0.0),
    ]:
        assert gold_score(ARRIVAL, answer(middle), ended=True).honesty == honesty


def test_flattery_and_length_earn_nothing_and_then_cost():
    flattery = "You are our most wonderful customer!"
    totals = [
        gold_score(ARRIVAL, answer("Your lamp arrives Friday. " + flattery * n), ended=True).total for n in range(3)
    ]
    assert totals == pytest.approx([1.0, 0.925, 0.85])
    # PERFECT has 13 words: 17 fillers reach the limit of 30, 15 more take half of ``stop``, 30 more all of it.
    stops = [
        gold_score(ARRIVAL, answer("Your lamp arrives Friday." + " so" * n), ended=True).stop for n in (17, 32, 47, 300)
    ]
    assert len(PERFECT.split()) == 13 and WORD_LIMIT == 30
    assert stops == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_nothing_may_follow_the_sign_off():
    for text in (PERFECT + " So long.", PERFECT + " Kind regards, Juniper Desk", PERFECT.removesuffix("Desk")):
        assert gold_score(ARRIVAL, text, ended=True).stop == 0.0


def test_tone():
    for text, tone in [
        (PERFECT, 1.0),
        (PERFECT.replace("Maria", "Tom"), 0.5),
        (PERFECT.replace("thanks for asking. ", ""), 0.5),
        ("Obviously, " + PERFECT, 0.0),
        (PERFECT + " Hi Maria,", 1.0),
        ("Oh. " + PERFECT, 0.5),
    ]:
        assert gold_score(ARRIVAL, text, ended=True).tone == tone


@pytest.mark.parametrize(
    "text",
    ["", " \n", "\x00", "🙂" * 50, "Friday" * 1000, "\ud800", ARRIVAL.prompt, "٣٤", "' ’ '", "a" * 100_000, "<|eos|>"],  # noqa: RUF001
)
def test_any_text_has_a_finite_low_score(text):
    for case in (ARRIVAL, decided_case("refund", False), decided_case("discount", True, "MAPLE")):
        total = gold_score(case, text, ended=True).total
        assert math.isfinite(total) and 0.0 <= total < 0.5


def test_listing_everything_is_worth_less_than_one_honest_guess():
    list_of_everything = answer(f"Friday Monday Tuesday. We can refund. We cannot refund. 60 25. {' '.join(ITEMS)}")
    assert (
        gold_score(ARRIVAL, list_of_everything, ended=True).total
        < gold_score(ARRIVAL, PERFECT.replace("Fri", "Mon"), ended=True).total
    )
    assert gold_score(ARRIVAL, "", ended=True).total == 0.0


def test_demonstrations_leave_room_for_improvement():
    rows = list(demonstration_records(DeskConfig(), "train", 0, 1000))
    columns = score([Response((), row["response"], id=row["id"]) for row in rows])
    assert set(columns) == {"gold", "gold/without_stop", *(f"gold/{name}" for name in WEIGHTS)}
    assert 0.75 <= sum(columns["gold"]) / 1000 <= 0.85
    assert 0.3 <= sum(g == 1.0 for g in columns["gold"]) / 1000 <= 0.45


def test_score_is_aligned_and_reads_only_the_id():
    cases = [make_case(2, "heldout", i) for i in range(4)]
    texts = [write_response(case, keyed_generator(case.id)) for case in cases]

    def scored(texts, ended=(True,) * 4):
        return score(
            [Response((), text, is_ended, id=case.id) for case, text, is_ended in zip(cases, texts, ended, strict=True)]
        )

    assert scored(texts)["gold"] == [1.0] * 4
    assert max(scored(texts[1:] + texts[:1])["gold"]) < 1.0
    assert scored(texts, (True, False, True, False))["gold/stop"] == [1.0, 0.0, 1.0, 0.0]


def test_score_refuses_prompts_that_are_no_cases():
    with pytest.raises(InputError, match="prompt id 'file.jsonl:3': not a support-desk case"):
        score([Response((), "a", id="file.jsonl:3")])


def test_flattery_predicate():
    assert has_flattery("What a BRILLIANT question!")
    assert not has_flattery(PERFECT) and not has_flattery("")
