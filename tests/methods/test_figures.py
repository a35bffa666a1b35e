"""Test that each figure is a readable image with the same bytes each time, and that the fit stage draws."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from rs_gguf.activations.fallback import numpy_projections
from rs_gguf.activations.scores import calibration_scales, principal_components
from rs_gguf.errors import InputError
from rs_gguf.estimators import ESTIMATORS
from rs_gguf.methods import figures
from rs_gguf.methods.samples import Samples
from rs_gguf.methods.vector import ControlVector
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.sections import Fit
from rs_gguf.pipeline.stages import fit as fitting
from rs_gguf.records.conversation import KINDS, Prompt

pytestmark = pytest.mark.slow

Draw = dict[str, Callable[[Path], None]]


@pytest.fixture
def draw() -> Draw:
    rng = np.random.default_rng(0)
    activations = rng.normal(size=(30, 4, 12)).astype(np.float16)
    confidence = rng.uniform(-1, 1, 30)
    directions = np.linalg.qr(rng.normal(size=(12, 4)))[0].T
    scores = rng.normal(size=4)
    return {
        "scores": lambda p: figures.save_layer_scores(p, scores, bands=(scores - 1, scores + 1)),
        "cosines": lambda p: figures.save_cosines(p, {"md": directions, "rmd": -directions[:3]}),
        "pca": lambda p: figures.save_pca(p, activations, 1, confidence),
        "projections": lambda p: figures.save_projections(p, activations[:, 0, 0], confidence, layer=0),
        "mass": lambda p: figures.save_dimension_mass(p, directions, top=3),
        "ridge": lambda p: figures.save_ridge_path(
            p, [1, 0.1], rng.normal(size=(2, 4)) * 0 + scores, best=0.1
        ),
    }


@pytest.mark.parametrize("name", ["scores", "cosines", "pca", "projections", "mass", "ridge"])
def test_png_and_svg_repeat(draw: Draw, name: str, tmp_path: Path) -> None:
    for suffix in ("png", "svg"):
        first, second = tmp_path / f"a.{suffix}", tmp_path / "new" / f"b.{suffix}"
        draw[name](first)
        draw[name](second)
        assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg", "new"]  # no other file


def test_a_failed_figure_leaves_the_old_file(draw: Draw, tmp_path: Path) -> None:
    target = tmp_path / "a.svg"
    target.write_text("old")
    with pytest.raises(InputError, match="do not vary"):
        figures.save_pca(target, np.ones((5, 1, 3)), 0, np.zeros(5))
    assert target.read_text() == "old"
    with pytest.raises(InputError, match=r"\.png and \.svg"):
        draw["mass"](tmp_path / "a.jpg")


def test_dimension_mass() -> None:
    rows = np.array([[4.0, -3, 2, 1], [1, 1, 1, 1]])
    np.testing.assert_allclose(figures.dimension_mass(rows, top=2), [0.7, 0.5])
    with pytest.raises(InputError, match="1 to 4"):
        figures.dimension_mass(rows, top=5)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_principal_components_equal_the_svd(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(1).normal(size=shape)
    scores, shares = principal_components(rows)
    left, singular, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs(left[:, :2] * singular[:2]), atol=1e-10)
    np.testing.assert_allclose(shares, singular[:2] ** 2 / (singular**2).sum(), atol=1e-12)


def samples(n: int) -> Samples:
    """Return judged prompts of all kinds; refused and answered ones differ along the first dimension."""
    rng = np.random.default_rng(2)
    confidence = np.resize([0.9, 0.8, 0.7, -0.9, -0.8, -0.7], n) + rng.uniform(-0.1, 0.1, n)
    activations = rng.normal(size=(n, 3, 24)).astype(np.float32)
    activations[:, :, 0] += confidence[:, None]
    prompts = [Prompt(str(i), KINDS[i % 3], topic="AB"[i % 2]) for i in range(n)]
    return Samples(prompts, activations, confidence, {}, Path())


def fit(given: Samples, folder: Path, estimators: list[str]) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    fitting.fit(given, Recipe(fit=Fit(estimators=estimators)).fit_options, folder, advance=lambda _: None)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_fit_stage_draws_and_repeats_for_any_thread_count(tmp_path: Path) -> None:
    # Large enough that BLAS would split a product over threads.
    given, results = samples(3600), []
    for threads in (1, 2):
        with threadpool_limits(threads):
            results.append(fit(given, tmp_path / str(threads), ["contrast-wrmd", "md"]))
    drawn = {name for name in results[0] if name.startswith("figures")}
    best = max(json.loads(results[0]["fit.json"])["directions"], key=lambda row: max(row["auroc"]))[
        "estimator"
    ]
    names = [f"{best}-scores", f"{best}-projections", f"{best}-mass", "pca", "cosines"]
    names += [f"{best}-ridge"] * (best != "md")  # md has no ridge
    assert drawn == {f"figures/{name}.svg" for name in names}
    assert all(ElementTree.fromstring(results[0][name]).tag.endswith("svg") for name in drawn)
    assert results[0] == results[1]


def test_a_class_with_fewer_samples_than_folds_gets_a_fit_without_a_ridge_figure(tmp_path: Path) -> None:
    given = samples(60)
    harmful = np.flatnonzero([p.kind == "harmful" for p in given.prompts])
    given.confidence[harmful[1:]] = -0.9
    given.confidence[harmful[0]] = 0.9  # the fold that holds it out has no refused harmful sample
    files = fit(given, tmp_path, ["safe-wrmd"])
    assert "directions.safetensors" in files
    assert "figures/safe-wrmd-ridge.svg" not in files


def test_figures_of_an_earlier_fit_are_removed_and_small_classes_have_no_ridge_figure(tmp_path: Path) -> None:
    fit(samples(60), tmp_path, ["wrmd"])
    assert (tmp_path / "figures" / "wrmd-ridge.svg").is_file()
    files = fit(samples(6), tmp_path, ["wrmd"])  # 3 samples per class are too few for 5 folds
    assert {name for name in files if name.startswith("figures")} == {
        f"figures/{name}.svg" for name in ("cosines", "pca", "wrmd-mass", "wrmd-projections", "wrmd-scores")
    }


def test_a_new_fit_removes_the_adapters_of_an_earlier_search(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "gate-1-1-2-0.gguf").touch()
    fit(samples(6), tmp_path, ["md"])
    assert not (tmp_path / "adapters").exists()


def test_a_vector_is_calibrated_on_the_class_that_it_moves_towards(tmp_path: Path) -> None:
    """To remove, s⁻ of the answered samples; to induce, s⁺ of the refused ones (method §5)."""
    given = samples(600)
    given.activations[given.confidence > 0] *= 3.0
    cases: list[tuple[Literal["remove", "induce"], int, int]] = [("remove", 1, -1), ("induce", 0, 1)]
    for effect, index, sign in cases:
        recipe = Recipe(effect=effect, fit=Fit(estimators=["wrmd"], ridges=[0.5]))
        (tmp_path / effect).mkdir()
        fitting.fit(given, recipe.fit_options, tmp_path / effect, advance=lambda _: None)
        directions = ControlVector().load(tmp_path / effect, recipe.fit_options)["wrmd", 0.5]
        assert directions.sign == sign
        offset = ESTIMATORS["wrmd"](ridge=0.5).fit(given.activations, given.confidence).offset_
        v, o = directions.unit[:, np.newaxis].astype(np.float32), offset.astype(np.float32)
        projections = numpy_projections(given.activations, v, o)[:, :, 0]
        expected = calibration_scales(projections, given.confidence)
        np.testing.assert_allclose(directions.scales, expected[index], rtol=1e-4)
        assert not np.allclose(expected[0], expected[1], rtol=0.1)


def test_without_a_covariance_one_ridge_is_enough(tmp_path: Path) -> None:
    recipe = Recipe(fit=Fit(estimators=["md", "wrmd"], ridges=[0.5, 2.0]))
    fitting.fit(samples(60), recipe.fit_options, tmp_path, advance=lambda _: None)
    fitted = ControlVector().load(tmp_path, recipe.fit_options)
    assert set(fitted) == {("md", 0.0), ("wrmd", 0.5), ("wrmd", 2.0)}
