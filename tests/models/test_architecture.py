"""Steering has the same effect in llama.cpp and PyTorch for every family, as docs/architectures.md lists."""

from __future__ import annotations

from collections.abc import Mapping

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

from rs_gguf.errors import InputError
from rs_gguf.models.architecture import llama_cpp_name, matrix_input_tensors

pytestmark = pytest.mark.slow

IGNORING = ["Hy4"]


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    return measure(CASES)


def assert_same(agreement: Agreement) -> None:
    assert agreement.apart <= TOLERANCE
    assert agreement.moved >= 100 * agreement.apart  # Steering has an effect, so agreement is not trivial.


@pytest.mark.parametrize("family", [name for name in CASES if name not in IGNORING])
def test_a_hook_is_a_control_vector(measured: dict[str, Measured], family: str) -> None:
    for agreement in measured[family].vectors.values():
        assert_same(agreement)


@pytest.mark.parametrize("family", IGNORING)
def test_some_architectures_ignore_vectors(measured: dict[str, Measured], family: str) -> None:
    """No logit changes. If this fails, llama.cpp can steer these families now: update the page."""
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
    result = measured[family]
    assert result.inputs.keys() <= {matrix for matrix, layers in result.matrices.items() if layers}
    assert all(difference <= INPUT_TOLERANCE for difference in result.inputs.values())


@pytest.mark.parametrize("family", [name for name in CASES if name not in NOT_COMPARED])
def test_check_sees_the_effect(measured: dict[str, Measured], family: str) -> None:
    for check in measured[family].checks:
        assert check.effect_observed, check.reasons


def test_the_page_says_what_was_measured(measured: dict[str, Measured]) -> None:
    assert facts(PAGE.read_text(encoding="utf-8")) == facts(page(measured)), (
        f"{PAGE.name} is out of date: run `PYTHONPATH=tests python -m fixtures.architectures`"
    )


# ---- names ---------------------------------------------------------------------------------------


GRAPHS: dict[str, tuple[list[str], Mapping[str, str]]] = {
    "a SwiGLU layer": (
        ["attn_norm-1", "kqv_out-1", "ffn_swiglu-1", "l_out-1"],
        {"attn_output": "kqv_out", "ffn_down": "ffn_swiglu"},
    ),
    "experts": (["kqv_out-1", "ffn_moe_swiglu-1", "l_out-1"], {"attn_output": "kqv_out"}),
    "a shared expert": (
        ["kqv_out-1", "ffn_moe_topk-1", "ffn_swiglu-1", "l_out-1"],
        {"attn_output": "kqv_out"},
    ),
    "a GELU layer": (["kqv_out-1", "ffn_gelu-1"], {"attn_output": "kqv_out", "ffn_down": "ffn_gelu"}),
    # The graph names the steps in order; the matrix multiplies the last one.
    "a gated GELU": (
        ["kqv_out-1", "ffn_gelu-1", "ffn_act-1", "ffn_gate_par-1"],
        {"attn_output": "kqv_out", "ffn_down": "ffn_gate_par"},
    ),
    "a squared ReLU": (
        ["kqv_out-1", "ffn_relu-1", "ffn_sqr(relu)-1"],
        {"attn_output": "kqv_out", "ffn_down": "ffn_sqr(relu)"},
    ),
    "norms before the matrices": (
        [
            *("kqv_out-1", "norm-1", "attn_sub_norm-1", "attn_out-1", "ffn_inp-1"),
            *("ffn_gate-1", "ffn_up-1", "ffn_sub_out-1", "norm-1", "ffn_sub_norm-1", "ffn_down-1", "l_out-1"),
        ],
        {"attn_output": "attn_sub_norm", "ffn_down": "ffn_sub_norm"},
    ),
    "another layer's tensors": (["kqv_out-1", "ffn_swiglu-11", "ffn_swiglu-0"], {"attn_output": "kqv_out"}),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_writing_matrix_multiplies(name: str) -> None:
    names, expected = GRAPHS[name]
    assert matrix_input_tensors(names, 1) == expected


def test_an_architecture_without_output_matrices_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no matrix of this architecture.*Use a control vector"):
        matrix_input_tensors(["l_out-1", "ssm_out-1"], 1)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen2", "qwen2"),
        ("qwen2_moe", "qwen2moe"),
        ("qwen3_next", "qwen3next"),
        ("gemma3_text", "gemma3"),
        ("gpt_oss", "gpt-oss"),
        ("mistral", "llama"),
        ("deepseek_v3", "deepseek2"),
        ("hunyuan_v1_dense", "hunyuan-dense"),
        ("ernie4_5", "ernie4_5"),
        ("something_else", "something_else"),
    ],
)
def test_names_of_families_are_those_of_llama_cpp(model_type: str, name: str) -> None:
    assert llama_cpp_name(model_type) == name
