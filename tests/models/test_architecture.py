"""Steering in llama.cpp is steering in PyTorch, in every family, and docs/architectures.md says so."""

from __future__ import annotations

import pytest
from fixtures.architectures import (
    INPUT_TOLERANCE,
    NOT_COMPARED,
    PAGE,
    TOLERANCE,
    Agreement,
    Measured,
    facts,
    measure,
    page,
)
from fixtures.families import CASES

pytestmark = pytest.mark.slow

IGNORING = ["Hy4"]


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    return measure(CASES)


def assert_same(agreement: Agreement) -> None:
    assert agreement.apart <= TOLERANCE
    assert agreement.moved >= 100 * agreement.apart  # not equal because nothing happens


@pytest.mark.parametrize("family", [name for name in CASES if name not in IGNORING])
def test_a_hook_is_a_control_vector(measured: dict[str, Measured], family: str) -> None:
    for agreement in measured[family].vectors.values():
        assert_same(agreement)


@pytest.mark.parametrize("family", IGNORING)
def test_some_architectures_ignore_vectors(measured: dict[str, Measured], family: str) -> None:
    """Not a logit moves. When this fails, llama.cpp has learnt to steer them: good news for the page."""
    assert measured[family].ignores_vectors
    (reason,) = measured[family].checks[0].reasons
    assert "ignores control vectors" in reason


@pytest.mark.parametrize("family", [name for name in CASES if name not in NOT_COMPARED])
def test_an_adapter_is_a_change_of_the_weights(measured: dict[str, Measured], family: str) -> None:
    assert any(measured[family].matrices.values())
    for agreement in measured[family].adapters.values():
        assert_same(agreement)


@pytest.mark.parametrize("family", [name for name in CASES if name not in NOT_COMPARED])
def test_what_is_read_is_what_the_matrix_multiplies(measured: dict[str, Measured], family: str) -> None:
    found = measured[family]
    assert found.inputs.keys() <= {writer for writer, blocks in found.matrices.items() if blocks}
    assert all(apart <= INPUT_TOLERANCE for apart in found.inputs.values())


@pytest.mark.parametrize("family", [name for name in CASES if name not in NOT_COMPARED])
def test_check_sees_the_effect(measured: dict[str, Measured], family: str) -> None:
    for found in measured[family].checks:
        assert found.effect_observed, found.reasons


def test_the_page_says_what_was_measured(measured: dict[str, Measured]) -> None:
    assert facts(PAGE.read_text(encoding="utf-8")) == facts(page(measured)), (
        f"{PAGE.name} is out of date: run `PYTHONPATH=tests python -m fixtures.architectures`"
    )
