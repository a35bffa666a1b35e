"""A tiny model and the real one, the embedded default, fetched once; what holds for all tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.models import resolve as models

# A busy machine is no fault, and a failure is there again the next time.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

# A shell's background job ignores interrupts, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    """A random model with ChatML's control tokens: what its tokenizer does with a text is real."""
    from fixtures.tiny_gguf import write_tiny_qwen2  # which loads PyTorch

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_qwen2(path)
    with LlamaModel(path, n_parallel=1, n_ctx=256, n_threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def real_model() -> Path:
    return models.pull(models.DEFAULT)
