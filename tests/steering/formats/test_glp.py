"""GLP files: projections are not taken for control vectors, and become an edit of the output matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from fixtures.adapters import PROMPTS, factors, llama_logits
from fixtures.tiny_gguf import write_tiny_qwen2
from fixtures.tiny_qwen3 import THINKING_TEMPLATE, write_tiny_qwen3
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

from rs_gguf.errors import InputError
from rs_gguf.records.files import sha256
from rs_gguf.steering import file as steering_file
from rs_gguf.steering import lora_file, vector_file
from rs_gguf.steering.container import finish, metadata
from rs_gguf.steering.formats import glp, vectors
from rs_gguf.steering.lora import LoraAdapter

WIDTH, N_LAYER = 32, 4
TOLERANCE = 1e-3  # of a logit, between the engines, in F32
MODULES = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
Rows = dict[int, npt.NDArray[np.float32]]


def units(*layers: int) -> Rows:
    rng = np.random.default_rng(5)
    rows = {layer: rng.standard_normal(WIDTH) for layer in layers}
    return {layer: (row / np.linalg.norm(row)).astype(np.float32) for layer, row in rows.items()}


def write(
    path: Path, directions: Rows, values: Mapping[str, Any] | None = None, name: str = "direction"
) -> Path:
    """Write a file as the format's specification says, with other `values` in it (None leaves a key out)."""
    keys: dict[str, Any] = {
        "glp.mode": "project",
        "glp.spec_version": 1,
        "glp.alpha_default": 1.0,
        "glp.hook_point": "residual_stream_post_layer",
        **(values or {}),
    }
    add = {str: GGUFWriter.add_string, int: GGUFWriter.add_uint32, float: GGUFWriter.add_float32}
    writer = GGUFWriter(path, "controlvector")
    add[list] = GGUFWriter.add_array
    for key, value in keys.items():
        if value is not None:
            add[type(value)](writer, key, value)
    for layer, row in directions.items():
        writer.add_tensor(f"{name}.{layer}", row)
    finish(writer)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.Qwen2ForCausalLM]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return path, write_tiny_qwen2(path, n_layer=N_LAYER, n_embd=WIDTH)


# ---- not a control vector ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["project", "rotate"])
def test_check_rejects_what_llama_cpp_would_add(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "v.gguf", units(1, 2), {"glp.mode": mode})
    for report in (steering_file.check(path), vector_file.check(path)):
        assert not report.valid
        (error,) = report.errors
        assert f"glp.mode is '{mode}': the directions are not to be added" in error
        assert "llama.cpp would add them" in error
        assert "--from glp" in error
        assert report.loader_says == ""  # llama.cpp says nothing
    with pytest.raises(InputError, match=r"llama\.cpp would add them"):
        steering_file.read(path)
    with pytest.raises(InputError, match="Use --from glp"):
        vectors.convert(path, "repeng")


@pytest.mark.parametrize("mode", ["add", None])
def test_a_file_of_added_directions_is_a_control_vector(tmp_path: Path, mode: str | None) -> None:
    path = write(tmp_path / "v.gguf", units(1, 2), {"glp.mode": mode})
    assert steering_file.check(path).valid
    with pytest.raises(InputError, match="'project' is accepted"):
        glp.read(path)


# ---- reading -------------------------------------------------------------------------------------


def test_the_content_is_read(tmp_path: Path) -> None:
    rows = units(1, 3)
    path = write(tmp_path / "v.gguf", rows, {"glp.alpha_default": 4.0, "glp.layer_ids_zero_based": "1,3"})
    (content,) = steering_file.read_for_display([path])
    assert isinstance(content, glp.Projection)
    assert content.contents == {
        "kind": "GLP projection",
        "architecture": "",
        "width": WIDTH,
        "layers": [1, 3],
        "alpha": 4.0,
        "hook_point": "residual_stream_post_layer",
    }
    assert content.norms == pytest.approx({1: 1.0, 3: 1.0})
    assert content.cosines(content) == pytest.approx({1: 1.0, 3: 1.0})
    assert content.provenance["glp.mode"] == "project"
    np.testing.assert_array_equal(content.vector.directions[3], rows[3])


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"glp.spec_version": 3}, "glp.spec_version is 3"),
        ({"glp.rank": 2, "glp.spec_version": 2}, "several directions a layer"),
        ({"glp.layer_scales": "1:2.0", "glp.spec_version": 2}, "a scale for each layer"),
        ({"glp.hook_point": "embedding"}, "glp.hook_point is 'embedding'"),
        ({"glp.hook_point": ["attn_out_pre_residual"]}, r"glp.hook_point is \['attn_out_pre_residual'\]"),
        ({"glp.alpha_default": "four"}, "glp.alpha_default is 'four'"),
        ({"glp.alpha_default": float("nan")}, "glp.alpha_default is nan"),
        ({"glp.layer_ids_zero_based": "0,1"}, "its layers are 1,2"),
    ],
)
def test_files_that_cannot_be_applied_are_refused(tmp_path: Path, values: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=f"cannot be read as a GLP file: .*{why}"):
        glp.read(write(tmp_path / "v.gguf", units(1, 2), values))


def test_tensors_of_another_form_are_refused(tmp_path: Path) -> None:
    for file in (
        write(tmp_path / "a.gguf", units(1, 2), name="direction.1"),  # a second direction of layer 1
        write(tmp_path / "b.gguf", {1: units(1)[1].astype(np.float16)}),
        write(tmp_path / "d.gguf", units(1), name="direction.0"),
        write(tmp_path / "e.gguf", {1: units(1)[1]}, name="other"),
    ):
        with pytest.raises(InputError, match=r"is not an F32 tensor direction\.N"):
            glp.read(file)
    with pytest.raises(InputError, match="layer 0 cannot be steered"):
        glp.read(write(tmp_path / "c.gguf", {0: units(1)[1]}))


# ---- as an adapter -------------------------------------------------------------------------------


def dense(network: transformers.Qwen2ForCausalLM, rows: Rows, alpha: float, kinds: tuple[str, ...]) -> Any:
    """Return PyTorch's logits [N, V] with W − α d dᵀW in place of the output matrices."""
    weights = network.state_dict()
    edited = {name: weight.clone() for name, weight in weights.items()}
    for layer, row in rows.items():
        d = torch.from_numpy(row)[:, None]
        for kind in kinds:
            weight = edited[f"model.layers.{layer}.{MODULES[kind]}.weight"]
            weight -= alpha * d @ (d.T @ weight)
    other = transformers.Qwen2ForCausalLM(network.config).float().eval()
    other.load_state_dict(edited)
    with torch.inference_mode():
        return np.stack([other(torch.tensor([p])).logits[0, -1].numpy() for p in PROMPTS])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "alpha"),
    [
        ("residual_stream_post_layer", 1.0),
        ("residual_stream_post_layer", 0.4),
        ("ffn_out_pre_residual", 1.5),
        ("attn_out_pre_residual", 1.0),
    ],
)
def test_an_adapter_does_what_a_dense_edit_of_the_matrices_does(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path, hook: str, alpha: float
) -> None:
    model, network = tiny
    rows = units(1, 2, 3)
    path = write(tmp_path / "v.gguf", rows, {"glp.hook_point": hook, "glp.alpha_default": alpha})
    adapter, notes = glp.to_adapter(path, model)
    lora_file.write(adapter, tmp_path / "a.gguf")
    assert (adapter.rank, adapter.layers, adapter.matrices) == (1, [1, 2, 3], sorted(glp.HOOKS[hook]))
    logits = llama_logits(model, tmp_path / "a.gguf")
    np.testing.assert_allclose(logits, dense(network, rows, alpha, glp.HOOKS[hook]), atol=TOLERANCE)
    assert np.abs(logits - llama_logits(model, None)).max() > 100 * TOLERANCE
    strength = hook == "residual_stream_post_layer" and alpha != 1
    assert len(notes) == 1 + strength
    assert f"strength, {alpha:g}, is meant for the whole residual stream" in notes[-1] or not strength
    assert adapter.provenance["source.sha256"] == sha256(path)
    assert adapter.provenance["source.glp.hook_point"] == hook
    assert adapter.provenance["model.sha256"] == sha256(model)


def test_models_that_do_not_fit_are_refused(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path
) -> None:
    model, _ = tiny
    with pytest.raises(InputError, match=r"has width 32 and layers up to 4, but .* width 32 and 4 layers"):
        glp.to_adapter(write(tmp_path / "v.gguf", units(1, 4)), model)
    write_tiny_qwen2(tmp_path / "wide.gguf", n_embd=64)
    with pytest.raises(InputError, match="width 64 and 3 layers"):
        glp.to_adapter(write(tmp_path / "v.gguf", units(1)), tmp_path / "wide.gguf")
    write_tiny_qwen3(tmp_path / "experts.gguf", THINKING_TEMPLATE, experts=4, n_layer=3)
    width = metadata(GGUFReader(tmp_path / "experts.gguf"))["qwen3moe.embedding_length"]
    path = write(tmp_path / "v.gguf", {1: np.ones(width, np.float32)})
    with pytest.raises(InputError, match=r"also adds to the residual stream through blk\.1\.ffn_down_exps"):
        glp.to_adapter(path, tmp_path / "experts.gguf")


def test_matrices_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_block_count(2)
    writer.add_embedding_length(128)
    size = GGML_QUANT_SIZES[GGMLQuantizationType.Q1_0][1]
    matrix = np.zeros((128, size), np.uint8)
    writer.add_tensor("blk.1.attn_output.weight", matrix, raw_dtype=GGMLQuantizationType.Q1_0)
    finish(writer)
    path = write(tmp_path / "v.gguf", {1: np.ones(128, np.float32)})
    with pytest.raises(InputError, match=r"blk\.1\.attn_output\.weight has the type Q1_0, which"):
        glp.to_adapter(path, tmp_path / "model.gguf")


def test_directions_that_are_not_unit_vectors_are_noted(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path
) -> None:
    _, notes = glp.to_adapter(write(tmp_path / "v.gguf", {1: 2 * units(1)[1]}), tiny[0])
    assert "do not have length 1" in notes[1]


# ---- from an adapter -----------------------------------------------------------------------------


@pytest.mark.parametrize("hook", list(glp.HOOKS))
def test_a_projection_comes_back(
    tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path, hook: str
) -> None:
    model, _ = tiny
    rows = units(1, 2)
    path = write(tmp_path / "v.gguf", rows, {"glp.hook_point": hook, "glp.alpha_default": 0.75})
    adapter, _ = glp.to_adapter(path, model)
    projection, notes = glp.of_adapter(adapter, model)
    # Three layers that each add 1 along d: matrices at α = 0.5 leave 1.5, the stream's projection 0.875.
    assert len(notes) == 1 + (hook == "residual_stream_post_layer")
    assert "strength, 0.75, is of single matrices" in notes[-1] or len(notes) == 1
    glp.write(projection, tmp_path / "w.gguf")
    found = glp.read(tmp_path / "w.gguf")
    assert (found.hook, found.vector.layers) == (hook, [1, 2])
    assert found.alpha == pytest.approx(0.75)
    for layer, row in rows.items():
        np.testing.assert_allclose(found.vector.directions[layer], row, atol=1e-6)
    values = metadata(GGUFReader(tmp_path / "w.gguf"))
    stored = b"".join(row.tobytes() for row in found.vector.directions.values())
    assert values["glp.content_sha256"] == hashlib.sha256(stored).hexdigest()
    assert values["glp.layer_ids_zero_based"] == "1,2"
    assert values["controlvector.model_hint"] == "qwen2"
    assert values["rs_gguf.model.sha256"] == sha256(model)
    assert not steering_file.check(tmp_path / "w.gguf").valid
    glp.write(projection, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "w.gguf").read_bytes()


def test_other_adapters_are_refused(tiny: tuple[Path, transformers.Qwen2ForCausalLM], tmp_path: Path) -> None:
    model, _ = tiny
    adapter, _ = glp.to_adapter(write(tmp_path / "v.gguf", units(1, 2)), model)
    pairs = dict(adapter.factors)
    down, out = "blk.1.ffn_down.weight", "blk.2.attn_output.weight"
    a, b = pairs[down]
    for changed, why in [
        ({**pairs, down: (2 * a, b)}, "its strength is 1, but 2 at blk.1.ffn_down.weight"),
        ({**pairs, down: factors(1, 64, WIDTH)}, "does not lose what it adds along a direction"),
        ({**pairs, down: (np.vstack([a, a]), np.hstack([b, b]))}, "with rank 2"),
        ({name: pair for name, pair in pairs.items() if name != out}, f"it leaves {out} as it is"),
        ({**pairs, "blk.9.attn_output.weight": pairs[out], "blk.9.ffn_down.weight": (a, b)}, "is not in"),
        ({"blk.1.attn_q.weight": factors(1, WIDTH, WIDTH)}, "it changes attn_q with rank 1"),
    ]:
        with pytest.raises(InputError, match=f"not a directional ablation of this model: .*{why}"):
            glp.of_adapter(LoraAdapter(changed, "qwen2"), model)
