"""The fit stage: from captured arrays and judged answers to directions and gates, as files of a run folder.

`Samples` of the fit split enter; `directions.safetensors` (one unit direction and calibration a layer, for
each estimator and ridge), `gates.safetensors` (the adapter's reads and writes), `fit.json` and `figures/`
leave.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rs_gguf.activations.activations import Activations, WriterInputs
from rs_gguf.activations.projection import project, project_statistics
from rs_gguf.activations.scores import layer_scores, scales_of, score_bands, scores_of
from rs_gguf.errors import InputError
from rs_gguf.estimators import ESTIMATORS, fit_paths
from rs_gguf.estimators.device import Device, resolve_device
from rs_gguf.estimators.labels import Labels
from rs_gguf.estimators.path import RidgePath
from rs_gguf.estimators.validation import choose_ridge
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods import figures
from rs_gguf.methods.gates import Gates, fit_gates
from rs_gguf.methods.method import Directions
from rs_gguf.methods.options import FitOptions
from rs_gguf.records.conversation import KINDS, NEUTRAL, Prompt
from rs_gguf.records.files import load_arrays, save_arrays
from rs_gguf.records.rows import finite, write_json

# λ of the figures' path: wide enough to see where it stops to matter. One factorisation serves all of them.
_PATH_RIDGES = np.geomspace(1e-3, 1e3, 13)


@dataclass(frozen=True)
class Samples:
    """The prompts of the fit split, and what was read of them.

    `prompts`: those that were judged; `activations` [N, L, D], an array or `Activations`; `confidence` [N];
    `inputs` by matrix, empty where the engine cannot read them. `folder`: where activations that are not one
    array are mapped to a file. `others`: prompts that were not answered, or whose answers could not be
    judged; their inputs come after those of `prompts`, and only gates learn from them. `categories` [N]:
    kinds of refusal, where the judge told them. `contexts`: names of what stood around the `others`, "" for
    nothing.
    """

    prompts: Sequence[Prompt]
    activations: Any
    confidence: NDArray[np.float64]
    inputs: Mapping[str, WriterInputs]
    folder: Path
    others: Sequence[Prompt] = ()
    categories: Sequence[str | None] = ()
    contexts: Sequence[str] = ()

    @cached_property
    def rows(self) -> NDArray[Any]:
        """The activations as one array, for the projection kernel."""
        return Activations.of(self.activations).array(self.folder)

    def share(self, processes: Processes) -> Samples:
        """Return the part of them that this process reads."""
        mine, rest = processes.share(len(self.prompts)), processes.share(len(self.others))
        places = np.arange(len(self.prompts) + len(self.others))
        read = np.concatenate([places[: len(self.prompts)][mine], places[len(self.prompts) :][rest]])
        return Samples(
            self.prompts[mine],
            Activations.of(self.activations).take(mine),
            self.confidence[mine],
            {name: rows.share(read, processes) for name, rows in self.inputs.items()},
            self.folder,
            self.others[rest],
            self.categories[mine],
            self.contexts[rest],
        )

    @cached_property
    def kinds(self) -> list[str]:
        return [prompt.kind for prompt in self.prompts]

    def labels(self, processes: Processes = ALONE) -> Labels:
        """Return those of all samples, as a gate takes them: of the `others` kind and cells alone count.

        With several `processes`, of the samples of all of them.
        """
        every = [*self.prompts, *self.others]
        confidence = np.concatenate([self.confidence, np.zeros(len(self.others))])
        contexts = [""] * len(self.prompts) + [*self.contexts]
        cells = [[p.topic, p.form, p.language, name] for p, name in zip(every, contexts, strict=True)]
        return Labels.of(confidence, [prompt.kind for prompt in every], cells, processes=processes)

    def counts(self, kind: str) -> dict[str, int]:
        """How many of a kind were refused, answered and neither."""
        values = self.confidence[np.array([k == kind for k in self.kinds])]
        return {
            "refused": int((values > NEUTRAL).sum()),
            "answered": int((values < -NEUTRAL).sum()),
            "neutral": int((np.abs(values) <= NEUTRAL).sum()),
        }

    def check_classes(self, effect: str) -> None:
        """Raise `InputError` unless each class that is fitted on has a sample."""
        changed = ("sensitive", "refused" if effect == "remove" else "answered")
        for kind, side in (changed, ("benign", "answered"), ("harmful", "refused")):
            counts = self.counts(kind)
            if counts[side] == 0:
                raise InputError(
                    f"fit: none of the {sum(counts.values())} {kind} prompts was {side}: no class to fit on. "
                    f"Use more or other {kind} prompts (prompts.fit, prompts.{kind}) or another model."
                )


def fit(
    samples: Samples,
    options: FitOptions,
    folder: Path,
    *,
    processes: Processes = ALONE,
    advance: Callable[[int], None],
) -> None:
    """Fit and draw all that the options name, write the files. `advance` counts estimators, then blocks.

    Several `processes` call this together, each with all samples. They share the moments; rank 0 does the
    rest and writes.
    """
    samples.check_classes(options.effect)
    mine = samples if processes.count == 1 else samples.share(processes)
    names = options.estimators
    paths = fit_paths(  # all in one call: estimators with the same classes share a factorisation
        mine.activations,
        mine.confidence,
        [ESTIMATORS[name]() for name in names],
        ridges=options.ridges,
        kinds=mine.kinds,
        device=options.device,
        processes=processes,
    )
    gates = _fit_gates(mine, options, processes, advance) if samples.inputs else None
    if processes.rank > 0:
        return
    for stale in ("adapters", "figures"):  # of a search, or of estimators, that are no more
        shutil.rmtree(folder / stale, ignore_errors=True)
    summary = _write_directions(samples, dict(zip(names, paths, strict=True)), options, folder, advance)
    if gates is None:
        (folder / "gates.safetensors").unlink(missing_ok=True)
    else:
        reads = {
            f"{name}/{writer}": rows.astype(np.float32)
            for name, found in (("opens", gates.opens), ("guards", gates.guards))
            for writer, rows in found.items()
        }
        arrays = {"ridges": gates.ridges, "contrast": gates.contrast, **reads}
        save_arrays(folder / "gates.safetensors", arrays)
    counts = {kind: samples.counts(kind) for kind in KINDS}
    read = {kind: sum(prompt.kind == kind for prompt in samples.others) for kind in KINDS}
    write_json(folder / "fit.json", {"samples": counts, "others": read, "directions": summary})


def _fit_gates(
    samples: Samples, options: FitOptions, processes: Processes, advance: Callable[[int], None]
) -> Gates:
    known = [*samples.categories, *[None] * (len(samples.prompts) - len(samples.categories))]
    shares = processes.gather([*known, *[None] * len(samples.others)])
    return fit_gates(
        samples.inputs,
        samples.activations,
        samples.labels(processes),
        ridges=options.gate_ridges,
        induce=options.effect == "induce",
        categories=list(itertools.chain.from_iterable(shares)),
        device=options.device,
        processes=processes,
        advance=advance,
    )


def _write_directions(
    samples: Samples,
    paths: Mapping[str, RidgePath],
    options: FitOptions,
    folder: Path,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Write `directions.safetensors` and the figures; return the rows of `fit.json`, one an estimator
    and ridge.
    """
    rows = _on_device(samples.rows, options.device)
    found: dict[str, NDArray[Any]] = {}
    summary: list[dict[str, Any]] = []
    shown: dict[str, NDArray[np.float64]] = {}
    for name, path in paths.items():
        # All ridges at once: the activations are read but once, and no projections are kept.
        ridges = _ridges(name, options)
        directions, c = path.directions[: len(ridges)].swapaxes(0, 1), samples.confidence
        merit = project_statistics(rows, directions, c, path.offset, neutral=NEUTRAL)
        scores, auroc = scores_of(merit).T, merit.auroc.T  # [ridges, L]
        to_induce, to_remove = scales_of(merit, c)
        scales = (to_remove if options.effect == "remove" else to_induce).T
        for k, ridge in enumerate(ridges):
            unit = path.directions[k]
            found |= {f"{name}@{ridge:g}/unit": unit, f"{name}@{ridge:g}/scales": scales[k]}
            summary.append(
                {
                    "estimator": name,
                    "ridge": ridge,
                    "score": scores[k].tolist(),
                    "auroc": auroc[k].tolist(),
                    "mean_refused": merit.mean_refused[:, k].tolist(),
                    "mean_answered": merit.mean_answered[:, k].tolist(),
                    "harm_cosine": [finite(cosine) for cosine in path.harm_cosine[k]],
                    "contrast_cosine": [finite(cosine) for cosine in path.contrast_cosine],
                }
            )
        best, layer = (int(index) for index in np.unravel_index(auroc.argmax(), auroc.shape))
        shown[f"{name}@{ridges[best]:g}"] = path.directions[best]
        projected = project(rows, directions[:, best, np.newaxis], path.offset)[:, :, 0]
        _draw(samples, name, projected, path.directions[best], layer, options, folder / "figures")
        if len(shown) == 1:
            figures.save_pca(folder / "figures" / "pca.svg", samples.rows, layer, samples.confidence)
        advance(1)
    figures.save_cosines(folder / "figures" / "cosines.svg", shown)
    save_arrays(folder / "directions.safetensors", found)
    return summary


def _on_device(rows: NDArray[Any], device: Device) -> Any:
    """Return `rows` as a tensor where PyTorch projects them, on a GPU; the kernel takes them as they are."""
    where = resolve_device(device)
    return rows if where.type == "cpu" else torch.from_numpy(rows).to(where)


def _draw(
    samples: Samples,
    name: str,
    projected: NDArray[np.float32],
    directions: NDArray[np.float64],
    layer: int,
    options: FitOptions,
    folder: Path,
) -> None:
    """One estimator at its best ridge: `projected` [N, L], `directions` [L, D], and `layer`, the best one."""
    figures.save_layer_scores(
        folder / f"{name}-scores.svg",
        layer_scores(projected, samples.confidence),
        bands=score_bands(projected, samples.confidence),
        label="Pearson − RMSE",
    )
    figures.save_projections(
        folder / f"{name}-projections.svg",
        projected[:, layer],
        samples.confidence,
        neutral=NEUTRAL,
        layer=layer,
    )
    with np.errstate(invalid="ignore"):  # no bar for a block without a direction
        figures.save_dimension_mass(folder / f"{name}-mass.svg", directions, top=min(10, directions.shape[1]))
    if not ESTIMATORS[name].uses_covariance:
        return  # no ridge
    try:
        choice = choose_ridge(
            samples.rows,
            samples.confidence,
            _PATH_RIDGES,
            ESTIMATORS[name](),
            kinds=samples.kinds,
            device=options.device,
        )
    except InputError:  # too few of a class to hold any out: the path cannot be known, the fit stands
        return
    figures.save_ridge_path(
        folder / f"{name}-ridge.svg", choice.ridges, choice.scores, best=choice.best, label="held-out AUROC"
    )


def load_directions(folder: Path, options: FitOptions) -> dict[tuple[str, float], Directions]:
    """What `fit` wrote, by estimator and ridge: what a vector takes away, so reversed to induce refusals."""
    arrays = load_arrays(folder / "directions.safetensors")
    sign = 1 if options.effect == "remove" else -1
    return {
        (name, ridge): Directions(sign * arrays[f"{name}@{ridge:g}/unit"], arrays[f"{name}@{ridge:g}/scales"])
        for name in options.estimators
        for ridge in _ridges(name, options)
    }


def _ridges(name: str, options: FitOptions) -> Sequence[float]:
    """Those that make directions of their own: without a covariance there is none, told by 0."""
    return options.ridges if ESTIMATORS[name].uses_covariance else [0.0]


def load_gates(folder: Path) -> Gates | None:
    """The adapter's gates that `fit` wrote, or None where the engine could not read what they need."""
    path = folder / "gates.safetensors"
    if not path.is_file():
        return None
    arrays = load_arrays(path)
    opens, guards = (
        {name.removeprefix(way): a.astype(np.float64) for name, a in arrays.items() if name.startswith(way)}
        for way in ("opens/", "guards/")
    )
    return Gates(arrays["ridges"], opens, guards, arrays["contrast"])
