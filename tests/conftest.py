"""Fixtures of the real model: the embedded default, fetched once into the user's cache."""

from pathlib import Path

import pytest

from rs_gguf import models


@pytest.fixture(scope="session")
def real_model() -> Path:
    return models.pull(models.DEFAULT)
