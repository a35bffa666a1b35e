"""TorchModel on tiny random models: batching changes nothing; hooks read and steer exactly their layer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from fixtures.tiny_gguf import CHAT_TEMPLATE, SPECIALS, byte_level, write_tiny_qwen2

from rs_gguf.engines.engine import NO_STEERING, Steering, read_last
from rs_gguf.engines.generation import GREEDY, Sampling
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.pytorch.model import TorchModel
from rs_gguf.engines.pytorch.vocabulary import Vocabulary
from rs_gguf.errors import InputError
from rs_gguf.models.dimensions import of_folder
from rs_gguf.prompts.template import ChatFormat

WIDTH, LAYERS = 32, 3
VOCABULARY = [*SPECIALS, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
COMMON: dict[str, Any] = {"vocab_size": len(VOCABULARY), "bos_token_id": 0, "eos_token_id": 2}
DENSE: dict[str, Any] = {
    **COMMON,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that every layer matters and the likeliest token is unique
}
STATE: dict[str, Any] = {
    **COMMON,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,  # with tied embeddings, Mamba repeats its last token
}
GPT: dict[str, Any] = {**COMMON, "n_layer": LAYERS, "n_head": 4, "initializer_range": 0.2}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**DENSE),
    "qwen2": lambda: transformers.Qwen2Config(**DENSE),
    "gemma2": lambda: transformers.Gemma2Config(**DENSE, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(**GPT, n_embd=WIDTH, n_positions=64),  # learned positions
    "bloom": lambda: transformers.BloomConfig(**GPT, hidden_size=WIDTH),  # ALiBi: takes no position ids
}
# Models that keep earlier tokens in a state, alone or beside keys and values.
STATES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "mamba": lambda: transformers.MambaConfig(**STATE, state_size=8),
    "mamba2": lambda: transformers.Mamba2Config(**STATE, state_size=8, num_heads=8, head_dim=8, n_groups=1),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **DENSE, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8
    ),
    "lfm2": lambda: transformers.Lfm2Config(**DENSE, layer_types=["conv", "full_attention", "conv"]),
}
UNMASKED: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "rwkv": lambda: transformers.RwkvConfig(**STATE),
    "xlstm": lambda: transformers.xLSTMConfig(**STATE, num_heads=4),
}
TEXTS = ["a", "the quick fox", "7 × 7", "why not ask them all?"]


def network(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config((CONFIGS | STATES | UNMASKED)[name]()).eval()


def write_tokenizer(folder: Path) -> None:
    tokenizer = byte_level(VOCABULARY)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def write_folder(folder: Path, name: str) -> Path:
    network(name).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, waiting threads of PyTorch make tiny models 100 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def target(folder: Path) -> TorchModel:
    return TorchModel(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return TorchModel(write_folder(tmp_path_factory.mktemp("one"), "llama"))


@pytest.fixture(scope="module")
def prompts(target: TorchModel) -> list[list[int]]:
    return [target.tokenize(text) for text in TEXTS]


def logits_of(model: TorchModel, prompts: list[list[int]]) -> np.ndarray:
    rows = dict(model.next_logits(prompts))
    return np.stack([rows[i] for i in range(len(prompts))])


def activations_of(model: TorchModel, prompts: list[list[int]], layers: list[int]) -> np.ndarray:
    return read_last(model, prompts, layers)["l_out"]


def hook_count(model: TorchModel) -> int:
    return sum(len(module._forward_hooks) for module in model.model.modules())


def test_the_interface_equals_the_llama_cpp_engines() -> None:
    for name in (name for name in dir(LlamaModel) if not name.startswith("_")):
        if name == "stream":
            continue  # only the page of `rs-export try` streams, and it opens GGUF files alone
        member, own = inspect.getattr_static(LlamaModel, name), inspect.getattr_static(TorchModel, name)
        assert type(own) is type(member), name
        if callable(member):
            assert inspect.signature(own) == inspect.signature(member), name


def test_facts_about_the_model(target: TorchModel, folder: Path) -> None:
    assert target.path == folder
    assert (target.n_layer, target.n_embd, target.n_vocab) == (LAYERS, WIDTH, len(VOCABULARY))
    assert target.architecture == json.loads((folder / "config.json").read_text())["model_type"]
    assert (target.bos_token, target.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert target.bos_prefix == [0]  # `write_tokenizer` puts it before a text
    assert target.chat_template == CHAT_TEMPLATE
    assert {p.dtype for p in target.model.parameters()} == {torch.float32}


def test_text_and_tokens(llama: TorchModel) -> None:
    tokens = llama.tokenize("you<|im_end|> é")
    assert [VOCABULARY[token] for token in tokens] == ["y", "o", "u", "<|im_end|>", "Ġ", "Ã", "©"]
    assert llama.detokenize(tokens) == "you é"
    assert llama.detokenize(tokens, special=True) == "you<|im_end|> é"
    assert llama.token_text(2) == "<|im_end|>"
    assert llama.detokenize([]) == ""


@pytest.mark.parametrize(
    ("vocabulary", "ends"),
    [
        ({"<|end|>": 1, "<|eot_id|>": 2, "the": 4}, {0, 1, 2}),
        ({"<|end|>": 1, "<|return|>": 3}, {0, 3}),
        ({"<|end|>": 1, "<|flush|>": 3}, {0}),
    ],
    ids=["a turn", "a channel of gpt-oss", "a channel of Solar Open"],
)
def test_tokens_that_end_a_turn(vocabulary: dict[str, int], ends: set[int]) -> None:
    tokenizer = SimpleNamespace(eos_token_id=0, get_vocab=lambda: vocabulary)
    assert Vocabulary(tokenizer, None).ends == ends


def test_control_tokens_in_plain_text_are_not_recognised(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf", n_layer=2)
    model = TorchModel(tmp_path / "tiny.gguf")
    end = model.tokenize("<|im_end|>")
    plain = model.tokenize("the <|im_end|> thing", special=False)
    assert len(end) == 1
    assert end[0] not in plain
    assert model.detokenize(plain) == "the <|im_end|> thing"


def test_logits_equal_an_unpadded_forward_pass(target: TorchModel, prompts: list[list[int]]) -> None:
    with torch.inference_mode():
        expected = [target.model(torch.tensor([p])).logits[0, -1].numpy() for p in prompts]
    np.testing.assert_allclose(logits_of(target, prompts), np.stack(expected), atol=1e-5)


def test_padding_does_not_change_activations(target: TorchModel, prompts: list[list[int]]) -> None:
    together = activations_of(target, prompts, [0, 1, 2])
    alone = np.concatenate([activations_of(target, [p], [0, 1, 2]) for p in prompts])
    assert together.shape == (len(prompts), 3, WIDTH)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_activations_are_the_hidden_states_before_the_final_norm(
    target: TorchModel, prompts: list[list[int]]
) -> None:
    read = activations_of(target, prompts, [2, 0, 1])  # in the given order
    for row, prompt in zip(read, prompts, strict=True):
        with torch.inference_mode():
            hidden = target.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        for layer, activation in ((0, row[1]), (1, row[2])):
            np.testing.assert_allclose(activation, hidden[layer + 1][0, -1].numpy(), atol=1e-5)
        # hidden_states[-1] comes after the final norm, the activation before it.
        assert np.abs(row[0] - hidden[-1][0, -1].numpy()).max() > 0.1


def test_layers_on_another_device_are_read_and_steered_alike(tmp_path: Path) -> None:
    """Accelerate spreads the model, here over the disk, from which a layer's weights come when it runs."""
    prompts = [[5, 6, 7], [9] * 7]
    direction = Steering({1: np.ones(WIDTH, dtype=np.float32)})

    def read(model: TorchModel) -> list[Any]:
        with model.steered(direction):
            activations = activations_of(model, prompts, [0, 2])
        return [activations, logits_of(model, prompts), dict(model.generate(prompts, max_tokens=6))]

    model = TorchModel(write_folder(tmp_path / "model", "llama"))
    whole = read(model)
    accelerate.disk_offload(model.model, tmp_path / "disk", execution_device=torch.device("cpu"))
    assert {p.device.type for p in model.model.parameters()} == {"meta"}
    for expected, actual in zip(whole, read(model), strict=True):
        if isinstance(expected, dict):
            assert actual == expected
        else:
            np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_nothing_deeper_than_the_deepest_layer_is_computed(llama: TorchModel) -> None:
    calls = []
    hooks = hook_count(llama)
    handle = llama.model.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    try:
        shallow = activations_of(llama, [[5, 6]], [0, 1])
        assert not calls
        np.testing.assert_array_equal(shallow, activations_of(llama, [[5, 6]], [0, 1, 2])[:, :2])
        assert len(calls) == 1
    finally:
        handle.remove()
    assert hook_count(llama) == hooks


def test_log_probabilities_equal_an_unpadded_forward_pass(
    target: TorchModel, prompts: list[list[int]]
) -> None:
    answers = [prompts[1], prompts[0], prompts[3], prompts[2]]
    pairs = list(zip(prompts, answers, strict=True))
    for (prompt, answer), (logprobs, top) in zip(pairs, target.token_logprobs(pairs), strict=True):
        with torch.inference_mode():
            logits = target.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.double(), dim=-1)[range(len(answer)), answer].numpy()
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)
        np.testing.assert_array_equal(top, logits.argmax(-1).numpy() == np.array(answer))


def test_greedy_answers_equal_those_from_transformers(target: TorchModel, prompts: list[list[int]]) -> None:
    answers = dict(target.generate(prompts, max_tokens=10))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None
        )[0, len(prompt) :].tolist()
        ends = [k for k, token in enumerate(expected) if token in (0, 2)]
        assert answers[i].tokens == expected[: ends[0] if ends else None]
        assert answers[i].finished == bool(ends)
        assert answers[i].text == target.detokenize(answers[i].tokens)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=4)])
def test_answers_do_not_depend_on_the_batch(
    target: TorchModel, prompts: list[list[int]], sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = dict(target.generate(prompts, max_tokens=10, sampling=sampling))
    monkeypatch.setattr(target, "n_parallel", 1)
    assert together == dict(target.generate(prompts, max_tokens=10, sampling=sampling))


def test_parallel_answers_share_a_cache(target: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[int]] = []

    def answer(group: list[int], *_: object) -> list[object]:
        groups.append(group)
        return []

    monkeypatch.setattr(target, "_cached_tokens", 100)
    monkeypatch.setattr(target, "_answer", answer)
    list(target.generate([[5] * 10] * 5, max_tokens=40))
    list(target.generate([[5] * 10] * 5, max_tokens=10))
    assert list(map(len, groups)) == [2, 2, 1, 5]


def test_sampling_follows_its_seed(llama: TorchModel) -> None:
    def draw(seed: int) -> dict[int, Any]:
        warm = Sampling(temperature=2.0, top_k=0, top_p=1.0, seed=seed)
        return dict(llama.generate([[5, 6]] * 3, max_tokens=8, sampling=warm))

    first = draw(0)
    assert draw(0) == first != draw(1)
    assert len({tuple(answer.tokens) for answer in first.values()}) == 3


def test_a_sequence_that_ends_leaves_the_others_alone(tmp_path: Path) -> None:
    prompts = [[5, 9, 17], [7], [100, 3, 60, 44, 8]]
    folder = write_folder(tmp_path, "llama")
    endless = dict(TorchModel(folder).generate(prompts, max_tokens=8))
    end = endless[0].tokens[2]  # the third token of the first answer now ends an answer
    settings = transformers.GenerationConfig(eos_token_id=[2, end])
    settings.save_pretrained(folder)
    for i, answer in TorchModel(folder).generate(prompts, max_tokens=8):
        tokens = endless[i].tokens
        assert answer.finished == (end in tokens or endless[i].finished)
        assert answer.tokens == (tokens[: tokens.index(end)] if end in tokens else tokens)
    assert any(end not in answer.tokens for answer in endless.values())  # one answer goes on


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_a_sequence_keeps_its_state_when_others_end(tmp_path: Path, name: str) -> None:
    ends = {0, 2, *range(5, len(VOCABULARY), 5)}
    folder = write_folder(tmp_path, name)
    transformers.GenerationConfig(eos_token_id=sorted(ends)).save_pretrained(folder)
    model = TorchModel(folder)
    prompts = [[k + 3, *range(9 * k + 4, 11 * k + 4)] for k in range(6)]
    whole = [[*prompt] for prompt in prompts]  # greedy decoding; every pass is over the whole sequence
    for sequence in whole:
        for _ in range(8):
            with torch.inference_mode():
                logits = model.model(torch.tensor([sequence]), use_cache=False).logits
            if int(logits[0, -1].argmax()) in ends:
                break
            sequence.append(int(logits[0, -1].argmax()))
    expected = [sequence[len(prompt) :] for sequence, prompt in zip(whole, prompts, strict=True)]
    assert len({len(tokens) for tokens in expected}) > 2, "the test is void: all answers end together"
    answers = dict(model.generate(prompts, max_tokens=8))
    assert [answers[i].tokens for i in range(len(prompts))] == expected


@pytest.mark.parametrize("name", UNMASKED)
def test_a_state_that_takes_in_padding_is_an_error(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, name)
    with pytest.raises(InputError, match=f"{name} takes padding into its state"):
        TorchModel(tmp_path)


def test_steering_adds_exactly_after_its_layer(target: TorchModel, prompts: list[list[int]]) -> None:
    direction = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    hooks = hook_count(target)
    before, plain = activations_of(target, prompts, [0, 1, 2]), logits_of(target, prompts)
    with target.steered(Steering({1: direction})):
        during = activations_of(target, prompts, [0, 1, 2])
        steered = logits_of(target, prompts)
        answers = dict(target.generate(prompts, max_tokens=10))
    np.testing.assert_array_equal(during[:, 0], before[:, 0])
    np.testing.assert_allclose(during[:, 1], before[:, 1] + direction, atol=1e-6)
    assert np.abs(during[:, 2] - before[:, 2]).max() > 0.1
    assert np.abs(steered - plain).max() > 0.1
    assert answers != dict(target.generate(prompts, max_tokens=10))
    np.testing.assert_array_equal(logits_of(target, prompts), plain)
    assert hook_count(target) == hooks


def test_steering_ends_with_an_error_inside(llama: TorchModel) -> None:
    hooks = hook_count(llama)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        llama.steered(Steering({2: np.ones(WIDTH, dtype=np.float32)})),
    ):
        raise RuntimeError("on purpose")
    assert hook_count(llama) == hooks


def test_no_direction_steers_nothing(llama: TorchModel) -> None:
    plain = logits_of(llama, [[5, 6]])
    with llama.steered(NO_STEERING):
        np.testing.assert_array_equal(logits_of(llama, [[5, 6]]), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("capable", [True, False])
def test_bf16_weights_stay_if_the_processor_multiplies_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, capable: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    network("llama").to(dtype).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model = TorchModel(tmp_path)
    stays = capable and dtype == torch.bfloat16
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16 if stays else torch.float32}
    assert of_folder(tmp_path).weights == sum(p.nbytes for p in model.model.parameters())
    prompts = [model.tokenize(text) for text in TEXTS]
    actual = activations_of(model, prompts, [1, 2])
    model.model.float()
    exact = activations_of(model, prompts, [1, 2])
    assert actual.dtype == np.float32
    if stays:  # a few successive roundings of 2^-9
        np.testing.assert_allclose(actual, exact, atol=0.05 * np.abs(exact).max())
        assert np.abs(actual - exact).max() > 0
    else:
        np.testing.assert_array_equal(actual, exact)


def test_a_gguf_file_gives_the_same_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    original = write_tiny_qwen2(path)
    with TorchModel(path) as model:
        assert (model.architecture, model.n_layer, model.n_embd) == ("qwen2", 3, 32)
        tokens = ChatFormat(model.chat_template).tokenize(model, "the <|im_end|> thing")
        with torch.inference_mode():
            expected = original(torch.tensor([tokens])).logits[0, -1].numpy()
        np.testing.assert_allclose(logits_of(model, [tokens])[0], expected, atol=1e-5)
        for name, weight in model.model.state_dict().items():
            assert torch.equal(weight, original.state_dict()[name]), name
        assert model.detokenize(tokens) == "user\nthe <|im_end|> thing\nassistant\n"


def test_empty_inputs_give_empty_results(llama: TorchModel) -> None:
    assert list(llama.generate([], max_tokens=3)) == []
    assert list(llama.next_logits([])) == []
    assert list(llama.read([], [], [0])) == []
    assert llama.token_logprobs([]) == []


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m: list(m.generate([[1], []], max_tokens=3)), "at least one token"),
        (lambda m: list(m.next_logits([[]])), "at least one token"),
        (lambda m: m.token_logprobs([([1], [])]), "at least one token"),
        (
            lambda m: list(m.generate([[1] * 60], max_tokens=5)),
            "a prompt has 60 tokens.*answer.* 5.*64 fit.*fewer tokens for an answer",
        ),
        (lambda m: read_last(m, [[1]], [3]), "layers 0 to 2"),
        (lambda m: read_last(m, [[1]], []), "at least one"),
        (lambda m: read_last(m, [[1]], [0], ["ffn_inp"]), "llama.cpp"),
        (lambda m: m.steered(Steering({0: np.ones(WIDTH)})).__enter__(), "layer 0"),
        (lambda m: m.steered(Steering({3: np.ones(WIDTH)})).__enter__(), "layer 3 .* layers 1 to 2"),
        (lambda m: m.steered(Steering({1: np.ones(WIDTH + 1)})).__enter__(), r"\(33,\).* width 32"),
        (lambda m: m.steered(Steering(adapters=[(Path("a.gguf"), 1.0)])).__enter__(), "needs llama.cpp"),
    ],
)
def test_wrong_use_is_explained(llama: TorchModel, use: Callable[[TorchModel], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        use(llama)


def test_only_folders_and_gguf_files_are_taken(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InputError, match="Hugging Face folder"):
            TorchModel(path)


def test_a_broken_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_qwen2(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="cannot load"):
        TorchModel(path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(network("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"cannot load.*safetensors"):
        TorchModel(tmp_path)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "marker"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w').close()")
    with pytest.raises(InputError, match=r"cannot read the configuration.*without remote code"):
        TorchModel(tmp_path)
    assert not marker.exists()


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_folder(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights \(model.layers.1.mlp.up_proj"):
        TorchModel(tmp_path)
