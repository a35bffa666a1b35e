"""Behaviour of every engine, and agreement between engines that load one tiny model from a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.adapters import factors
from fixtures.architectures import llama
from fixtures.tiny_gguf import CHAT_TEMPLATE, write_tiny_folder, write_tiny_qwen2
from gguf import GGUFReader
from numpy.typing import NDArray

from rs_gguf.engines import engine_for, open_engine
from rs_gguf.engines.engine import NO_STEERING, Can, Engine, Steering, read_last
from rs_gguf.engines.generation import Sampling
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.pytorch.model import TorchModel
from rs_gguf.errors import InputError
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.lora import LoraAdapter

N_LAYER, WIDTH = 3, 32
TOLERANCE = 1e-3  # difference of a logit or an activation between the engines, in F32
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(5, 250, length).tolist() for length in (12, 7, 1, 20, 7)]
DIRECTION = RNG.standard_normal(WIDTH).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, waiting threads of PyTorch make tiny models 100 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    path = tmp_path_factory.mktemp("engines") / "tiny.gguf"
    write_tiny_qwen2(path)
    with llama(path, n_ctx=512) as model, TorchModel(path) as twin:  # keys and values in F32, as in PyTorch
        yield {"llama": model, "pytorch": twin}


@pytest.fixture(params=["llama", "pytorch"])
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    return engines[request.param]


@pytest.fixture
def reference(engines: dict[str, Engine]) -> Engine:
    return engines["pytorch"]


def logits(engine: Engine) -> NDArray[np.float32]:
    rows = {i: row.copy() for i, row in engine.next_logits(PROMPTS)}
    return np.stack([rows[i] for i in range(len(PROMPTS))])


# ---- choice and abilities of an engine ------------------------------------------------------------


def test_llama_cpp_runs_a_file_and_pytorch_a_folder(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    write_tiny_folder(tmp_path / "folder")
    for path, kind in ((tmp_path / "tiny.gguf", LlamaModel), (tmp_path / "folder", TorchModel)):
        assert engine_for(path) is kind
        with open_engine(path, n_parallel=3) as model:
            assert type(model) is kind
            assert (model.path, model.n_parallel) == (path, 3)


def test_llama_cpp_reports_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model file not found"):
        open_engine(tmp_path / "absent.gguf")


def test_abilities_of_each_engine() -> None:
    assert LlamaModel.can == Can.LORA | Can.MATRIX_INPUTS | Can.LLAMA_CPP
    assert TorchModel.can == Can(0)


def test_facts_about_the_model(engine: Engine, reference: Engine) -> None:
    assert (engine.architecture, engine.n_layer, engine.n_embd) == ("qwen2", N_LAYER, WIDTH)
    assert (engine.n_vocab, engine.n_params) == (reference.n_vocab, reference.n_params)
    assert engine.chat_template == CHAT_TEMPLATE
    assert (engine.eos_token, engine.bos_prefix) == ("<|im_end|>", [])


# ---- text and tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["the rain", "Ärger, 雨 and\n\ttabs", "a<|im_end|>b", ""])
def test_text_comes_back_from_its_tokens(engine: Engine, reference: Engine, text: str) -> None:
    for special in (True, False):
        tokens = engine.tokenize(text, special=special)
        assert tokens == reference.tokenize(text, special=special)
        assert engine.detokenize(tokens, special=True) == text
        assert engine.detokenize(tokens) == (text.replace("<|im_end|>", "") if special else text)


# ---- answers and log-probabilities ---------------------------------------------------------------


def test_greedy_answers_are_the_same(engine: Engine, reference: Engine) -> None:
    answers, expected = (dict(e.generate(PROMPTS, max_tokens=8)) for e in (engine, reference))
    assert sorted(answers) == list(range(len(PROMPTS)))
    assert answers == expected
    assert {len(answer.tokens) for answer in answers.values()} != {0}


def test_draws_follow_their_seed(engine: Engine) -> None:
    def drawn(seed: int) -> dict[int, list[int]]:
        sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        return {i: answer.tokens for i, answer in engine.generate(PROMPTS, max_tokens=8, sampling=sampling)}

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_logits_are_the_same(engine: Engine, reference: Engine) -> None:
    actual = logits(engine)
    assert actual.shape == (len(PROMPTS), engine.n_vocab)
    np.testing.assert_allclose(actual, logits(reference), atol=TOLERANCE)


def test_log_probabilities_follow_from_the_logits(engine: Engine) -> None:
    pairs = [(prompt, PROMPTS[0][:3]) for prompt in PROMPTS]
    for (prompt, answer), (logprobs, top) in zip(pairs, engine.token_logprobs(pairs), strict=True):
        beginnings = [[*prompt, *answer[:k]] for k in range(len(answer))]
        rows = {k: row.copy() for k, row in engine.next_logits(beginnings)}
        for k, token in enumerate(answer):
            expected = rows[k][token] - np.logaddexp.reduce(rows[k].astype(np.float64))
            assert logprobs[k] == pytest.approx(expected, abs=TOLERANCE)
            assert top[k] == (rows[k].argmax() == token)


def test_logits_of_answers_equal_those_of_each_beginning(engine: Engine, reference: Engine) -> None:
    """They are compared as distributions, with a softmax in F64."""
    pairs = [(prompt, PROMPTS[k][: k + 1]) for k, prompt in enumerate(PROMPTS)]
    found = {(i, step): distribution(row) for i, step, row in engine.answer_logits(pairs)}
    assert sorted(found) == [(i, step) for i, (_, answer) in enumerate(pairs) for step in range(len(answer))]
    for (i, step), share in found.items():
        prompt, answer = pairs[i]
        ((_, row),) = reference.next_logits([[*prompt, *answer[:step]]])
        np.testing.assert_allclose(share, distribution(row), atol=TOLERANCE)


def distribution(row: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the softmax of logits [V]."""
    weights = np.exp(row.astype(np.float64) - row.max())
    return np.asarray(weights / weights.sum())


# ---- reading -------------------------------------------------------------------------------------


def test_activations_are_read_at_any_position(engine: Engine, reference: Engine) -> None:
    positions = [[0, 5, 11], [6], [0], [3, 19], [2, 6]]
    layers = [2, 0]  # in any order
    read = {(i, p): rows["l_out"] for i, p, rows in engine.read(PROMPTS, positions, layers)}
    assert sorted(read) == [(i, p) for i, row in enumerate(positions) for p in row]
    for (i, position), rows in read.items():
        (alone,) = read_last(reference, [PROMPTS[i][: position + 1]], layers)["l_out"]
        assert rows.shape == (2, WIDTH)
        np.testing.assert_allclose(rows, alone, atol=TOLERANCE)


def test_llama_cpp_reads_other_tensors_and_inputs_and_products_of_matrices(engine: Engine) -> None:
    name = "blk.1.ffn_down.weight"
    if Can.MATRIX_INPUTS not in engine.can:
        for tensors, matrices in ((["kqv_out"], []), (["l_out"], [name])):
            with pytest.raises(InputError, match=r"llama\.cpp"):
                read_last(engine, PROMPTS, [1], tensors, matrices)
        return
    read = read_last(engine, PROMPTS, [1], ["kqv_out", "ffn_swiglu"], [name, "blk.1.ffn_down.product"])
    assert {name: rows.shape for name, rows in read.items()} == {
        "kqv_out": (len(PROMPTS), 1, WIDTH),
        "ffn_swiglu": (len(PROMPTS), 1, 2 * WIDTH),
        name: (len(PROMPTS), 2 * WIDTH),
        "blk.1.ffn_down.product": (len(PROMPTS), WIDTH),
    }
    np.testing.assert_array_equal(read[name], read["ffn_swiglu"][:, 0])
    (matrix,) = [tensor.data for tensor in GGUFReader(engine.path).tensors if tensor.name == name]
    products = read[name] @ np.asarray(matrix).T
    np.testing.assert_allclose(read["blk.1.ffn_down.product"], products, atol=TOLERANCE)


def test_a_product_holds_what_all_adapters_add(engine: Engine, tmp_path: Path) -> None:
    if Can.LORA not in engine.can:
        return
    weight, product = "blk.1.ffn_down.weight", "blk.1.ffn_down.product"
    a, b = factors(2, 2 * WIDTH, WIDTH)
    for scale in (0.5, 2.0):
        lora.write(LoraAdapter({weight: (a, b * np.float32(scale))}, "qwen2"), tmp_path / f"{scale}.gguf")
    before = read_last(engine, PROMPTS, [], (), [weight, product])
    with engine.steered(Steering(adapters=[(tmp_path / "0.5.gguf", 1.0), (tmp_path / "2.0.gguf", -0.1)])):
        after = read_last(engine, PROMPTS, [], (), [weight, product])
    np.testing.assert_array_equal(after[weight], before[weight])
    change = 0.3 * before[weight] @ a.T @ b.T
    np.testing.assert_allclose(after[product] - before[product], change, atol=TOLERANCE)


# ---- steering ------------------------------------------------------------------------------------


def test_a_direction_is_added_after_its_layer_and_removed_again(engine: Engine, reference: Engine) -> None:
    plain, before = logits(engine), read_last(engine, PROMPTS, [0, 1])["l_out"]
    steering = Steering({1: DIRECTION})
    with engine.steered(steering):
        steered, during = logits(engine), read_last(engine, PROMPTS, [0, 1])["l_out"]
    with reference.steered(steering):
        expected = logits(reference)
    np.testing.assert_array_equal(during[:, 0], before[:, 0])
    np.testing.assert_allclose(during[:, 1], before[:, 1] + DIRECTION, atol=TOLERANCE)
    np.testing.assert_allclose(steered, expected, atol=TOLERANCE)
    assert np.abs(steered - plain).max() > 0.1
    np.testing.assert_array_equal(logits(engine), plain)


def test_steering_ends_with_an_error_inside(engine: Engine) -> None:
    plain = logits(engine)
    with pytest.raises(RuntimeError, match="on purpose"), engine.steered(Steering({2: DIRECTION})):
        raise RuntimeError("on purpose")
    np.testing.assert_array_equal(logits(engine), plain)


def test_a_scaled_steering_is_scaled(engine: Engine) -> None:
    with engine.steered(Steering({1: DIRECTION}).scaled(-2.0)):
        scaled = logits(engine)
    with engine.steered(Steering({1: -2 * DIRECTION})):
        np.testing.assert_array_equal(logits(engine), scaled)
    with engine.steered(NO_STEERING):
        assert np.abs(logits(engine) - scaled).max() > 0.1


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({0: DIRECTION}, "layer 0 cannot be steered: this model has steerable layers 1 to 2"),
        ({N_LAYER: DIRECTION}, "layer 3 cannot be steered: this model has steerable layers 1 to 2"),
        ({1: np.ones(WIDTH + 1)}, r"shape \(33,\), but tiny\.gguf has width 32"),
    ],
)
def test_a_direction_that_does_not_fit_is_an_error(
    engine: Engine, directions: dict[int, Any], message: str
) -> None:
    plain = logits(engine)
    with pytest.raises(InputError, match=message), engine.steered(Steering(directions)):
        pytest.fail("the model must not be steered")
    np.testing.assert_array_equal(logits(engine), plain)


def test_an_adapter_is_applied_or_is_an_error(engine: Engine, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    factors = {
        "blk.1.ffn_down.weight": (
            rng.standard_normal((1, 2 * WIDTH), dtype=np.float32),
            rng.standard_normal((WIDTH, 1), dtype=np.float32),
        )
    }
    lora.write(LoraAdapter(factors, "qwen2"), tmp_path / "a.gguf")
    steering, plain = Steering(adapters=[(tmp_path / "a.gguf", 1.0)]), logits(engine)
    if Can.LORA in engine.can:
        with engine.steered(steering):
            assert np.abs(logits(engine) - plain).max() > 0.1
    else:
        with pytest.raises(InputError, match=r"needs llama\.cpp"), engine.steered(steering):
            pytest.fail("the model must not be steered")
    np.testing.assert_array_equal(logits(engine), plain)


# ---- wrong use -----------------------------------------------------------------------------------


def test_empty_inputs_give_empty_results(engine: Engine) -> None:
    assert list(engine.generate([], max_tokens=3)) == []
    assert list(engine.next_logits([])) == []
    assert engine.token_logprobs([]) == []
    assert list(engine.answer_logits([])) == []
    assert list(engine.read([], [], [1])) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda e: list(e.generate([[5], []], max_tokens=3)),
        lambda e: list(e.next_logits([[]])),
        lambda e: e.token_logprobs([([5], [])]),
        lambda e: e.token_logprobs([([], [5])]),
        lambda e: list(e.answer_logits([([5], [])])),
        lambda e: list(e.read([[5], []], [[0], [0]], [1])),
        lambda e: list(e.read([[5], [6]], [[0], []], [1])),
        lambda e: list(e.read([[5]], [[0]], [])),
        lambda e: list(e.read([[5]], [[0]], [N_LAYER])),
        lambda e: list(e.read([[5]], [[0]], [1], ["no_such_tensor"])),
    ],
)
def test_wrong_use_is_an_error(engine: Engine, use: Callable[[Engine], object]) -> None:
    with pytest.raises(InputError):
        use(engine)


def test_a_sequence_that_is_too_long_is_an_error(engine: Engine) -> None:
    most = engine.max_length
    engine.check_lengths([[5] * most, [5]])
    engine.check_lengths([[5] * (most - 8)], 8)
    for length, max_tokens in ((most + 1, 0), (most - 8, 9)):
        with pytest.raises(InputError, match=f"has {length} tokens.* only {most} fit"):
            engine.check_lengths([[5], [5] * length], max_tokens)
    uses: list[Callable[[list[int]], object]] = [
        lambda long: list(engine.generate([long], max_tokens=1)),
        lambda long: list(engine.next_logits([[*long, 5]])),
        lambda long: engine.token_logprobs([(long, [5, 6])]),
        lambda long: list(engine.answer_logits([(long, [5, 6])])),
        lambda long: list(engine.read([[*long, 5]], [[0]], [1])),
    ]
    for use in uses:
        with pytest.raises(InputError, match=f"only {most} fit"):
            use([5] * most)
