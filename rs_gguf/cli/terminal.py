"""Show progress on stderr: one line per stage with count, rate and time left.

If stderr is not a terminal, print only a plain line at the end of each stage.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rs_gguf.records.artefacts import STAGES
from rs_gguf.report.text import duration


class TerminalProgress:
    """Progress of a run, drawn on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._download: tuple[Progress, TaskID] | None = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a stage with `total` items; yield a function that takes the number of items just done."""
        start = time.monotonic()
        bar = Progress(
            TextColumn("{task.description:<30}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        done = 0
        with bar:
            task = bar.add_task(STAGES[name].activity, total=total, rate="")

            def advance(n: int) -> None:
                nonlocal done
                done += n
                rate = done / max(1e-9, time.monotonic() - start)
                bar.update(task, advance=n, rate=f"{rate:.1f}/s")

            yield advance
        seconds = time.monotonic() - start
        label = f"✓ {STAGES[name].activity:<30}"
        self._console.print(f"{label} {done:>5} in {duration(seconds)}", highlight=False)

    def skipped(self, name: str) -> None:
        """Report a stage that an earlier run has already done."""
        self._console.print(f"✓ {STAGES[name].activity:<30} done before", highlight=False, style="dim")

    def download(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes have been downloaded."""
        if self._download is None:
            bar = Progress(
                TextColumn("{task.description:<30}"),
                BarColumn(bar_width=24),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                disable=not self._console.is_terminal,
                transient=True,
            )
            bar.start()
            self._download = bar, bar.add_task("Downloading the model", total=total)
        bar, task = self._download
        bar.update(task, completed=done)
        if done >= total:
            bar.stop()
            self._download = None

    def close(self) -> None:
        """Stop drawing and restore the terminal."""
        if self._download is not None:
            self._download[0].stop()
            self._download = None
