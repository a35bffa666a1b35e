"""Count the tokens that each stage of a run reads in llama.cpp, and those that it reads again.

A token is read again if llama.cpp has decoded it before after the same text, in the same file and under the
same steering, in this or an earlier stage. A token is read in vain if it is a guess of a draft that the model
did not draw. Runs a recipe in a new folder and prints a row for each stage. Judgements of an earlier run are
not made again, so set XDG_CACHE_HOME to an empty folder to count them all.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama import contexts
from rs_gguf.engines.llama.context import UNSTEERED, ActiveSteering, BatchToken, LlamaContext
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.run import run
from rs_gguf.pipeline.stage import Silent


class Readings(Silent):
    """The tokens that each stage read. Texts are kept as hashes, each of the one before and a token."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()
        self.again: Counter[str] = Counter()
        self.in_vain: Counter[str] = Counter()
        self._known: set[int] = set()
        self._stage = "start"

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        before, self._stage = self._stage, name
        yield lambda n: None
        self._stage = before

    def add(self, text: int) -> None:
        self.read[self._stage] += 1
        self.again[self._stage] += text in self._known
        self._known.add(text)

    def lose(self, n: int) -> None:
        self.in_vain[self._stage] += n


READINGS = Readings()
STEERINGS: dict[int, tuple[ActiveSteering, int]] = {id(UNSTEERED): (UNSTEERED, 0)}  # each with its hash


class Watched(LlamaContext):
    """A context that notes what it decodes. `_texts`: by sequence, the hash of the text up to each token."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._texts: dict[int, list[int]] = {}
        super().__init__(*arguments, **options)

    def decode(self, tokens: Sequence[BatchToken]) -> Iterator[tuple[BatchToken, NDArray[np.float32]]]:
        start = hash((str(self._file.path), STEERINGS[id(self._steering)][1]))
        for token in tokens:
            text = self._texts.setdefault(token.seq, [])
            del text[token.pos :]
            text.append(hash((text[-1] if text else start, token.id)))
            READINGS.add(text[-1])
        yield from super().decode(tokens)

    def begin(self, slot: int) -> None:
        self._texts[slot] = list(self._texts.get(0, []))
        super().begin(slot)

    def cut(self, slot: int, length: int) -> None:
        if slot:
            READINGS.lose(len(self._texts[slot]) - length)
        super().cut(slot, length)

    def close_gaps(self, running: dict[int, Any]) -> None:
        before = {id(item): self._texts[slot] for slot, item in running.items()}
        super().close_gaps(running)
        self._texts |= {slot: before[id(item)] for slot, item in running.items()}


def active(
    self: contexts.LlamaContexts,
    steering: Steering,
    of: Callable[[contexts.LlamaContexts, Steering], ActiveSteering] = contexts.LlamaContexts._active,
) -> ActiveSteering:
    """Return the steering in llama.cpp's form, and note its hash."""
    found = of(self, steering)
    if found is not UNSTEERED:
        directions = [(layer, np.asarray(row).tobytes()) for layer, row in steering.directions.items()]
        adapters = [(str(path.resolve()), path.stat().st_mtime_ns, x) for path, x in steering.adapters]
        STEERINGS[id(found)] = found, hash((*directions, *adapters))
    return found


def row(name: str, counts: Mapping[str, int]) -> str:
    read = counts["read"]
    shares = [f"{counts[sort]} | {counts[sort] / read if read else 0:.1%}" for sort in ("again", "in vain")]
    return f"| {name} | {read} | {' | '.join(shares)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="?", help="recipe.toml; by default the default recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    options = parser.parse_args()
    recipe = recipes.load(options.recipe, options.settings)
    with (
        tempfile.TemporaryDirectory() as out,
        patch.object(contexts, "LlamaContext", Watched),
        patch.object(contexts.LlamaContexts, "_active", active),
    ):
        run(recipe, Path(out) / "run", progress=READINGS)
    print("| stage | tokens read | again | | in vain | |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    sorts = {"read": READINGS.read, "again": READINGS.again, "in vain": READINGS.in_vain}
    for stage in READINGS.read:
        print(row(stage, {sort: counter[stage] for sort, counter in sorts.items()}))
    print(row("all", {sort: counter.total() for sort, counter in sorts.items()}))


if __name__ == "__main__":
    main()
