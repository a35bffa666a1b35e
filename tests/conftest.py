"""Fixtures and settings of all tests: a tiny model, and the default model, which is downloaded once."""

import os
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


def pytest_configure(config: pytest.Config) -> None:
    """Give each test process its own share of the cores: threads that compete for cores are far slower."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        # PyTorch counts the machine's cores. OpenMP reads this when it is loaded, so workers must inherit it.
        count = config.getoption("numprocesses", default=None) or 1
        if count > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores) // count)))
    else:
        count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        if share := cores[int(worker.removeprefix("gw")) :: count]:
            os.sched_setaffinity(0, share)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest files, on the real model, so that no process waits for another at the end."""
    real = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in real)


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
