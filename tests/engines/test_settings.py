"""Engine settings reach llama.cpp, have its defaults, and fail with one clear message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from fixtures.tiny_gguf import write_tiny_folder, write_tiny_qwen2

from rs_gguf.engines import open_engine
from rs_gguf.engines.engine import read_last
from rs_gguf.engines.llama import file as llama_file
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.settings import DEFAULTS, EngineSettings
from rs_gguf.errors import InputError

PROMPTS = [np.random.default_rng(length).integers(5, 250, length).tolist() for length in (40, 9, 100)]
LAYERS = [0, 1, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads are 32 wide: one block of a quantised cache."""
    path = tmp_path_factory.mktemp("settings") / "model.gguf"
    write_tiny_qwen2(path, n_embd=64, head=32)
    return path


def run(model: Path, **values: object) -> tuple[np.ndarray, np.ndarray]:
    """Return next-token logits [N, V] and the inputs of the output matrices [N, L, width]."""
    settings = EngineSettings.of({"threads": 1, "ctx_size": 512, **values})
    with LlamaModel(model, n_parallel=4, settings=settings) as loaded:
        logits = {i: row.copy() for i, row in loaded.next_logits(PROMPTS)}
        inputs = read_last(loaded, PROMPTS, LAYERS, ("kqv_out",))["kqv_out"]
        answers = dict(loaded.generate(PROMPTS, max_tokens=4))
    assert len(answers) == len(PROMPTS)
    return np.stack([logits[i] for i in range(len(PROMPTS))]), inputs


def keep_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Return a list that gets the arguments and the result of each call of a function of llama.cpp."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    function: Callable[..., Any] = getattr(llama_cpp, name)

    def kept(*arguments: Any) -> Any:
        result = function(*arguments)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(llama_cpp, name, kept)
    return calls


def test_defaults_are_the_ones_of_llama_cpp() -> None:
    context, model = llama_cpp.llama_context_default_params(), llama_cpp.llama_model_default_params()
    assert context.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    assert (DEFAULTS.flash_attn, DEFAULTS.cache_type_k, DEFAULTS.cache_type_v) == ("auto", "f16", "f16")
    assert context.type_k == context.type_v == llama_cpp.GGML_TYPE_F16
    assert context.n_ubatch == DEFAULTS.batch_size  # a batch is computed at once here
    assert model.n_gpu_layers < 0  # all
    assert DEFAULTS.gpu_layers == "auto"
    assert (model.split_mode, DEFAULTS.split_mode) == (llama_cpp.LLAMA_SPLIT_MODE_LAYER, "layer")
    assert (model.main_gpu, DEFAULTS.main_gpu) == (0, 0)
    assert not model.tensor_split
    assert DEFAULTS.shares == []


def test_sizes_and_threads_are_the_ones_of_the_context(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = keep_calls(monkeypatch, "llama_init_from_model")
    settings = EngineSettings(ctx_size=512, batch_size=48, threads=3)
    with LlamaModel(model, n_parallel=2, settings=settings) as loaded:
        ((_, handle),) = calls
        assert llama_cpp.llama_n_ctx(handle) == loaded.n_ctx == loaded.max_length == 512
        assert llama_cpp.llama_n_batch(handle) == llama_cpp.llama_n_ubatch(handle) == 48
        assert llama_cpp.llama_n_threads(handle) == 3
        assert len(dict(loaded.generate(PROMPTS, max_tokens=4))) == len(PROMPTS)
        ((_, params), _), *_ = calls[1:]
        assert (params.n_batch, params.n_threads, params.n_threads_batch) == (48, 3, 3)


@pytest.mark.parametrize(
    ("flash_attn", "number"),
    [
        ("auto", llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO),
        ("on", llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED),
        ("off", llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),
    ],
)
def test_attention_and_cache_reach_every_context(
    model: Path, monkeypatch: pytest.MonkeyPatch, flash_attn: str, number: int
) -> None:
    calls = keep_calls(monkeypatch, "llama_init_from_model")
    run(model, flash_attn=flash_attn, cache_type_k="q8_0", cache_type_v="f32")
    params = [params for (_, params), _ in calls]
    assert len(params) == 2  # for forward passes, and for answers
    types = {(p.flash_attn_type, p.type_k, p.type_v) for p in params}
    assert types == {(number, llama_cpp.GGML_TYPE_Q8_0, llama_cpp.GGML_TYPE_F32)}


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ({}, ["AUTO", "DISABLED", "AUTO"]),
        ({"flash_attn": "on"}, ["ENABLED", "DISABLED", "ENABLED"]),
        ({"flash_attn": "off"}, ["DISABLED", "AUTO", "DISABLED"]),
        ({"cache_type_v": "q8_0"}, ["AUTO"]),
    ],
    ids=["auto", "on", "off", "quantised values"],
)
def test_a_second_run_sums_attention_in_another_order(
    model: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], order: list[str]
) -> None:
    """One context for answers at a time, with no more memory; quantised values need flash attention."""
    calls = keep_calls(monkeypatch, "llama_init_from_model")
    settings = EngineSettings.of({"threads": 1, "ctx_size": 512, **values})
    with LlamaModel(model, n_parallel=4, settings=settings) as loaded:
        first, second, third = (
            dict(loaded.generate(PROMPTS, max_tokens=4, reordered=reordered))
            for reordered in (False, True, False)
        )
    assert first == third
    assert len(second) == len(PROMPTS)
    numbers = [getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{name}") for name in order]
    assert [params.flash_attn_type for (_, params), _ in calls[1:]] == numbers


def test_flash_attention_changes_logits_no_more_than_rounding_does(model: Path) -> None:
    """Batches of another size move these logits, whose standard deviation is 1.6, by 0.015."""
    (on, inputs_on), (off, inputs_off) = run(model, flash_attn="on"), run(model, flash_attn="off")
    assert 0 < np.abs(on - off).max() < 0.05
    np.testing.assert_allclose(inputs_on, inputs_off, atol=0.05)


def test_a_quantised_cache_changes_logits_a_little(model: Path) -> None:
    plain, inputs = run(model)
    for values in ({"cache_type_k": "q8_0"}, {"cache_type_v": "q8_0"}):
        changed, changed_inputs = run(model, **values)
        assert 0.02 < np.abs(changed - plain).max() < 0.5, values
        assert 0 < np.abs(changed_inputs - inputs).max() < 0.5, values


def test_a_cache_that_the_model_does_not_support_is_one_clear_error(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "narrow.gguf")  # its heads are 8 wide
    with pytest.raises(InputError, match=r"block size 32 does not divide.*leave out --cache-type-k q8_0\."):
        LlamaModel(tmp_path / "narrow.gguf", settings=EngineSettings(threads=1, cache_type_k="q8_0"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flash_attn": "off", "cache_type_v": "q8_0"}, "a cache_type_v of q8_0 needs flash attention, but"),
        ({"flash_attn": "off", "split_mode": "tensor"}, "a split_mode of tensor needs flash attention, but"),
        ({"gpu_layers": "many"}, "gpu_layers: .*auto"),
        ({"gpu_layers": -1}, "gpu_layers: "),
        ({"threads": 1000}, "threads: .*512"),
        ({"cache_type_k": "q2_k"}, "cache_type_k: .*'q8_0'"),
        ({"tensor_split": "3;1"}, "tensor_split: "),
        ({"batch_size": 0, "ctx_size": 0}, "ctx_size: .*batch_size: "),
        ({"gpus": 2}, "gpus: "),
    ],
)
def test_values_that_cannot_work_are_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^engine settings are not valid: {message}"):
        EngineSettings.of(values)


def test_text_and_numbers_give_the_same_settings() -> None:
    values = {"gpu_layers": 20, "threads": 2, "tensor_split": 3}
    settings = EngineSettings.of(values)
    assert settings == EngineSettings.of({key: str(value) for key, value in values.items()})
    assert settings.shares == [3.0]
    assert EngineSettings(tensor_split="3,1.5").shares == [3.0, 1.5]


def test_only_settings_that_change_results_are_options_for_keys() -> None:
    settings = EngineSettings(
        gpu_layers="9",
        threads=2,
        ctx_size=512,
        batch_size=64,
        split_mode="row",
        tensor_split="1,2",
        main_gpu=1,
    )
    assert settings.result_options == DEFAULTS.result_options == ""
    assert settings.for_gpus == ("gpu_layers", "split_mode", "tensor_split", "main_gpu")
    other = EngineSettings(threads=2, flash_attn="on", cache_type_k="q8_0", cache_type_v="f16")
    assert other.result_options == "--flash-attn on --cache-type-k q8_0"


def test_the_bytes_of_a_cached_number() -> None:
    assert DEFAULTS.cache_bytes == 2
    assert EngineSettings(cache_type_k="q8_0", cache_type_v="f32").cache_bytes == (34 / 32 + 4) / 2


# ---- GPUs, on a machine without one ----------------------------------------------------------------

_GPU_SETTINGS = EngineSettings(
    threads=1, ctx_size=256, gpu_layers="2", split_mode="none", main_gpu=0, tensor_split="3,1"
)


def test_without_gpu_support_one_warning_names_what_has_no_effect(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: False)
    llama_file._warn_about_gpus.cache_clear()
    for _ in range(2):
        LlamaModel(model, n_parallel=1, settings=_GPU_SETTINGS).close()
    LlamaModel(model, n_parallel=1, settings=EngineSettings(threads=1, ctx_size=256)).close()
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "no GPU support" in message
    assert "gpu_layers, split_mode, tensor_split." in message


def test_gpu_settings_reach_a_build_with_gpu_support(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build here ignores them, since it finds no GPU."""
    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: True)
    calls = keep_calls(monkeypatch, "llama_model_load_from_file")
    LlamaModel(model, n_parallel=1, settings=_GPU_SETTINGS).close()
    LlamaModel(model, n_parallel=1, settings=EngineSettings(threads=1, gpu_layers="all")).close()
    first, second = (params for (_, params), _ in calls)
    assert (first.n_gpu_layers, first.split_mode, first.main_gpu) == (2, llama_cpp.LLAMA_SPLIT_MODE_NONE, 0)
    assert first.tensor_split[: llama_cpp.llama_max_devices()] == [3.0, 1.0, *[0.0] * 14]
    assert second.n_gpu_layers < 0
    assert not second.tensor_split
    too_many = EngineSettings(tensor_split=",".join("1" * (llama_cpp.llama_max_devices() + 1)))
    with pytest.raises(InputError, match=r"tensor_split has 17 shares; llama\.cpp accepts at most 16"):
        LlamaModel(model, settings=too_many)


def test_pytorch_says_that_it_uses_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_folder(tmp_path)
    open_engine(tmp_path, settings=DEFAULTS).close()
    assert not caplog.records
    open_engine(tmp_path, settings=EngineSettings(threads=2, cache_type_k="q8_0")).close()
    assert "settings of llama.cpp have no effect (threads, cache_type_k)" in caplog.text


@pytest.mark.parametrize("values", [{"cache_type_v": "q8_0"}, {"split_mode": "tensor"}])
def test_where_flash_attention_is_needed_the_order_of_its_sums_stays(values: dict[str, object]) -> None:
    settings = EngineSettings.of(values)
    assert settings.reordered is settings
