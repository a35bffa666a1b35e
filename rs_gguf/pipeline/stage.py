"""Where a run tells how far it is. `rs_gguf.cli.terminal` draws it; the library's own is silent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol


class Progress(Protocol):
    """What a run calls."""

    def stage(self, name: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Enter a stage of `total` items; the value advances the count."""
        ...

    def skipped(self, name: str) -> None:
        """A stage was done before."""
        ...

    def download(self, done: int, total: int) -> None:
        """Bytes of a model download."""
        ...


class Silent:
    """Tells nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda n: None

    def skipped(self, name: str) -> None:
        pass

    def download(self, done: int, total: int) -> None:
        pass
