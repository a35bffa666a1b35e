"""The fit stage: from captured arrays and judged answers to what each method fits, as files of a run folder.

`Samples` of the fit split enter; `directions.safetensors` (one unit direction and calibration a layer, for
each estimator and ridge), `gates.safetensors` (the adapter's reads and writes), `fit.json` and `figures/`
leave.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods import METHODS
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.rows import write_json


def fit(
    samples: Samples,
    options: FitOptions,
    folder: Path,
    *,
    processes: Processes = ALONE,
    advance: Callable[[int], None],
) -> None:
    """Fit and draw all that the options name, write the files. `advance` counts steps of the methods.

    Several `processes` call this together, each with all samples. They share the moments; rank 0 does the
    rest and writes.
    """
    samples.check_classes(options.effect)
    fitted = {
        name: method.fit(samples, options, processes=processes, advance=advance)
        for name, method in METHODS.items()
    }
    if processes.rank > 0:
        return
    for stale in ("adapters", "figures"):  # of a search, or of estimators, that are no more
        shutil.rmtree(folder / stale, ignore_errors=True)
    record: dict[str, Any] = {}
    for name, method in METHODS.items():
        found = fitted[name]
        if found is None:
            (folder / method.artefact).unlink(missing_ok=True)
            continue
        record |= method.save(found, folder)
        method.draw(found, samples, options, folder / "figures", advance=advance)
    counts = {kind: samples.counts(kind) for kind in KINDS}
    read = {kind: sum(prompt.kind == kind for prompt in samples.others) for kind in KINDS}
    write_json(folder / "fit.json", {"samples": counts, "others": read, **record})


def load(folder: Path, options: FitOptions) -> dict[str, Any]:
    """Return what each method fitted, by its name; a method that was not fitted is left out."""
    loaded = {name: method.load(folder, options) for name, method in METHODS.items()}
    return {name: found for name, found in loaded.items() if found is not None}
