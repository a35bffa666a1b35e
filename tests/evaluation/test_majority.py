"""The majority of several answers."""

from __future__ import annotations

from rs_gguf.evaluation.condition import JudgedAnswers
from rs_gguf.evaluation.majority import PROTOCOLS, majority
from rs_gguf.records.conversation import Answer, Judgement

OUTCOMES = {
    "complies": Judgement(-1.0, "invented"),
    "explicit": Judgement(1.0, "invented", "direct"),
    "evasion": Judgement(1.0, "invented", "deflection"),
    "fails": Judgement(1.0, "invented", "nonsense"),
    "unjudged": Judgement(None, "invented"),
}


def draws(*outcomes: str) -> list[JudgedAnswers]:
    """One answer to one prompt for each outcome, drawn in this order."""
    return [
        JudgedAnswers([Answer([], f"{number} {outcome}", True, False)], [OUTCOMES[outcome]], float(number))
        for number, outcome in enumerate(outcomes)
    ]


def chosen(*outcomes: str) -> str:
    (answer,) = majority(draws(*outcomes)).answers
    return answer.text


def test_the_first_answer_of_the_majority_stands_for_all() -> None:
    assert chosen("complies", "explicit", "complies", "evasion", "evasion") == "1 explicit"
    assert chosen("explicit", "complies", "complies", "complies", "evasion") == "1 complies"
    assert chosen("fails", "unjudged", "fails") == "0 fails"


def test_of_equal_votes_the_first_drawn_wins() -> None:
    assert chosen("complies", "evasion") == "0 complies"
    assert chosen("unjudged", "explicit", "complies", "complies", "evasion") == "1 explicit"


def test_one_draw_stays_as_it_is() -> None:
    (one,) = draws("evasion")
    assert majority([one]) == one


def test_the_protocol_of_the_method() -> None:
    protocol = PROTOCOLS["compactifai"]
    assert (protocol.draws, protocol.temperature, protocol.tokens) == (5, 0.6, 512)
