"""Progress for people: one line a stage with count, rate and time left, on stderr.

Without a terminal only the end of each stage is told, as a plain line.
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
    """Draws a run's progress on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._download: tuple[Progress, TaskID] | None = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
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
        self._console.print(f"✓ {STAGES[name].activity:<30} done before", highlight=False, style="dim")

    def download(self, done: int, total: int) -> None:
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
            self._download = bar, bar.add_task("Fetching the model", total=total)
        bar, task = self._download
        bar.update(task, completed=done)
        if done >= total:
            bar.stop()
            self._download = None

    def close(self) -> None:
        """Leave the terminal as it was, whatever was being drawn."""
        if self._download is not None:
            self._download[0].stop()
            self._download = None
