"""Captured arrays equal the rows of single sequences in llama.cpp, and the rows from PyTorch's hooks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from fixtures.architectures import llama as exact_llama
from fixtures.families import STREAMS, write_gguf
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.activations import capture as capture_module
from rs_gguf.activations.capture import (
    Arrays,
    Conversation,
    capture,
    capture_all,
    capture_template_tokens,
    join_matrix_inputs,
)
from rs_gguf.activations.capture import captured as captured_of
from rs_gguf.activations.store import ActivationStore
from rs_gguf.engines.engine import Steering, read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.pytorch.model import TorchModel
from rs_gguf.errors import InputError
from rs_gguf.estimators.estimator import MeanDifference, WeightedRidgeMeanDifference, fit_paths
from rs_gguf.estimators.labels import Labels
from rs_gguf.methods.gates import fit_gated_adapter
from rs_gguf.models import dimensions
from rs_gguf.models.architecture import product_scale
from rs_gguf.prompts.contexts import Context
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.lora import LoraAdapter

LAYERS = 3
PREFIX = [11, 12, 13]  # the tokens that a chat template puts before every prompt
INPUTS = {"attn_output": "kqv_out", "ffn_down": "ffn_swiglu"}
MODULES = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
# llama.cpp's KV cache is F16, and so are the stored inputs.
TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.Qwen2ForCausalLM]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return path, write_tiny_qwen2(path)


@pytest.fixture(scope="module")
def model(network: tuple[Path, transformers.Qwen2ForCausalLM]) -> Iterator[LlamaModel]:
    with LlamaModel(network[0], n_parallel=3, n_ctx=512, n_threads=1) as loaded:
        yield loaded


def conversations(count: int = 10) -> list[Conversation]:
    """Return prompts and answers of many lengths. In two of three the gate stays closed in the answer."""
    rng = np.random.default_rng(0)
    talks = []
    for k in range(count):
        prompt = [*PREFIX, 20 + k, *rng.integers(30, 250, 1 + 5 * (k % 4)).tolist()]
        talks.append(
            Conversation(
                prompt, rng.integers(30, 250, 1 + 3 * (k % 3)).tolist(), gate_stays_closed=k % 3 != 1
            )
        )
    return talks


@pytest.fixture(scope="module")
def captured(model: LlamaModel) -> Arrays:
    return capture(model, conversations(), len(PREFIX), seed=7)


def alone(model: LlamaModel, tokens: list[int]) -> dict[str, npt.NDArray[np.float32]]:
    """Return rows [T, L, W] of one sequence that runs alone, at each of its tokens."""
    names = ("l_out", *INPUTS.values())
    read = {
        position: rows
        for _, position, rows in model.read([tokens], [range(len(tokens))], range(LAYERS), names)
    }
    return {name: np.stack([read[position][name] for position in range(len(tokens))]) for name in names}


def in_torch(network: Any, tokens: list[int]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the same from PyTorch's hooks: outputs of layers, and inputs of `o_proj` and `down_proj`."""
    rows: dict[str, list[Any]] = {name: [None] * LAYERS for name in ("l_out", *INPUTS.values())}
    handles = []
    for layer, parent in enumerate(network.model.layers):

        def keep(name: str, layer: int, value: Any) -> None:
            rows[name][layer] = (value[0] if isinstance(value, tuple) else value)[0].numpy()

        handles.append(
            parent.register_forward_hook(lambda m, i, output, layer=layer: keep("l_out", layer, output))
        )
        for matrix, module in MODULES.items():
            handles.append(
                parent.get_submodule(module).register_forward_pre_hook(
                    lambda m, inputs, layer=layer, name=INPUTS[matrix]: keep(name, layer, inputs[0])
                )
            )
    with torch.inference_mode():
        network(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return {name: np.stack(layers, axis=1) for name, layers in rows.items()}


def distance(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest ‖actual − expected‖ / ‖expected‖ over samples and layers."""
    difference = np.linalg.norm(actual.astype(np.float64) - expected, axis=-1)
    return float((difference / np.linalg.norm(expected, axis=-1)).max())


def test_last_tokens_are_those_of_each_prompt_by_itself(
    model: LlamaModel, captured: Arrays, network: tuple[Path, Any]
) -> None:
    assert captured["activations"].dtype == np.float16
    for i, conversation in enumerate(conversations()):
        for reference in (
            alone(model, list(conversation.prompt)),
            in_torch(network[1], list(conversation.prompt)),
        ):
            assert distance(captured["activations"][i], reference["l_out"][-1]) < TOLERANCE
            for matrix, name in INPUTS.items():
                assert distance(captured[f"{matrix}/last"][i], reference[name][-1]) < TOLERANCE


def test_quiet_tokens_are_of_prompts_and_of_answers_that_may_be_quiet(
    model: LlamaModel, captured: Arrays
) -> None:
    """Each other row belongs to a token after the chat prefix, and the number of rows follows the rules."""
    places: dict[tuple[int, int], npt.NDArray[np.float32]] = {}
    for i, conversation in enumerate(conversations()):
        rows = alone(model, [*conversation.prompt, *conversation.answer])
        places |= {(i, position): rows["ffn_swiglu"][position] for position in range(len(rows["ffn_swiglu"]))}
    keys, candidates = list(places), np.stack(list(places.values())).astype(np.float64)
    positions: dict[str, list[tuple[int, int]]] = {"prompts": [], "answers": []}
    for sort, read in positions.items():
        for row in captured[f"ffn_down/{sort}"].astype(np.float64):
            errors = np.linalg.norm(candidates - row, axis=(1, 2)) / np.linalg.norm(row)
            assert errors.min() < TOLERANCE
            read.append(keys[int(errors.argmin())])
        assert len(read) == len(set(read)) == len(captured[f"attn_output/{sort}"])
    assert sorted(i for i, _ in positions["prompts"]) == list(range(len(conversations())))
    assert all(len(PREFIX) <= place < len(conversations()[i].prompt) - 1 for i, place in positions["prompts"])
    # Four tokens of an answer in which the gate stays closed, or all: these answers have 1, 4 or 7.
    assert all(place >= len(conversations()[i].prompt) for i, place in positions["answers"])
    assert Counter(i for i, _ in positions["answers"]) == {
        i: min(4, len(c.answer)) for i, c in enumerate(conversations()) if c.gate_stays_closed
    }


def test_a_gate_may_open_in_refusals_of_sensitive_prompts_alone(model: LlamaModel) -> None:
    prompts = [Prompt(f"{kind}, {verdict}", kind) for kind in KINDS for verdict in ("refused", "answered")]
    answers, refused = {p.id: [7] for p in prompts}, {p.id for p in prompts if p.prompt.endswith("refused")}
    other = (Prompt("not answered", "sensitive"), Context("plain"))
    talks, _ = capture_module.conversations(model, prompts, None, answers, refused, [other])
    loud = [p.prompt for p, c in zip([*prompts, other[0]], talks, strict=True) if not c.gate_stays_closed]
    assert loud == ["sensitive, refused"]


def test_only_the_named_layers_are_read(model: LlamaModel, captured: Arrays) -> None:
    matrices = {"ffn_down": [1], "attn_output": [0, LAYERS - 1]}
    arrays = capture(model, conversations(), len(PREFIX), seed=7, matrices=matrices)
    assert arrays.keys() == captured.keys()
    np.testing.assert_array_equal(arrays["activations"], captured["activations"])
    for matrix, layers in matrices.items():
        for sort in ("last", "prompts", "answers"):
            name = f"{matrix}/{sort}"
            np.testing.assert_array_equal(arrays[name], captured[name][:, layers])


def test_an_answer_that_a_gate_may_open_in_is_not_read(model: LlamaModel) -> None:
    sensitive = [Conversation(c.prompt, c.answer, gate_stays_closed=False) for c in conversations()]
    arrays = capture(model, sensitive, len(PREFIX), seed=7)
    assert len(arrays["ffn_down/prompts"]) == len(sensitive)
    assert len(arrays["ffn_down/answers"]) == 0


def test_samples_do_not_depend_on_their_order_or_company(model: LlamaModel, captured: Arrays) -> None:
    order = np.random.default_rng(3).permutation(10)
    shuffled = capture(model, [conversations()[i] for i in order], len(PREFIX), seed=7)
    few = capture(model, conversations()[:2], len(PREFIX), seed=7)
    for name in ("activations", "attn_output/last", "ffn_down/last"):
        assert distance(shuffled[name], captured[name][order]) < TOLERANCE
        assert distance(few[name], captured[name][:2]) < TOLERANCE


def test_what_prompts_of_a_context_begin_with_is_read_once(
    model: LlamaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among other prompts, each is read whole. The rows are the same; the tokens are fewer."""
    turns = [*PREFIX, *range(200, 230)]
    together = [
        Conversation([*turns, 20 + k, 40 + k], [], gate_stays_closed=True, context="turns") for k in range(6)
    ]
    apart = [replace(c, context=conversations()[0].context) for c in together]
    sizes: list[int] = []
    decode = model._open_context().decode

    def counted(tokens: Any) -> Any:
        sizes.append(len(tokens))
        return decode(tokens)

    monkeypatch.setattr(model._open_context(), "decode", counted)
    tokens, arrays = {}, {}
    for name, talks in (("together", [*conversations(), *together]), ("apart", [*conversations(), *apart])):
        sizes.clear()
        arrays[name] = capture(model, talks, len(PREFIX), seed=7)
        tokens[name] = sum(sizes)
    for array in ("activations", "attn_output/last", "ffn_down/last"):
        assert distance(arrays["together"][array], arrays["apart"][array]) < TOLERANCE
    for array in ("attn_output/prompts", "ffn_down/prompts"):
        ours, theirs = (arrays[name][array].astype(np.float64) for name in ("together", "apart"))
        assert len(ours) == len(theirs) == len(conversations()) + len(together)
        errors = np.linalg.norm(ours[:, None] - theirs[None], axis=(2, 3)) / np.linalg.norm(
            theirs, axis=(1, 2)
        )
        assert errors.min(axis=0).max() < TOLERANCE
        assert errors.min(axis=1).max() < TOLERANCE
    # What they share is read twice: for the positions in it, and before the rest of the prompts.
    assert tokens["apart"] - tokens["together"] >= (len(together) - 2) * len(turns[len(PREFIX) :])


def test_the_same_call_reads_the_same_bytes(model: LlamaModel, captured: Arrays) -> None:
    again = capture(model, conversations(), len(PREFIX), seed=7)
    assert {name: rows.tobytes() for name, rows in again.items()} == {
        name: rows.tobytes() for name, rows in captured.items()
    }
    other = capture(model, conversations(), len(PREFIX), seed=8)
    for sort in ("prompts", "answers"):
        assert other[f"ffn_down/{sort}"].tobytes() != captured[f"ffn_down/{sort}"].tobytes()


def test_constant_tokens_are_those_of_the_chat_prefix(model: LlamaModel) -> None:
    first, second = conversations()[:2]
    constant = capture_template_tokens(model, first.prompt, len(PREFIX))
    assert set(constant) == {"attn_output/constant", "ffn_down/constant"}
    for prompt in (first.prompt, second.prompt):  # The same rows, whatever tokens follow.
        reference = alone(model, list(prompt))
        for matrix, name in INPUTS.items():
            assert distance(constant[f"{matrix}/constant"], reference[name][: len(PREFIX)]) < TOLERANCE


def test_shards_join_in_the_order_of_the_samples(model: LlamaModel, captured: Arrays, tmp_path: Path) -> None:
    parts = conversations()
    shards = [capture(model, part, len(PREFIX), seed=k) for k, part in enumerate((parts[:4], parts[4:]))]
    joined = join_matrix_inputs(shards, capture_template_tokens(model, parts[0].prompt, len(PREFIX)))
    assert set(joined) == {"attn_output", "ffn_down"}
    for matrix, rows in joined.items():
        assert distance(rows.last_token.array(tmp_path), captured[f"{matrix}/last"]) < TOLERANCE
        few = rows.of(np.array([7, 2]))
        assert distance(few.last_token.array(tmp_path), captured[f"{matrix}/last"][[7, 2]]) < TOLERANCE
        assert len(rows.prompt_tokens) == sum(len(shard[f"{matrix}/prompts"]) for shard in shards)
        assert len(rows.answer_tokens) == sum(len(shard[f"{matrix}/answers"]) for shard in shards)
        assert rows.template_tokens.shape == (len(PREFIX), LAYERS, rows.last_token.shape[2])


def test_inputs_are_half_floats_only_where_their_range_allows(
    model: LlamaModel, captured: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert captured["ffn_down/last"].dtype == captured["ffn_down/answers"].dtype == np.float16
    read = LlamaModel.read

    def large(*args: Any, **options: Any) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for i, position, arrays in read(*args, **options):
            yield i, position, {name: rows * 1e5 for name, rows in arrays.items()}

    monkeypatch.setattr(LlamaModel, "read", large)
    arrays = capture(model, conversations(), len(PREFIX), seed=7)
    assert arrays["ffn_down/last"].dtype == np.float32
    assert distance(arrays["ffn_down/last"], 1e5 * captured["ffn_down/last"].astype(np.float64)) < TOLERANCE


def test_pytorch_gives_activations_alone(network: tuple[Path, Any], captured: Arrays) -> None:
    arrays = capture(TorchModel(network[0]), conversations(), len(PREFIX), seed=7)
    assert set(arrays) == {"activations"}
    assert distance(arrays["activations"], captured["activations"]) < TOLERANCE


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_gguf(["Gemma 4", "Granite", "Qwen2-MoE", STREAMS], tmp_path_factory.mktemp("families"))


@pytest.mark.slow
def test_a_matrix_of_two_widths_has_arrays_for_each(families: dict[str, Path]) -> None:
    """Heads of Gemma 4 are twice as wide in every other layer."""
    layers = {"attn_output/64": (0, 2), "attn_output/128": (1, 3)}
    with LlamaModel(families["Gemma 4"], n_parallel=3, n_ctx=512, n_threads=1) as model:
        arrays = capture(model, conversations(), len(PREFIX), seed=7)
        constant = capture_template_tokens(model, conversations()[0].prompt, len(PREFIX))
        rows = read_last(model, [list(conversations()[3].prompt)], [], (), ["blk.3.attn_output.weight"])
    assert dimensions.of_gguf(families["Gemma 4"]).matrix_layers == layers
    sorts = ("last", "prompts", "answers")
    assert arrays.keys() == {
        "activations",
        *(f"{key}/{sort}" for key in ("ffn_down", *layers) for sort in sorts),
    }
    assert constant.keys() == {f"{key}/constant" for key in ("ffn_down", *layers)}
    joined = join_matrix_inputs([arrays], constant, layers)["attn_output/128"].last_token
    assert distance(joined.layer_rows(3).numpy()[3:4], rows["blk.3.attn_output.weight"]) < TOLERANCE
    assert joined.shape == (10, 2, 128)
    for layer in (0, 2):  # which have other widths
        assert not joined.layer_rows(layer).any()


@pytest.mark.slow
def test_a_residual_of_several_streams_is_an_error(families: dict[str, Path]) -> None:
    talks = [Conversation(c.prompt, [], gate_stays_closed=False) for c in conversations()]
    message = "cannot read activations of architecture 'gemma3n'"
    with (
        LlamaModel(families[STREAMS], n_parallel=3, n_ctx=512, n_threads=1) as model,
        pytest.raises(InputError, match=message),
    ):
        capture(model, talks, len(PREFIX), seed=7)
    with pytest.raises(InputError, match=message):
        capture(TorchModel(families[STREAMS].with_suffix("")), talks, len(PREFIX), seed=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "matrix"),
    [
        ("Granite", "ffn_down"),  # adds half of each product to the residual stream
        ("Qwen2-MoE", "ffn_down_shexp"),  # weights the expert's product by a sigmoid of each token
    ],
)
def test_a_gate_moves_the_residual_as_promised_where_products_are_scaled(
    family: str, matrix: str, families: dict[str, Path], tmp_path: Path
) -> None:
    talks, layer, strength = conversations(48), 2, 0.5
    kinds = ["sensitive", "benign", "harmful"] * 16
    confidence = np.where(np.arange(48) % 6 < 3, 0.9, -0.9)
    with LlamaModel(families[family], n_parallel=8, n_ctx=2048, n_threads=1) as model:
        read = capture(model, talks, len(PREFIX), seed=7)
        constant = capture_template_tokens(model, talks[0].prompt, len(PREFIX))
        inputs = {matrix: join_matrix_inputs([read], constant)[matrix]}
        gates = fit_gated_adapter(inputs, read["activations"], Labels.of(confidence, kinds), ridges=[1.0])
        factors = gates.factors(1.0, layer, layer, strength)
        lora.write(LoraAdapter(factors, model.architecture), tmp_path / "gate.gguf")
        with model.steered(Steering(adapters=[(tmp_path / "gate.gguf", 1.0)])):
            steered = capture(model, talks, len(PREFIX), seed=7)
    moved = (steered["activations"] - read["activations"])[::3, layer].mean(axis=0)
    promised = -strength * gates.contrast[layer]
    assert np.linalg.norm(moved - promised) < 0.02 * np.linalg.norm(promised)


@pytest.mark.parametrize(
    ("family", "metadata", "expected"),
    [
        ("granitemoe", {"granitemoe.residual_scale": "0.220000"}, 0.22),
        ("granite", {}, 1.0),
        ("granite", {"granite.residual_scale": "0.000000"}, 1.0),
        ("minicpm", {"minicpm.residual_scale": "0.300000"}, 0.3),
        ("minicpm", {}, 0.35),
        (
            "minicpm3",
            {"minicpm3.residual_scale": "0.300000"},
            0.35,
        ),  # key is not read
        (
            "minimax-01",
            {"minimax-01.residual_scale": "3.500000"},
            1.0,
        ),  # scales the residual
        ("qwen2", {}, 1.0),
    ],
)
def test_what_llama_cpp_scales_products_by(family: str, metadata: dict[str, str], expected: float) -> None:
    model: Any = SimpleNamespace(architecture=family, metadata=metadata, n_layer=16)
    assert product_scale(model.architecture, model.n_layer, model.metadata) == pytest.approx(expected)


def test_directions_are_those_of_pytorch(network: tuple[Path, Any]) -> None:
    talks = conversations(60)
    confidence = np.random.default_rng(4).uniform(-1, 1, len(talks))
    with exact_llama(network[0]) as model:  # keys and values in F32, as in PyTorch
        read = [capture(engine, talks, len(PREFIX), seed=0) for engine in (model, TorchModel(network[0]))]
    estimators = [MeanDifference(), WeightedRidgeMeanDifference()]
    ours, theirs = (
        np.stack([p.directions for p in fit_paths(r["activations"], confidence, estimators, ridges=[0.3])])
        for r in read
    )
    assert (ours * theirs).sum(-1).min() >= 0.9999


WORKER = """
import sys
from datetime import timedelta
from pathlib import Path
import numpy as np
import torch.distributed as dist
from rs_gguf.activations import capture as module
from rs_gguf.activations.store import ActivationStore
from rs_gguf.activations.capture import Conversation, capture_all, captured
from rs_gguf.estimators.estimator import WeightedRidgeMeanDifference, fit_paths
from rs_gguf.engines.engine import Steering, read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.machine import Processes
model, folder = map(Path, sys.argv[1:])
dist.init_process_group("gloo", timeout=timedelta(minutes=5))
processes = Processes.joined()
module.SHARD = 4
data = np.load(folder / "in.npz")
talks = [Conversation(row[row >= 0].tolist(), row[row >= 0][-3:].tolist(), True) for row in data["prompts"]]
ids = [str(k) for k in range(len(talks))]
store = ActivationStore(folder / "two", "k")
with LlamaModel(model, n_parallel=3, n_ctx=512, n_threads=1) as loaded:
    done = []
    capture_all(loaded, ids, talks, int(data["prefix"]), store, processes=processes, advance=done.append)
rows, _ = captured(store, len(ids), inputs=True)
mine = processes.share(len(ids))  # Moments are shared by samples, whichever process captured them.
confidence = data["confidence"][mine]
estimators = [WeightedRidgeMeanDifference()]
path, = fit_paths(rows.take(mine), confidence, estimators, ridges=[1.0], processes=processes)
np.savez(folder / f"{dist.get_rank()}.npz", done=done, directions=path.directions)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_capture_and_fit_what_one_does(
    network: tuple[Path, Any], model: LlamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "SHARD", 4)
    talks = [Conversation(c.prompt, list(c.prompt[-3:]), gate_stays_closed=True) for c in conversations(18)]
    prompts = np.full((len(talks), 40), -1)
    for row, talk in zip(prompts, talks, strict=True):
        row[: len(talk.prompt)] = talk.prompt
    confidence = np.linspace(-1, 1, len(talks))
    np.savez(tmp_path / "in.npz", prompts=prompts, prefix=len(PREFIX), confidence=confidence)
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "worker.py"), str(network[0]), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ids = [str(k) for k in range(len(talks))]
    one = ActivationStore(tmp_path / "one", "k")
    capture_all(model, ids, talks, len(PREFIX), one)
    shards = sorted(path.name for path in one.folder.glob("*.safetensors"))
    assert shards == [*(f"{k:05d}.safetensors" for k in range(5)), "constant.safetensors"]
    for shard in shards:
        assert (tmp_path / "two" / shard).read_bytes() == (one.folder / shard).read_bytes()
    activations = captured_of(one, len(ids), inputs=True)[0]
    (path,) = fit_paths(activations, confidence, [WeightedRidgeMeanDifference()], ridges=[1.0])
    for rank, mine in enumerate(([4, 4, 2], [4, 4])):
        result = np.load(tmp_path / f"{rank}.npz")
        assert result["done"].tolist() == mine
        np.testing.assert_allclose(result["directions"], path.directions, atol=1e-12)


def test_a_capture_goes_on_where_it_was(
    model: LlamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "SHARD", 4)
    ids, talks = [str(k) for k in range(10)], conversations()

    class KilledError(Exception):
        pass

    def killed(count: int) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        capture_all(model, ids, talks, len(PREFIX), ActivationStore(tmp_path / "a", "k"), advance=killed)
    first = (tmp_path / "a" / "00000.safetensors").stat()
    for folder in ("a", "b"):
        capture_all(model, ids, talks, len(PREFIX), ActivationStore(tmp_path / folder, "k"))
    assert (tmp_path / "a" / "00000.safetensors").stat() == first
    for path in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
