"""LlamaModel: answers do not depend on the batch, llama.cpp computes each batch in one step, and errors."""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from fixtures.architectures import llama
from fixtures.tiny_gguf import SPECIALS, write_tiny_qwen2

from rs_gguf import machine
from rs_gguf.engines.engine import Steering, read_last
from rs_gguf.engines.generation import Sampling
from rs_gguf.engines.llama import graph
from rs_gguf.engines.llama.calls import called_back, calling
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.engines.pytorch.model import TorchModel
from rs_gguf.errors import InputError
from rs_gguf.models import header as gguf_header
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering.lora import LoraAdapter

TOKENS = 24


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list that gets, for each decoding step, the sequence number of every token."""
    steps: list[list[int]] = []

    def decode(context: Any, batch: Any, decode: Any = llama_cpp.llama_decode) -> int:
        steps.append([batch.seq_id[i][0] for i in range(batch.n_tokens)])
        return int(decode(context, batch))

    monkeypatch.setattr(llama_cpp, "llama_decode", decode)
    return steps


def test_answers_that_end_at_any_step_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(3)
    prompts = [[7, 7, *rng.integers(5, 250, length).tolist()] for length in rng.integers(1, 30, 40)]
    with llama(tmp_path / "tiny.gguf", n_ctx=8 * 256) as model:
        alone = [dict(model.generate([prompt], max_tokens=TOKENS))[0] for prompt in prompts]
        steps = watch_steps(monkeypatch)
        together = dict(model.generate(prompts, max_tokens=TOKENS))
    assert len({len(answer.tokens) for answer in alone}) > 5, "they should end at different steps"
    assert [together[i] for i in range(len(prompts))] == alone
    # llama.cpp computes sequences one after another, in twice the time, if their numbers are not consecutive.
    # No step has sequence 0: the prefix lies in the cache since the prompts before.
    assert all(step == sorted(step) and {*step} == {*range(1, max(step) + 1)} for step in steps)


def test_a_prefix_is_decoded_once_under_one_steering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    prompts = [[*range(20, 40), 50 + k] for k in range(3)]
    longer, shorter = ([[*range(20, end), 60 + k] for k in range(3)] for end in (45, 30))
    others = [[9, *prompt] for prompt in prompts]
    steering = Steering({1: np.ones(32, np.float32)})
    steps = watch_steps(monkeypatch)

    def logits(model: LlamaModel, prompts: list[list[int]]) -> np.ndarray:
        rows = {i: row.copy() for i, row in model.next_logits(prompts)}
        return np.stack([rows[i] for i in range(len(prompts))])

    def decoded(model: LlamaModel, prompts: list[list[int]]) -> tuple[int, np.ndarray]:
        """Return how many tokens of the prefix are decoded, and the logits."""
        steps.clear()
        found = logits(model, prompts)
        return sum(step.count(0) for step in steps), found

    def fresh(prompts: list[list[int]]) -> np.ndarray:
        with llama(tmp_path / "tiny.gguf") as model:
            return logits(model, prompts)

    with llama(tmp_path / "tiny.gguf") as model:
        for asked, n in ((prompts, 20), (prompts, 0), (longer, 5), (shorter, 0), (longer, 15), (others, 21)):
            count, found = decoded(model, asked)
            assert count == n
            np.testing.assert_allclose(found, fresh(asked), atol=1e-4)
        unsteered = logits(model, prompts)
        with model.steered(steering):
            count, moved = decoded(model, prompts)
            assert count == 20
            assert decoded(model, prompts)[0] == 0
        with model.steered(steering):  # nothing is read: the cache keeps what it holds
            pass
        count, back = decoded(model, prompts)
        assert count == 20
        np.testing.assert_allclose(back, unsteered, atol=1e-4)
        assert np.abs(moved - unsteered).max() > 0.01
        with model.steered(steering):
            pass
        assert decoded(model, prompts)[0] == 0


def test_one_long_prompt_does_not_make_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(4)
    lengths = [9, 1200, 9, 9, 1300, 9, 9, 9]
    prompts = [rng.integers(5, 250, length).tolist() for length in lengths]
    with llama(tmp_path / "tiny.gguf", n_ctx=8 * 256) as model:
        alone = [dict(model.generate([prompt], max_tokens=TOKENS))[0] for prompt in prompts]
        steps = watch_steps(monkeypatch)
        together = dict(model.generate(prompts, max_tokens=TOKENS))
    assert [together[i].tokens for i in range(len(prompts))] == [answer.tokens for answer in alone]
    assert set(steps[0]) == set(range(1, 7)), "the six short ones begin together"


def set_training_length(path: Path, n_tokens: int) -> None:
    """Set the training length in the metadata of a file."""
    field = gguf.GGUFReader(path, "r+").fields["qwen2.context_length"]
    field.parts[field.data[0]][0] = n_tokens


def test_a_prompt_of_several_batches_is_read_at_the_given_positions(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A batch without outputs has no rows in the last layer."""
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    prompt = np.random.default_rng(1).integers(5, 250, 1100).tolist()
    with llama(tmp_path / "tiny.gguf", n_ctx=2048) as model:
        layers = list(range(model.n_layer))
        activations = {p: rows["l_out"] for _, p, rows in model.read([prompt], [[4, 1099]], layers)}
        for position in (4, 1099):
            (alone,) = read_last(model, [prompt[: position + 1]], layers)["l_out"]
            np.testing.assert_allclose(activations[position], alone, atol=2e-3)
    assert "Exception" not in capfd.readouterr().err


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    with llama(tmp_path / "tiny.gguf") as model:
        for prompts, layers in (([[]], [1]), ([[5, 6], []], [1]), ([[5, 6]], [])):
            with pytest.raises(InputError, match="nothing to read"):
                list(model.read(prompts, [[0] for _ in prompts], layers))
        assert list(model.read([], [], [1])) == []


def test_a_refused_adapter_leaves_the_model_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    prompts = [[5, 6, 7]]
    with llama(tmp_path / "tiny.gguf", n_ctx=512) as model:
        plain = next(logits.copy() for _, logits in model.next_logits(prompts))
        directions = {1: np.ones(model.n_embd, np.float32)}
        statuses = iter([1])  # the first call fails
        with monkeypatch.context() as patched:
            real = llama_cpp.llama_set_adapters_lora
            patched.setattr(
                llama_cpp, "llama_set_adapters_lora", lambda *arguments: next(statuses, 0) or real(*arguments)
            )
            with pytest.raises(InputError, match="refused the adapter"), model.steered(Steering(directions)):
                pass
        np.testing.assert_array_equal(next(logits for _, logits in model.next_logits(prompts)), plain)


def test_a_steering_that_is_far_too_strong_leaves_no_trace(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    pairs = [([5, 6, 7, 8 + i] * 8, [9, 10, 11] * 4) for i in range(12)]
    with llama(tmp_path / "tiny.gguf", n_ctx=2048) as model:
        plain = model.token_logprobs(pairs[:3])
        with model.steered(Steering({1: np.full(model.n_embd, np.inf, np.float32)})):
            assert all(np.isnan(logprobs).all() for logprobs, _ in model.token_logprobs(pairs))
        # Fewer sequences than before: what the others left stays in the cache.
        for (logprobs, _), (before, _) in zip(model.token_logprobs(pairs[:3]), plain, strict=True):
            np.testing.assert_array_equal(logprobs, before)


def test_a_long_prompt_does_not_slow_later_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    steps = watch_steps(monkeypatch)
    with llama(tmp_path / "tiny.gguf", n_ctx=8 * 256) as model:
        for prompt, at_once in (([5] * 400, 4), ([5] * 7, 8)):
            steps.clear()
            list(model.generate([[*prompt, 6 + i] for i in range(10)], max_tokens=2))
            assert max(max(step) for step in steps) == at_once


@pytest.mark.parametrize("raised", [KeyboardInterrupt, IndexError])
@pytest.mark.parametrize("function", ["ggml_get_name", "ggml_backend_tensor_get"], ids=["ask", "read"])
def test_an_exception_while_tensors_are_read_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, raised: type[BaseException]
) -> None:
    """Ctrl-C arrives in the callback, which is the first Python code after the signal."""
    write_tiny_qwen2(tmp_path / "tiny.gguf")

    def fail(*_: object) -> None:
        raise raised("on purpose")

    with llama(tmp_path / "tiny.gguf") as model:
        before = read_last(model, [[5, 6, 7]], [1])["l_out"]
        with monkeypatch.context() as patched:
            patched.setattr(graph._ggml, function, fail)
            with pytest.raises(raised, match="on purpose"):
                read_last(model, [[5, 6, 7]], [1])
            list(model.next_logits([[5, 6, 7]]))  # reads nothing
        after = read_last(model, [[5, 6, 7]], [1])["l_out"]
        np.testing.assert_array_equal(before, after)


def test_an_interrupt_while_a_model_is_loaded_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives in the log callback, since llama.cpp logs much while it loads."""
    write_tiny_qwen2(tmp_path / "tiny.gguf", n_layer=2)

    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise KeyboardInterrupt

    log, hook = logging.getLogger("rs_gguf.llama"), sys.unraisablehook
    handler = Log()
    log.addHandler(handler)
    monkeypatch.setattr(log, "level", logging.DEBUG)
    log.manager._clear_cache()  # type: ignore[attr-defined]
    try:
        with pytest.raises(KeyboardInterrupt):
            LlamaModel(tmp_path / "tiny.gguf", n_parallel=2, n_ctx=256)
    finally:
        log.removeHandler(handler)
        log.manager._clear_cache()  # type: ignore[attr-defined]
    assert sys.unraisablehook is hook


def test_an_interrupt_while_a_context_is_made_frees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf", n_layer=2)
    made, freed = [], []

    def init(model: Any, params: Any, init: Any = llama_cpp.llama_init_from_model) -> Any:
        made.append(init(model, params))
        raise_within(KeyboardInterrupt())
        return made[0]

    def free(handle: Any, free: Any = llama_cpp.llama_free) -> None:
        freed.append(handle)
        free(handle)

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", init)
    monkeypatch.setattr(llama_cpp, "llama_free", free)
    with pytest.raises(KeyboardInterrupt):
        LlamaModel(tmp_path / "tiny.gguf", n_parallel=2, n_ctx=256)
    assert freed == made


def raise_within(error: BaseException) -> None:
    """Raise an error as a log callback of llama.cpp does."""

    @called_back
    def log() -> None:
        raise error

    ctypes.CFUNCTYPE(None)(log)()


@pytest.mark.parametrize("spoil", ["vocabulary", "metadata"])
def test_defects_that_llama_cpp_accepts_at_loading_are_errors(
    tmp_path: Path, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    if spoil == "vocabulary":  # without it, llama.cpp ends the process at the first text
        monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_model", lambda self, _: self.add_string(
            "tokenizer.ggml.model", "none"))  # fmt: skip
    else:
        monkeypatch.setattr(gguf_header, "values_of_whole", lambda _: {})
    write_tiny_qwen2(path)
    with pytest.raises(InputError, match=f"tiny.gguf holds (no )?{spoil}"):
        LlamaModel(path, n_parallel=1, n_ctx=256)


def test_a_text_may_have_more_tokens_than_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the buffer is too small, llama.cpp returns the needed size."""
    sizes: list[int] = []

    def tokenize(*arguments: Any, tokenize: Any = llama_cpp.llama_tokenize) -> int:
        vocab, text, length, buffer, size, *rest = arguments
        sizes.append(size)
        return int(tokenize(vocab, text, length, buffer, size if len(sizes) > 1 else 3, *rest))

    write_tiny_qwen2(tmp_path / "tiny.gguf")
    with LlamaModel(tmp_path / "tiny.gguf", n_parallel=1, n_ctx=256) as model:
        expected = model.tokenize("the mountain")
        monkeypatch.setattr(llama_cpp, "llama_tokenize", tokenize)
        assert model.tokenize("the mountain") == expected
    assert sizes[1:] == [len(expected)]


def test_each_thread_gets_the_exceptions_of_its_own_calls() -> None:
    """Two calls of llama.cpp overlap; the call that begins first also ends first."""
    hook = sys.unraisablehook
    call = ctypes.CFUNCTYPE(None)

    def caller(error: BaseException) -> Any:
        @called_back
        def fail() -> None:
            raise error

        return call(fail)

    begun, ended = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def run_second() -> None:
        try:
            with calling():
                begun.set()
                ended.wait(30)
                caller(KeyError("second"))()
        except KeyError as error:
            errors.append(error)

    def run_first() -> None:
        with calling():
            thread.start()
            assert begun.wait(30)
            caller(IndexError("first"))()

    thread = threading.Thread(target=run_second)
    with pytest.raises(IndexError, match="first"):
        run_first()
    ended.set()
    thread.join()
    assert [str(error) for error in errors] == ["'second'"]
    assert sys.unraisablehook is hook


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a signal that comes at a set time")
def test_a_signal_while_llama_cpp_computes_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Ctrl-C, the handler runs before the first statement of the callback."""
    write_tiny_qwen2(tmp_path / "tiny.gguf", n_layer=4, n_embd=256)
    hook = sys.unraisablehook

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def decode(*arguments: Any, decode: Any = llama_cpp.llama_decode) -> Any:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        return decode(*arguments)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with llama(tmp_path / "tiny.gguf", n_ctx=512) as model, monkeypatch.context() as patched:
            patched.setattr(llama_cpp, "llama_decode", decode)
            for _ in range(5):
                with pytest.raises(KeyboardInterrupt):
                    read_last(model, [[5, 6, 7] * 150], [1, 2, 3])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sys.unraisablehook is hook


def add_bos(path: Path) -> None:
    """Let a file's vocabulary want a BOS token before every text."""
    field = gguf.GGUFReader(path, "r+").fields["tokenizer.ggml.add_bos_token"]
    field.parts[field.data[0]][0] = True


def test_prompts_begin_as_the_vocabulary_asks(tmp_path: Path) -> None:
    """The tiny model's template writes no BOS token, so the tokeniser must add it."""
    path = tmp_path / "tiny.gguf"
    write_tiny_qwen2(path)
    with LlamaModel(path, n_parallel=1, n_ctx=256) as model, TorchModel(path) as twin:
        assert (model.bos_prefix, twin.bos_prefix) == ([], [])
        plain = ChatFormat.of(model).tokenize(model, "the rain")
        assert ChatFormat.of(twin).tokenize(twin, "the rain") == plain
    add_bos(path)
    with LlamaModel(path, n_parallel=1, n_ctx=256) as model, TorchModel(path) as twin:
        bos = model.tokenize(SPECIALS[0])
        assert model.bos_prefix == twin.bos_prefix == bos
        chat = ChatFormat.of(model)
        prompt = chat.tokenize(model, "the rain")
        assert prompt == bos + plain
        # llama.cpp's server tokenises the rendered conversation in this way.
        text = chat.render([{"role": "user", "content": "the rain"}]).encode()
        buffer = (llama_cpp.llama_token * 100)()
        count = llama_cpp.llama_tokenize(model._vocab, text, len(text), buffer, 100, True, True)
        assert prompt == buffer[:count]
        assert ChatFormat("{{ bos_token }}{{ messages[0].content }}", bos_token=SPECIALS[0]).tokenize(
            model, "the rain"
        ) == bos + model.tokenize("the rain")  # one BOS token, not two


def test_prompts_that_share_much_do_not_outgrow_the_cache(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(5)
    shared = rng.integers(5, 250, 450).tolist()
    prompts = [[*shared, *rng.integers(5, 250, 50).tolist()] for _ in range(5)]  # 700 cells at once
    with llama(tmp_path / "tiny.gguf", n_ctx=512) as model:
        together = {i: logits.copy() for i, logits in model.next_logits(prompts)}
        for i, prompt in enumerate(prompts):
            ((_, alone),) = model.next_logits([prompt])
            np.testing.assert_allclose(together[i], alone, atol=2e-3)


def test_a_resumed_run_samples_the_same_answers(tmp_path: Path) -> None:
    """The draws depend on the prompt, not on its index among the missing prompts."""
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    warm = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=4)
    prompts = np.random.default_rng(6).integers(5, 250, (6, 8)).tolist()
    with llama(tmp_path / "tiny.gguf") as model, TorchModel(tmp_path / "tiny.gguf") as twin:
        for engine in (model, twin):
            whole = dict(engine.generate(prompts, max_tokens=8, sampling=warm))
            rest = dict(engine.generate(prompts[4:], max_tokens=8, sampling=warm))
            assert rest == {0: whole[4], 1: whole[5]}
            greedy = dict(engine.generate(prompts, max_tokens=8))
            assert any(whole[i].tokens != greedy[i].tokens for i in whole)


@pytest.mark.parametrize("use", ["answer", "read"])
def test_a_prompt_that_is_too_long_is_an_error(tmp_path: Path, use: str) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    prompts = [[5], [5] * 300, [5] * 9]
    with llama(tmp_path / "tiny.gguf", n_ctx=256) as model:
        if use == "answer":
            message = r"a prompt has 300 tokens.*answer.* 20.*256.*[Ss]horten it.*fewer tokens for an answer"
            with pytest.raises(InputError, match=message):
                list(model.generate(prompts, max_tokens=20))
        else:
            with pytest.raises(InputError, match=r"a prompt has 300 tokens.*256.*[Ss]horten it\. It ends in"):
                list(model.next_logits(prompts))


def test_no_sequence_is_longer_than_the_training_length(tmp_path: Path) -> None:
    """GPT-2 has no positions beyond it, and llama.cpp ends the process."""
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    set_training_length(tmp_path / "tiny.gguf", 100)
    long = [5] * 101
    with llama(tmp_path / "tiny.gguf", n_ctx=512) as model:
        assert len(list(model.generate([[5] * 92], max_tokens=8))) == 1
        uses: list[Callable[[], Iterable[object]]] = [
            lambda: model.generate([[5] * 93], max_tokens=8),
            lambda: model.next_logits([long]),
            lambda: model.token_logprobs([([5], long)]),
            lambda: read_last(model, [long], [1]),
        ]
        for use in uses:
            with pytest.raises(InputError, match="only 100 fit the model's context"):
                list(use())


def write_adapter(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 64), (32, 1)))
    lora.write(LoraAdapter({"blk.1.ffn_down.weight": (a, b)}, "qwen2"), path)


def test_adapters_not_used_recently_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    files = [tmp_path / f"{seed}.gguf" for seed in range(20)]
    for seed, file in enumerate(files):
        write_adapter(file, seed)
    loaded: set[int] = set()
    load, free = llama_cpp.llama_adapter_lora_init, llama_cpp.llama_adapter_lora_free

    def address(handle: Any) -> int:
        return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)

    def load_and_note(*arguments: Any) -> Any:
        handle = load(*arguments)
        loaded.add(address(handle))
        return handle

    def free_and_note(handle: Any) -> None:
        loaded.remove(address(handle))
        free(handle)

    monkeypatch.setattr(llama_cpp, "llama_adapter_lora_init", load_and_note)
    monkeypatch.setattr(llama_cpp, "llama_adapter_lora_free", free_and_note)
    with llama(tmp_path / "tiny.gguf") as model:

        def logits_under(*adapters: Path) -> np.ndarray:
            with model.steered(Steering(adapters=[(path, 0.1) for path in adapters])):
                return next(logits.copy() for _, logits in model.next_logits([[5, 6, 7]]))

        alone = [logits_under(file) for file in files]
        assert 1 < len(loaded) <= 8
        together = logits_under(*files)  # 20 at once, more than stay loaded
        assert len(loaded) <= 8
        # llama.cpp sorts adapters by their address, so it may add them in another order.
        np.testing.assert_allclose(logits_under(*files), together, atol=1e-5)
        for file, expected in zip(files, alone, strict=True):
            np.testing.assert_array_equal(logits_under(file), expected)
    assert len({logits.tobytes() for logits in [*alone, together]}) == 21


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        ("llama_decode", 1, "could not decode"),
        ("llama_set_adapter_cvec", 1, "refused the control vector"),
        ("llama_init_from_model", None, "cannot make a context"),
    ],
)
def test_an_error_does_not_quote_an_older_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, status: int | None, message: str
) -> None:
    write_tiny_qwen2(tmp_path / "tiny.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with llama(tmp_path / "tiny.gguf") as model:
        with (
            pytest.raises(InputError, match="cannot load the adapter"),
            model.steered(Steering(adapters=[(tmp_path / "broken.gguf", 1.0)])),
        ):
            pass
        with monkeypatch.context() as patched:
            patched.setattr(llama_cpp, function, lambda *arguments: status)
            with (
                pytest.raises(InputError, match=rf"{message}.*llama\.cpp says: nothing more\."),
                model.steered(Steering({1: np.ones(model.n_embd, np.float32)})),
            ):
                list(model.generate([[5, 6]], max_tokens=2))


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("0::/\n", {}, 8 << 20),
        ("0::/\n", {"memory.max": "max"}, 8 << 20),
        ("0::/\n", {"memory.max": f"{2 << 20}"}, 2 << 20),
        ("0::/user.slice/one.scope\n", {"user.slice/one.scope/memory.max": f"{3 << 20}"}, 3 << 20),
        ("0::/user.slice/one.scope\n", {"user.slice/memory.max": f"{4 << 20}"}, 4 << 20),
        ("4:memory:/a\n0::/\n", {"memory/memory.limit_in_bytes": f"{1 << 20}"}, 1 << 20),
        ("0::/\n", {"memory.max": f"{9 << 20}"}, 8 << 20),
        ("0::/\n", {"memory.max": f"{5 << 20}", "memory.current": f"{3 << 20}"}, 2 << 20),
        (
            "0::/\n",
            {
                "memory.max": f"{5 << 20}",
                "memory.current": f"{3 << 20}",
                "memory.stat": f"anon 5\ninactive_file {1 << 20}\nactive_file 7\n",
            },
            3 << 20,
        ),
    ],
)
def test_free_memory_respects_the_limit_of_a_control_group(
    tmp_path: Path, group: str, limits: dict[str, str], expected: int
) -> None:
    files = {"proc/meminfo": "MemTotal:  99999 kB\nMemAvailable:    8192 kB\n", "proc/self/cgroup": group}
    for name, text in {**files, **{f"sys/fs/cgroup/{name}": text for name, text in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.free_memory(tmp_path) == expected


def test_free_memory_is_0_where_the_system_does_not_report_it(tmp_path: Path) -> None:
    assert machine.free_memory(tmp_path) == 0
