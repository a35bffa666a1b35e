"""Draw figures of a fit, without a display, as PNG or SVG files by the suffix of the path.

Arrays of a fit go in; one image file each comes out, written completely or not at all. The same input gives
the same bytes with the same version of matplotlib. The figures show the evidence that García-Ferrero et al.
(arXiv 2512.16602) use: layer scores, the spread of a direction over dimensions, separation by confidence.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rs_gguf.activations.activations import Activations
from rs_gguf.activations.scores import layer_scores, principal_components, score_bands
from rs_gguf.errors import InputError
from rs_gguf.estimators import ESTIMATORS
from rs_gguf.estimators.moments import Float64
from rs_gguf.estimators.validation import choose_ridge
from rs_gguf.methods.options import FitOptions
from rs_gguf.methods.samples import Samples
from rs_gguf.records.conversation import NEUTRAL
from rs_gguf.records.files import write_atomic

FORMATS = (".png", ".svg")
# No time stamp, so that the file depends on the data alone.
_METADATA: dict[str, dict[str, str | None]] = {".png": {"Software": None}, ".svg": {"Date": None}}

# λ of the ridge path: wide enough to see where λ has no more effect. One factorisation serves all of them.
_PATH_RIDGES = np.geomspace(1e-3, 1e3, 13)


def save_estimator(
    samples: Samples,
    name: str,
    projected: npt.NDArray[np.float32],
    directions: npt.NDArray[np.float64],
    layer: int,
    options: FitOptions,
    folder: Path,
) -> None:
    """Draw one estimator at its best ridge.

    projected: [N, L], projections of the samples.
    directions: [L, D].
    layer: the layer with the highest AUROC.
    """
    save_layer_scores(
        folder / f"{name}-scores.svg",
        layer_scores(projected, samples.confidence),
        bands=score_bands(projected, samples.confidence),
        label="Pearson − RMSE",
    )
    save_projections(
        folder / f"{name}-projections.svg",
        projected[:, layer],
        samples.confidence,
        neutral=NEUTRAL,
        layer=layer,
    )
    with np.errstate(invalid="ignore"):  # a layer without a direction gives NaN, and so no bar
        save_dimension_mass(folder / f"{name}-mass.svg", directions, top=min(10, directions.shape[1]))
    if not ESTIMATORS[name].uses_covariance:
        return  # such an estimator has no ridge
    try:
        choice = choose_ridge(
            samples.rows,
            samples.confidence,
            _PATH_RIDGES,
            ESTIMATORS[name](),
            kinds=samples.kinds,
            device=options.device,
        )
    except InputError:  # a class has fewer samples than folds: the fit is usable, but without this figure
        return
    save_ridge_path(
        folder / f"{name}-ridge.svg", choice.ridges, choice.scores, best=choice.best, label="held-out AUROC"
    )


def save_layer_scores(
    path: Path,
    scores: npt.ArrayLike,
    *,
    bands: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    label: str = "score",
) -> None:
    """Draw scores [L] over the layers, with `bands` (low [L], high [L]) as their 95% intervals."""
    values = np.asarray(scores, dtype=np.float64)
    figure, axes = _figure(8, 4)
    layers = np.arange(len(values))
    if bands is not None:
        low, high = (np.asarray(band, dtype=np.float64) for band in bands)
        axes.fill_between(layers, low, high, alpha=0.25, linewidth=0, label="95% interval")
    axes.plot(layers, values, marker=".", label=label)
    axes.set(xlabel="layer", ylabel=label, title="Layer scores")
    axes.legend()
    _save(figure, path)


def save_cosines(path: Path, directions: Mapping[str, npt.ArrayLike]) -> None:
    """Draw cosines between all layers of all estimators; `directions` maps a name to unit rows [L, D]."""
    names = list(directions)
    rows = [np.asarray(directions[name], dtype=np.float64) for name in names]
    stacked = np.concatenate(rows)
    figure, axes = _figure(7, 6)
    image = axes.imshow(stacked @ stacked.T, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    edges = np.cumsum([0, *map(len, rows)])
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="black", linewidth=0.8)
        axes.axvline(edge - 0.5, color="black", linewidth=0.8)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    axes.set_xticks(middles, names, rotation=45, ha="right")
    axes.set_yticks(middles, names)
    axes.set_title("Cosines of directions; within a square, layer 0 first")
    figure.colorbar(image, ax=axes, label="cosine")
    _save(figure, path)


def save_pca(path: Path, activations: Any, layer: int, confidence: npt.ArrayLike) -> None:
    """Draw the first two principal components of a layer of `activations` [N, L, D], coloured by confidence.

    confidence: [N], refusal confidence.

    Raises:
        InputError: the activations do not vary.
    """
    rows = Activations.of(activations).layer_rows(layer).numpy()
    scores, shares = principal_components(rows)
    figure, axes = _figure(6.5, 5)
    points = axes.scatter(
        scores[:, 0], scores[:, 1], c=np.asarray(confidence), cmap="coolwarm", vmin=-1, vmax=1, s=12
    )
    axes.set(
        xlabel=f"component 1 ({shares[0]:.0%} of variance)",
        ylabel=f"component 2 ({shares[1]:.0%})",
        title=f"Activations at layer {layer}",
    )
    figure.colorbar(points, ax=axes, label="refusal confidence")
    _save(figure, path)


def save_projections(
    path: Path, projections: npt.ArrayLike, confidence: npt.ArrayLike, *, neutral: float = NEUTRAL, layer: int
) -> None:
    """Draw histograms of one layer's projections [N]: answered, neutral (|c| ≤ `neutral`) and refused."""
    p, c = np.asarray(projections, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    classes = {
        "answered": c < -neutral,
        f"neutral, |c| ≤ {neutral}": np.abs(c) <= neutral,
        "refused": c > neutral,
    }
    figure, axes = _figure(7, 4)
    bins = np.histogram_bin_edges(p, bins=40)
    for (name, mask), colour in zip(classes.items(), ("C0", "0.6", "C3"), strict=True):
        if mask.any():
            axes.hist(p[mask], bins=bins, alpha=0.6, color=colour, label=f"{name} ({mask.sum()})")
    axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="projection from the offset", ylabel="samples", title=f"Projections at layer {layer}")
    axes.legend()
    _save(figure, path)


def save_dimension_mass(path: Path, directions: npt.ArrayLike, *, top: int = 10) -> None:
    """Draw `dimension_mass` of directions [L, D] over the layers."""
    shares = dimension_mass(directions, top=top)
    figure, axes = _figure(8, 4)
    axes.bar(np.arange(len(shares)), shares)
    # The number of the paper is for its own top 10; an evenly spread direction would hold top / D.
    even = top / np.asarray(directions).shape[1]
    axes.axhline(even, color="black", linewidth=0.8, linestyle="--", label=f"even: {even:.1%}")
    axes.axhline(0.019, color="C3", linewidth=0.8, linestyle=":", label="paper: 1.9%")
    axes.set(xlabel="layer", ylabel=f"share of the top {top}", title="Concentration of the direction")
    axes.legend()
    _save(figure, path)


def save_ridge_path(
    path: Path,
    ridges: npt.ArrayLike,
    scores: npt.ArrayLike,
    *,
    best: float | None = None,
    label: str = "score",
) -> None:
    """Draw the held-out scores [R, L] of each layer over `ridges` [R], with the mean over layers in bold.

    best: the ridge to mark; None marks none.
    """
    grid, values = np.asarray(ridges, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    order = np.argsort(grid)
    figure, axes = _figure(7, 4)
    axes.plot(grid[order], values[order], color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(grid[order], values[order].mean(axis=1), color="black", linewidth=2, label="mean over layers")
    if best is not None:
        axes.axvline(best, color="C3", linestyle="--", label=f"best held out: {best:.3g}")
    axes.set(xscale="log", xlabel="ridge λ", ylabel=label, title="Ridge path; one line per layer")
    axes.legend()
    _save(figure, path)


def dimension_mass(directions: npt.ArrayLike, *, top: int = 10) -> Float64:
    """Return the share [L] of Σ|v_i| that the `top` largest |v_i| of each row of `directions` [L, D] hold.

    A row of zeros gives NaN.

    Raises:
        InputError: `top` is not between 1 and D.
    """
    sizes = np.sort(np.abs(np.asarray(directions, dtype=np.float64)), axis=1)
    if not 1 <= top <= sizes.shape[1]:
        raise InputError(f"top = {top}: 1 to {sizes.shape[1]} dimensions are accepted")
    return np.asarray(sizes[:, -top:].sum(axis=1) / sizes.sum(axis=1))


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    # pyplot would keep every figure and choose a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"figure {path}: the suffixes {' and '.join(FORMATS)} are accepted")
    image = io.BytesIO()
    # Ids come from a fixed salt, so that the file depends on the data alone.
    with mpl.rc_context({"svg.hashsalt": "rs-gguf", "svg.fonttype": "path"}):
        figure.savefig(image, format=suffix[1:], dpi=130, metadata=_METADATA[suffix])
    write_atomic(Path(path), lambda file: file.write(image.getvalue()))
