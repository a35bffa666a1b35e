"""Test that a plan counts what the stages do.

Dimensions are compared with PyTorch and published sizes, prompts and bytes with a run, and seconds with
machines of known speed.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from fixtures.tiny_gguf import write_tiny_qwen2
from gguf import GGUFReader, GGUFWriter
from torch.utils.flop_counter import FlopCounterMode

from rs_gguf.cli.main import main
from rs_gguf.engines.engine import Can
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.evaluation import kl
from rs_gguf.judges.local import KeywordJudge
from rs_gguf.methods import suited_methods
from rs_gguf.models import catalogue, dimensions
from rs_gguf.models import resolve as models
from rs_gguf.models.architecture import searched_layers
from rs_gguf.models.dimensions import ModelDimensions
from rs_gguf.pipeline import costs, recipe
from rs_gguf.pipeline import speed as speeds
from rs_gguf.pipeline.plan import Plan, judge_of, plan, stored
from rs_gguf.pipeline.run import run
from rs_gguf.pipeline.speed import JudgeModel, Speed
from rs_gguf.pipeline.stages import measure
from rs_gguf.prompts import grid as prompts
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import Prompt
from rs_gguf.steering.container import finish

N_LAYER, WIDTH = 3, 32
FILES = len(suited_methods(~Can(0), "remove"))
UNIT = Speed(read=1e-3, begin=1e-3, answer=1e-3, judge=1e-3, algebra=math.inf, source="")
PLANNED = [name for name in STAGES if name != "report"]  # which takes only seconds


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=N_LAYER, n_embd=WIDTH)
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    return write_tiny_qwen2(tmp_path_factory.mktemp("plan") / "same.gguf", n_layer=N_LAYER, n_embd=WIDTH)


# ---- dimensions --------------------------------------------------------------------------------------


def test_dimensions_of_a_file_are_those_of_its_network(tiny: Path, network: Any) -> None:
    result = dimensions.of_gguf(tiny)
    blocks = sum(p.numel() for n, p in network.named_parameters() if ".layers." in n)
    assert (result.n_layer, result.width, result.n_vocab) == (N_LAYER, WIDTH, network.config.vocab_size)
    assert (result.dense, result.experts, result.head) == (blocks, 0, network.lm_head.weight.numel())
    assert result.output_matrices == {"attn_output": WIDTH, "ffn_down": 2 * WIDTH}
    assert result.weights == tiny.stat().st_size
    with torch.inference_mode():
        output = network(torch.zeros((1, 5), dtype=torch.long), use_cache=True)
    kept = output.get("cache") or output.get("past_key_values")  # by the version of transformers
    assert result.cache * 5 == sum(layer.keys.numel() + layer.values.numel() for layer in kept.layers)


def test_a_file_and_its_configuration_have_the_same_dimensions(tiny: Path, network: Any) -> None:
    assert dimensions.of_config(network.config, 32) == replace(
        dimensions.of_gguf(tiny), weights=4 * sum(p.numel() for p in network.parameters())
    )


def parameters(model: LlamaModel) -> int:
    """Return the number of parameters of a loaded model, as llama.cpp counts them."""
    return int(llama_cpp.llama_model_n_params(model.handle))


def total(result: ModelDimensions) -> int:
    """Return the same number from dimensions, with the embedding and the norm before the output."""
    return result.dense + result.experts + result.head + result.n_vocab * result.width + result.width


def test_llama_cpp_counts_the_same(tiny: Path) -> None:
    with LlamaModel(tiny, n_parallel=1, n_ctx=256) as model:
        assert parameters(model) == total(dimensions.of_gguf(tiny))


def test_operations_equal_those_that_pytorch_counts(network: Any) -> None:
    tokens = 7
    network = transformers.AutoModelForCausalLM.from_config(network.config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros((1, tokens), dtype=torch.long))
    result = dimensions.of_config(network.config, 32)
    vectors = sum(p.numel() for p in network.model.layers.parameters() if p.ndim == 1)  # no products
    planned = tokens * (result.flops(tokens) + 2 * result.head - 2 * vectors)
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-9)


_QWEN3: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("config", "stored", "active", "cache"),
    [  # billions of parameters without embeddings, and of active ones with embeddings, as published
        (
            transformers.Qwen3Config(
                **_QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                num_attention_heads=32, num_key_value_heads=8,
            ),
            6.95, 8.2, 36 * 2 * 8 * 128,
        ),
        (
            transformers.Qwen3MoeConfig(
                **_QWEN3, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
                num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
            ),
            29.9, 3.3, 48 * 2 * 4 * 128,
        ),
        (
            transformers.Qwen3NextConfig(
                **_QWEN3 | {"head_dim": 256}, hidden_size=2048, num_hidden_layers=48, num_attention_heads=16,
                num_key_value_heads=2, num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512,
                shared_expert_intermediate_size=512, linear_num_key_heads=16, linear_num_value_heads=32,
                linear_key_head_dim=128, linear_value_head_dim=128,
            ),
            79, 3.9, 12 * 2 * 2 * 256,  # keys and values in one block of four
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_published_sizes_of_large_models(
    config: transformers.PretrainedConfig, stored: float, active: float, cache: int
) -> None:
    result = dimensions.of_config(config, 4.85)
    assert (result.dense + result.experts) / 1e9 == pytest.approx(stored, rel=0.01)
    assert (result.active + 2 * result.head) / 1e9 == pytest.approx(active, rel=0.03)
    assert result.cache == cache
    assert result.weights == pytest.approx(
        (result.dense + result.experts + 2 * result.head) * 4.85 / 8, rel=1e-3
    )
    # Experts of which a token uses some get no gate vector.
    layers = {matrix: len(result.layers_with(matrix)) for matrix in result.output_matrices}
    assert layers == {
        "qwen3": {"attn_output": 36, "ffn_down": 36}, "qwen3_moe": {"attn_output": 48},
        "qwen3_next": {"attn_output": 12, "ffn_down_shexp": 48, "ssm_out": 36},
    }[config.model_type]  # fmt: skip


def test_a_step_reads_the_experts_that_at_least_one_token_uses() -> None:
    shape = ModelDimensions(
        1, 1, 1, 100, 6400, 8 / 64, 0, weights=13_000, attention=0, cache=0, output_matrices={}
    )
    rng = np.random.default_rng(0)
    for tokens in (1, 4, 32):
        used = [
            len({expert for _ in range(tokens) for expert in rng.choice(64, 8, replace=False)})
            for _ in range(400)
        ]
        assert shape.bytes_read(tokens) == pytest.approx(2 * (100 + 100 * np.mean(used)), rel=0.02)


def _file(path: Path, family: str, tensors: dict[str, tuple[int, ...]], **values: float) -> Path:
    """Write a header with tensors of these shapes (outputs first), without data."""
    writer = GGUFWriter(path, family)
    for key, value in values.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{family}.{key}", value)
    for name, shape in tensors.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def test_experts_fused_attention_and_latents(tmp_path: Path) -> None:
    block = {
        "attn_output.weight": (16, 24), "ffn_gate_inp.weight": (4, 16), "ffn_up_exps.weight": (4, 8, 16),
        "ffn_down_exps.weight": (4, 16, 8), "ffn_down_shexp.weight": (16, 8),
    }  # fmt: skip
    one = {f"blk.0.{name}": shape for name, shape in block.items()} | {"blk.0.attn_qkv.weight": (40, 16)}
    two = {f"blk.1.{name}": shape for name, shape in block.items()} | {"blk.1.attn_kv_a_mqa.weight": (5, 16)}
    sizes = {"block_count": 2, "embedding_length": 16, "expert_count": 4, "expert_used_count": 1}
    result = dimensions.of_gguf(
        _file(tmp_path / "m.gguf", "moe", {"token_embd.weight": (99, 16), **one, **two}, **sizes)
    )
    assert result.experts == 2 * 2 * 4 * 8 * 16
    assert result.dense == 2 * (16 * 24 + 4 * 16 + 16 * 8) + 40 * 16 + 5 * 16
    assert result.active == result.dense + result.experts / 4
    assert result.cache == (40 - 24) + 5
    assert (result.attention, result.head) == (2 * 24, 99 * 16)  # tied: the embedding is the output too
    assert result.output_matrices == {"attn_output": 24, "ffn_down_shexp": 8}
    assert result.matrix_inputs == 2 * (24 + 8)
    assert result.searched_inputs == 24 + 8  # of layer 1: the search leaves layer 0 as it is


@pytest.mark.parametrize(
    ("first", "second", "writers"),
    [
        (  # DeepSeek: experts from the second layer on
            {"attn_output": (16, 24), "ffn_down": (16, 48)},
            {"attn_output": (16, 24), "ffn_down_exps": (4, 16, 8)},
            {"attn_output": (24, [0, 1]), "ffn_down": (48, [0])},
        ),
        (  # LFM2: convolutions instead of attention
            {"shortconv.out_proj": (16, 16), "ffn_down": (16, 48)},
            {"attn_output": (16, 16), "ffn_down": (16, 48)},
            {"attn_output": (16, [1]), "ffn_down": (48, [0, 1]), "shortconv.out_proj": (16, [0])},
        ),
        (  # OpenELM: layers of different widths
            {"attn_output": (16, 12), "ffn_down": (16, 32)},
            {"attn_output": (16, 16), "ffn_down": (16, 48)},
            {
                "attn_output/12": (12, [0]), "attn_output/16": (16, [1]),
                "ffn_down/32": (32, [0]), "ffn_down/48": (48, [1]),
            },
        ),
        (
            {"ssm_out": (16, 16)},
            {"attn_output": (16, 16)},
            {"attn_output": (16, [1]), "ssm_out": (16, [0])},
        ),
    ],
)  # fmt: skip
def test_an_adapter_changes_the_matrices_of_each_layer(
    first: dict[str, tuple[int, ...]], second: dict[str, tuple[int, ...]],
    writers: dict[str, tuple[int, list[int]]], tmp_path: Path,
) -> None:  # fmt: skip
    blocks = {
        f"blk.{n}.{name}.weight": s for n, block in enumerate((first, second)) for name, s in block.items()
    }
    tensors = {"token_embd.weight": (99, 16), **blocks}
    result = dimensions.of_gguf(
        _file(tmp_path / "m.gguf", "mixed", tensors, block_count=2, embedding_length=16)
    )
    found = {key: (width, [*result.layers_with(key)]) for key, width in result.output_matrices.items()}
    assert found == writers


def test_layers_that_llama_cpp_does_not_run_are_not_counted(tiny: Path, tmp_path: Path) -> None:
    """The last layer predicts one more token ahead."""
    block = {"attn_output.weight": (16, 24), "ffn_down.weight": (16, 48)}
    tensors: dict[str, tuple[int, ...]] = {
        f"blk.{n}.{name}": shape for n in range(2) for name, shape in block.items()
    }
    tensors |= {"token_embd.weight": (99, 16), "blk.2.nextn.eh_proj.weight": (16, 32)}
    values = {"block_count": 3, "embedding_length": 16, "nextn_predict_layers": 1}
    result = dimensions.of_gguf(_file(tmp_path / "m.gguf", "mixed", tensors, **values))
    assert (result.n_layer, result.dense) == (2, 2 * (16 * 24 + 16 * 48))
    assert result.output_matrices == {"attn_output": 24, "ffn_down": 48}

    # llama.cpp loads a file without the tensors of that layer.
    reader, writer = GGUFReader(tiny), GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "qwen2.block_count"):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    writer.add_block_count(N_LAYER + 1)
    writer.add_uint32("qwen2.nextn_predict_layers", 1)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    finish(writer)
    with LlamaModel(tmp_path / "tiny.gguf", n_parallel=1, n_ctx=256) as model:
        assert model.n_layer == dimensions.of_gguf(model.path).n_layer == N_LAYER


def test_a_header_cut_anywhere_is_one_error_or_gives_the_dimensions(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    reader = GGUFReader(tiny)
    end = reader.data_offset
    expected = dimensions.of_gguf(tiny)
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:end])  # without the weights
    assert replace(dimensions.of_gguf(path), weights=expected.weights) == expected
    for size in [0, 3, 8, 20, *range(24, end - 64, 97)]:
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"cut\.gguf"):
            dimensions.of_gguf(path)


@pytest.mark.parametrize(
    ("tensors", "values"),
    [
        ({"token_embd.weight": (9, 4)}, {"block_count": 1}),
        ({"output.weight": (9, 4)}, {"block_count": 1, "embedding_length": 4}),
        ({"token_embd.weight": (9,)}, {"block_count": 1, "embedding_length": 4}),
        (
            {"token_embd.weight": (9, 4), "blk.0.attn_output.weight": (4, 4), "blk.0.attn_k.weight": (4,)},
            {"block_count": 1, "embedding_length": 4},
        ),
        ({"token_embd.weight": (9, 4)}, {"block_count": math.inf, "embedding_length": 4}),
        (
            {"token_embd.weight": (9, 4)},
            {"block_count": 1, "embedding_length": 4, "expert_count": 4, "expert_used_count": 8},
        ),
        (
            {"token_embd.weight": (9, 4), "output.weight": (0, 4)},
            {"block_count": 1, "embedding_length": 4},
        ),
    ],
)
def test_a_header_without_a_language_model(
    tensors: dict[str, tuple[int, ...]], values: dict[str, float], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"m\.gguf"):
        dimensions.of_gguf(_file(tmp_path / "m.gguf", "none", tensors, **values))


def test_a_wrong_header_is_one_error(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()[: GGUFReader(tiny).data_offset]
    rng = np.random.default_rng(0)
    path = tmp_path / "wrong.gguf"
    for _ in range(200):
        wrong = bytearray(data)
        for place in rng.integers(4, 400, 3):
            wrong[place] = rng.integers(256)
        path.write_bytes(wrong)
        with contextlib.suppress(InputError):  # any other exception fails the test
            dimensions.of_gguf(path)


# ---- counts ------------------------------------------------------------------------------------------


def planned(
    shape: ModelDimensions, *wanted: str, speed: Speed = UNIT, judge: JudgeModel | None = None
) -> Plan:
    # All answers have the length of those to tune prompts, unless a test wants it otherwise.
    return plan(recipe.load(None, ["answers.fit_tokens=24", *wanted]), shape, speed, judge)


@pytest.fixture(scope="module")
def shape(tiny: Path) -> ModelDimensions:
    return dimensions.of_gguf(tiny)


@pytest.mark.slow
def test_tokens_and_bytes_equal_those_of_a_run(tiny: Path, shape: ModelDimensions, tmp_path: Path) -> None:
    wanted = [f"model={tiny}", "prompts.fit=40", "prompts.gate_only=20", "prompts.tune=8"]
    wanted += ["answers.check=false", "answers.fit_tokens=8", "answers.tokens=8", "judge=keywords"]
    run(recipe.load(None, wanted), tmp_path, until="capture")
    result = planned(shape, *wanted)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().split("\n")[:-1]]
    assert result.prompts["fit"] + result.prompts["tune"] == len(rows) == 144
    assert result.prompts["gate_only"] == 60
    answer = result.stages["answer"]
    # Random weights hardly ever end an answer; the plan assumes 13% fewer tokens, for a trained model.
    assert answer.answered == pytest.approx(sum(len(row["tokens"]) for row in rows), rel=0.2)
    assert answer.disk == pytest.approx((tmp_path / "answers.jsonl").stat().st_size, rel=0.2)
    captured = sum(file.stat().st_size for file in (tmp_path / "activations").iterdir())
    assert result.stages["capture"].disk == pytest.approx(captured, rel=0.1)


@pytest.mark.real
def test_parameters_of_the_default_model_are_counted() -> None:
    path = models.pull(models.DEFAULT)
    with LlamaModel(path, n_parallel=1, n_ctx=256) as model:
        assert parameters(model) == total(dimensions.of_gguf(path))
        texts = [prompt.prompt for prompt in prompts.grid()]
        tokens = sum(len(model.tokenize(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert size / tokens == pytest.approx(speeds.BYTES_PER_TOKEN, rel=0.05)


@pytest.mark.parametrize(
    ("changed", "growth"),
    [
        (("prompts.fit=180",), {"capture": 2.0, "measure": 1.0, "tune": 1.0}),
        (("prompts.gate_only=90",), {"capture": 2.04, "answer": 1.0, "measure": 1.0}),
        (("prompts.validation=60",), {"measure": 2.0, "answer": 1.0, "capture": 1.0}),
        (("answers.temperature=1",), dict.fromkeys(PLANNED, 1.0)),
        (("measure.baselines=[]",), {"measure": (1 + FILES) / (2 + FILES), "answer": 1.0}),
        (("tune.budget=2h",), {"answer": 1.0, "write": 1.0}),
        (("answers.servers=http://a:1",), {"answer": 0.0, "score": 1.0, "tune": 1.0}),
    ],
)
def test_costs_of_stages_grow_with_their_inputs(
    shape: ModelDimensions,
    changed: tuple[str, ...],
    growth: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_kl(monkeypatch)
    fixed = "prompts.gate_only=0", "measure.baselines=['rmd']"
    before, after = (planned(shape, *fixed, *values) for values in ((), changed))
    for stage, factor in growth.items():
        assert after.stages[stage].seconds == pytest.approx(factor * before.stages[stage].seconds, rel=0.02)
    if "tune.budget=2h" in changed:
        assert after.stages["tune"].seconds == pytest.approx(7200)


def without_kl(patch: pytest.MonkeyPatch) -> None:
    """Leave out the prompts that the KL divergence reads: their number does not follow any size."""
    patch.setattr(measure, "tokens_read", lambda *_: 0.0)


def test_the_kl_divergence_of_each_file_is_counted(
    shape: ModelDimensions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kl = planned(shape).stages["measure"].seconds
    pool = prompts.pool(recipe.load().prompts.files)
    tokens = kl.tokens_read(costs.Costs(recipe.load(), pool, shape, UNIT, None).prompt, FILES)
    without_kl(monkeypatch)
    without = planned(shape).stages["measure"].seconds
    assert with_kl - without == pytest.approx(tokens * UNIT.read)


def test_changed_prompts_are_answered_again_under_every_condition(shape: ModelDimensions) -> None:
    result = planned(shape, "measure.baselines=['rmd']")
    n, sides = result.prompts["validation"], 2 + FILES
    again = 0.18 * n
    assert result.stages["measure"].answered == pytest.approx(sides * (n + again) * costs.mean_length(100))


def test_each_baseline_is_one_more_condition_and_wordings_answer_tune_prompts(
    shape: ModelDimensions, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kl(monkeypatch)
    none, one, three, prompted = (
        planned(shape, f"measure.baselines={names}", "tune.full_prompts=8").stages["measure"]
        for names in ([], ["rmd"], ["md", "rmd", "wrmd"], ["system-prompt", "rmd", "wrmd"])
    )
    assert none.seconds == pytest.approx((1 + FILES) / (2 + FILES) * one.seconds, rel=0.02)
    assert none.seconds == pytest.approx((1 + FILES) / (4 + FILES) * three.seconds, rel=0.05)
    # Six wordings answer 8 prompts of each kind.
    assert prompted.answered - three.answered == pytest.approx(6 * 3 * 8 * costs.mean_length(24))
    assert prompted.seconds > three.seconds


def test_full_answers_of_the_search_are_counted(shape: ModelDimensions) -> None:
    """0, 8 and 16 prompts per kind are answered unsteered; 60% of them with every file at two strengths."""
    none, few, more = (
        planned(shape, f"tune.full_prompts={n}", "answers.test_tokens=200").stages["tune"] for n in (0, 8, 16)
    )
    assert more.seconds > few.seconds > none.seconds
    assert (few.answered - none.answered) == pytest.approx((1 + 1.2 * FILES) * 3 * 8 * costs.mean_length(200))
    assert (more.answered - none.answered) == pytest.approx(
        (1 + 1.2 * FILES) * 3 * 16 * costs.mean_length(200)
    )
    # The budget does not limit them.
    least = planned(shape, "tune.budget=0", "tune.full_prompts=16", "answers.test_tokens=200").stages["tune"]
    assert 0 < least.seconds < more.seconds - none.seconds + 1e-6


def test_seconds_follow_the_machine(shape: ModelDimensions) -> None:
    slow = replace(UNIT, read=2e-3, begin=2e-3, answer=2e-3, judge=2e-3)
    for stage in set(PLANNED) - {"fit"}:
        before, after = (planned(shape, speed=speed).stages[stage] for speed in (UNIT, slow))
        assert after.seconds == pytest.approx(2 * before.seconds)
    # The first token of each answer comes with its prompt.
    answers = replace(UNIT, read=0.0, begin=0.0, judge=0.0)
    steps = 3 * (90 + 60) * (costs.mean_length(24) - 1)
    assert planned(shape, speed=answers).stages["answer"].seconds == pytest.approx(1e-3 * steps)


def test_a_fit_is_products_and_factors_of_every_layer_on_all_cores(shape: ModelDimensions) -> None:
    """Without its figures, it grows with the layers that it fits and shrinks with the speed of all cores.

    Gates are fitted in the layers that the search may change, directions in all.
    """
    deep = replace(shape, n_layer=2 * shape.n_layer)
    more = len(searched_layers(deep.n_layer)) / len(searched_layers(shape.n_layer))
    figures = planned(shape).stages["fit"].seconds
    once, twice, slow, ungated = (
        planned(result, speed=replace(UNIT, algebra=rate)).stages["fit"].seconds - figures
        for result, rate in (
            (shape, 2e9),
            (deep, 2e9),
            (shape, 1e9),
            (replace(shape, output_matrices={}), 2e9),
        )
    )
    assert 0 < ungated < once
    assert (twice, slow) == pytest.approx((2 * ungated + more * (once - ungated), 2 * once))


def test_memory_grows_with_the_size_of_the_file(shape: ModelDimensions) -> None:
    before, after = (planned(replace(shape, weights=weights)).memory for weights in (0, 10**9))
    assert after == pytest.approx(before + 10**9)


def test_memory_and_speed_follow_the_engine_settings(shape: ModelDimensions) -> None:
    caches = ("engine.cache_type_k=q8_0", "engine.cache_type_v=q8_0")
    plain, quantised, short = (
        planned(shape, *values).memory for values in ((), caches, ("engine.ctx_size=4096",))
    )
    assert short < quantised < plain
    loaded = recipe.load(None, ["engine.threads=3"])
    assert stored(loaded, shape, None).source.startswith("3 server cores")


def test_the_cost_of_a_judge_grows_with_its_layers(shape: ModelDimensions) -> None:
    judges = (None, JudgeModel(shape, 0.5), JudgeModel(shape))
    none, half, whole = (planned(shape, judge=j, speed=speeds.stored_speed(1, shape, j, 32)) for j in judges)
    assert none.stages["score"].seconds == 0
    assert whole.stages["score"].seconds == pytest.approx(2 * half.stages["score"].seconds)
    assert whole.memory == none.memory  # the same model is loaded once
    other = replace(shape, weights=10**9)
    assert planned(shape, judge=JudgeModel(other)).memory > none.memory + 10**9


@pytest.mark.parametrize("spec", ["keywords", "http://127.0.0.1:1/v1#m"])
def test_judges_that_cost_this_machine_nothing(spec: str) -> None:
    assert judge_of(recipe.load(None, [f"judge={spec}"])) is None


def test_a_judge_that_thinks_cannot_be_planned(tiny: Path) -> None:
    with pytest.raises(InputError, match="thinks"):
        judge_of(recipe.load(None, [f"judge=votes:{tiny}"]))
    assert judge_of(recipe.load(None, [f"judge=labels:{tiny}"])) == JudgeModel(dimensions.of_gguf(tiny))


# ---- the speed of the machine ------------------------------------------------------------------------


class Machine:
    """A model and its judge with their own clock, which advances by a known time per token."""

    def __init__(self, speed: Speed) -> None:
        self._speed, self.now = speed, 0.0

    def next_logits(self, conversations: Sequence[Sequence[int]]) -> Iterator[None]:
        self.now += self._speed.read * self._tokens(conversations)
        yield None

    def generate(
        self, conversations: Sequence[Sequence[int]], *, max_tokens: int
    ) -> Iterator[tuple[int, SimpleNamespace]]:
        n = len(conversations)
        if max_tokens == 1:
            self.now += self._speed.begin * self._tokens(conversations)
        else:
            self.now += self._speed.answer * n * max_tokens
        for i in range(n):
            yield i, SimpleNamespace(tokens=[0] * (max_tokens - 1), finished=True)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Iterator[None]:
        lengths = [(speeds.tokens_of(prompt), speeds.tokens_of(answer)) for prompt, answer in pairs]
        self.now += self._speed.judge * sum(speeds.pair_tokens(*length) for length in lengths)
        yield None

    @staticmethod
    def _tokens(conversations: Sequence[Sequence[int]]) -> int:
        return sum(map(len, conversations)) - (len(conversations) - 1)  # the first token is shared


@pytest.mark.parametrize("judge", [0.0, 0.1])
def test_the_measured_speed_is_correct(judge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Speed(read=0.2, begin=0.3, answer=0.5, judge=judge, algebra=7.0, source="")
    machine: Any = Machine(true)
    monkeypatch.setattr(speeds, "_algebra", lambda: 7.0)
    monkeypatch.setattr("rs_gguf.pipeline.speed.time.perf_counter", lambda: machine.now)
    asked = [Prompt(20 * i * "long ", "benign") for i in range(4, 12)]
    conversations = [[1, i, *range(i)] for i in range(4, 12)]
    speed = speeds.measured_speed(machine, machine if judge else None, asked, conversations)
    figures = [getattr(speed, name) for name in ("read", "begin", "answer", "judge", "algebra")]
    assert figures == pytest.approx([0.2, 0.3, 0.5, judge, 7.0], rel=1e-6)


def test_one_sequence_is_limited_by_the_weights_and_many_by_the_arithmetic(shape: ModelDimensions) -> None:
    one, many = (speeds.stored_speed(2, shape, None, at_once).answer for at_once in (1, 10**6))
    arithmetic = (shape.flops(100) + 2 * shape.head) / 120e9
    assert one == pytest.approx(shape.weights / 18e9 + arithmetic)
    assert many == pytest.approx(arithmetic, rel=1e-3)
    # A step reads the experts that at least one of its answers uses.
    experts = replace(shape, experts=9 * shape.dense, used=0.1)
    for at_once in (1, 8):
        step = speeds.stored_speed(1, experts, None, at_once).answer
        flops = (experts.flops(100) + 2 * experts.head) / 60e9
        assert step == pytest.approx(flops + experts.bytes_read(at_once) / at_once / 9e9)


def test_a_real_model_is_measured(tiny: Path) -> None:
    asked = [Prompt(f"Say {i}.", "benign") for i in range(4)]
    with LlamaModel(tiny, n_parallel=4, n_threads=1) as model:
        speed = speeds.measured_speed(model, KeywordJudge(), asked, [[1, 2, 3 + i] for i in range(4)])
    figures = (speed.read, speed.begin, speed.answer, speed.judge, speed.algebra)
    assert all(0 < value < math.inf for value in figures)


# ---- the command -------------------------------------------------------------------------------------


def command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["plan", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_needs_no_weights(tiny: Path, tmp_path: Path) -> None:
    header = tmp_path / "header.gguf"
    header.write_bytes(tiny.read_bytes()[: GGUFReader(tiny).data_offset])
    wanted = ["--set", f"model={header}", "--set", "judge=keywords"]
    code, stdout, _ = command(*wanted, "--json")
    row = json.loads(stdout)
    assert code == 0
    assert list(row["stages"]) == list(PLANNED)
    assert row["seconds"] == pytest.approx(sum(stage["seconds"] for stage in row["stages"].values()))
    code, stdout, _ = command(*wanted)
    assert code == 0
    assert all(stage in stdout for stage in PLANNED)
    assert max(map(len, stdout.splitlines())) <= 80


def test_a_configuration_alone_is_enough(network: Any, tmp_path: Path) -> None:
    network.config.save_pretrained(tmp_path)
    wanted = ["--json", "--set", f"model={tmp_path}", "--set", "judge=keywords"]
    rows = [json.loads(command(*wanted, *more)[1]) for more in ((), ("--bits", "8"))]
    assert rows[0]["model"]["weights"] == 4 * rows[1]["model"]["weights"]
    # A Hugging Face folder has no adapter; a GGUF file may have one.
    assert rows[0]["model"]["output_matrices"] == {}
    assert rows[1]["model"]["output_matrices"] == {"attn_output": WIDTH, "ffn_down": 2 * WIDTH}


@pytest.mark.slow
def test_the_command_measures(tiny: Path) -> None:
    wanted = ["--set", f"model={tiny}", "--set", "judge=keywords", "--set", "answers.parallel=4"]
    code, stdout, _ = command(*wanted, "--measure", "--json")
    assert code == 0
    assert json.loads(stdout)["speed"]["source"] == "measured on this machine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model=./missing.gguf"], "downloads nothing"),
        (["--set", "model=owner/name"], "downloads nothing"),
        (["--set", "model=~draft.gguf"], "downloads nothing"),
        (["--set", "model=TINY", "--bits", "4"], "config.json"),
        (["--set", "model=TINY", "--bits", "4", "--measure"], "config.json"),
        (["--set", "model=TINY", "--set", "prompts.harmful=['none.csv']"], "none.csv"),
        (["--set", "prompts.fits=3"], "prompts.fits"),
    ],
)
def test_bad_input_is_one_error(arguments: list[str], message: str, tiny: Path) -> None:
    code, stdout, stderr = command(*(word.replace("TINY", str(tiny)) for word in arguments))
    assert (code, stdout, stderr.count("Error:")) == (2, "", 1)
    assert message in stderr


def test_a_plan_downloads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "cache_folder", lambda: tmp_path)
    code, _, stderr = command()
    assert code == 2
    assert f"rs-export models pull {models.DEFAULT}" in stderr


def test_a_judge_that_is_not_downloaded_is_named_before_measuring(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr("rs_gguf.pipeline.plan.measure", lambda *_: pytest.fail("measured for nothing"))
    code, _, stderr = command("--set", f"model={tiny}", "--measure")
    assert code == 2
    assert "judge: qwen2.5-coder-0.5b is not downloaded yet" in stderr
    assert "--set judge=keywords" in stderr
