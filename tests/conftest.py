"""Fixtures and settings of all tests: a tiny model, and the default model, which is downloaded once."""

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.models import resolve as models

# A busy machine must not fail a test, and a real failure occurs again in the next run.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

# A background job of a shell ignores interrupts. Commands that tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    """Return a random model with ChatML's control tokens. Its tokenizer works like that of a real model."""
    from fixtures.tiny_gguf import write_tiny_qwen2  # The import loads PyTorch.

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_qwen2(path)
    with LlamaModel(path, n_parallel=1, n_ctx=256, n_threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def real_model() -> Path:
    return models.pull(models.DEFAULT)
