"""Steering has the same effect in llama.cpp and PyTorch for every family, as docs/architectures.md lists."""

from __future__ import annotations

import pytest
from fixtures.architectures import (
    EXPERTS,
    FITTED,
    FITTED_TOLERANCE,
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

from rs_gguf.models.architecture import (
    is_output_matrix,
    llama_cpp_name,
    matrix_places,
    split_name,
    tensor_name,
)

pytestmark = pytest.mark.slow

IGNORING = ["Hy4"]


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    return measure(CASES)


def assert_same(agreement: Agreement, tolerance: float = TOLERANCE) -> None:
    assert agreement.apart <= tolerance
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
    for label, agreement in measured[family].adapters.items():
        assert_same(agreement, FITTED_TOLERANCE if label == FITTED else TOLERANCE)


@pytest.mark.parametrize("family", [name for name in CASES if name not in NOT_COMPARED])
def test_what_is_read_is_what_the_matrix_multiplies(measured: dict[str, Measured], family: str) -> None:
    result = measured[family]
    assert result.inputs.keys() == {
        matrix for matrix, layers in result.matrices.items() if layers and matrix != EXPERTS
    }
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


Shapes = dict[str, tuple[int, ...]]
ATTENTION: Shapes = {"attn_output": (24, 16), "ffn_down": (48, 16)}
STATE: Shapes = {"ssm_out": (32, 16), "ffn_down": (48, 16)}
# Layers, and the width and the layers of each matrix.
PLACES: dict[str, tuple[list[Shapes], dict[str, tuple[int, tuple[int, ...]]]]] = {
    "the same in all layers": (
        [ATTENTION, ATTENTION],
        {"attn_output": (24, (0, 1)), "ffn_down": (48, (0, 1))},
    ),
    "linear attention in some": (
        [STATE, ATTENTION, STATE],
        {"attn_output": (24, (1,)), "ffn_down": (48, (0, 1, 2)), "ssm_out": (32, (0, 2))},
    ),
    "both in one layer": (
        [ATTENTION | STATE],
        {"attn_output": (24, (0,)), "ffn_down": (48, (0,)), "ssm_out": (32, (0,))},
    ),
    "dense layers among experts": (
        [{"ffn_down": (48, 16)}, {"ffn_down_exps": (8, 16, 4), "ffn_down_shexp": (8, 16)}],
        {"ffn_down": (48, (0,)), "ffn_down_shexp": (8, (1,))},
    ),
    "two widths": (
        [{"attn_output": (24, 16)}, {"attn_output": (48, 16)}, {"attn_output": (24, 16)}],
        {"attn_output/24": (24, (0, 2)), "attn_output/48": (48, (1,))},
    ),
    "convolutions": (
        [{"shortconv.out_proj": (16, 16), "attn_q": (16, 16)}],
        {"shortconv.out_proj": (16, (0,))},
    ),
    "no output matrix": ([{"time_mix_output": (16, 16)}], {}),
}


@pytest.mark.parametrize("name", PLACES)
def test_output_matrices_are_found_layer_by_layer(name: str) -> None:
    layers, expected = PLACES[name]
    found = matrix_places("llama", dict(enumerate(layers)))
    assert {key: (place.width, place.layers) for key, place in found.items()} == expected
    for key, (_, numbers) in expected.items():
        for layer in numbers:
            tensor = tensor_name(key, layer)
            assert is_output_matrix(tensor)
            assert split_name(tensor) == (layer, key.partition("/")[0])


def test_matrices_that_llama_cpp_multiplies_without_an_adapter_are_left_out() -> None:
    assert matrix_places("kimi-linear", {0: ATTENTION}).keys() == {"ffn_down"}


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
