"""Test what every method does, from samples of the fit split to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.fit_samples import LAYERS, OPTIONS, WIDTH, samples_in
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.engines.engine import Can
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.methods import METHODS, suited_methods
from rs_gguf.methods.method import SteeringMethod
from rs_gguf.methods.samples import Samples
from rs_gguf.records.trials import Candidate, Trial, load_trials
from rs_gguf.steering import file as steering_file
from rs_gguf.steering.file import SteeringFile


@dataclass(frozen=True)
class Fit:
    method: SteeringMethod[Any]
    samples: Samples
    fitted: Any
    folder: Path
    advanced: list[int]
    record: dict[str, Any]

    def candidates(self) -> list[Candidate]:
        return list(self.method.space(self.fitted, LAYERS, "remove").start)


@pytest.fixture(scope="module", params=METHODS)
def fit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """Fit, save and draw with one method."""
    method, folder = METHODS[request.param], tmp_path_factory.mktemp(request.param)
    samples, advanced = samples_in(folder), list[int]()
    fitted = method.fit(samples, OPTIONS, advance=advanced.append)
    record = method.save(fitted, folder)
    method.draw(fitted, samples, OPTIONS, folder / "figures")
    return Fit(method, samples, fitted, folder, advanced, record)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaModel]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=LAYERS, n_embd=WIDTH)
    with LlamaModel(path, n_parallel=4, n_ctx=512, n_threads=1) as loaded:
        yield loaded


def test_names_are_its_own() -> None:
    assert [method.name for method in METHODS.values()] == list(METHODS)
    suffixes = [method.suffix for method in METHODS.values()]
    for names in (suffixes, [m.artefact for m in METHODS.values()], [m.word for m in METHODS.values()]):
        assert len(set(names)) == len(names)
    assert all(suffix.endswith(".gguf") for suffix in suffixes)


@pytest.mark.slow
def test_it_suits_an_engine_that_reads_everything(fit: Fit) -> None:
    assert fit.method.suits(Can.LORA | Can.MATRIX_INPUTS | Can.LLAMA_CPP, "remove")


def test_it_advances_by_its_steps(fit: Fit) -> None:
    assert sum(fit.advanced) == fit.method.steps(OPTIONS, LAYERS)


def test_a_fit_is_saved_and_loaded(fit: Fit) -> None:
    assert (fit.folder / fit.method.artefact).is_file()
    assert json.loads(json.dumps(fit.record, allow_nan=False)) == fit.record
    loaded = fit.method.load(fit.folder, OPTIONS)
    for candidate in fit.candidates():
        file, again = file_of(fit, candidate), file_of(replace(fit, fitted=loaded), candidate)
        assert file.provenance == again.provenance
        assert file.cosines(again) == pytest.approx(dict.fromkeys(file.norms, 1.0))
        assert file.norms == pytest.approx(again.norms)


def test_the_same_samples_give_the_same_bytes(fit: Fit, tmp_path: Path) -> None:
    again = fit.method.fit(fit.samples, OPTIONS)
    fit.method.save(again, tmp_path)
    assert (tmp_path / fit.method.artefact).read_bytes() == (fit.folder / fit.method.artefact).read_bytes()


def test_its_space_holds_its_candidates_alone(fit: Fit) -> None:
    space = fit.method.space(fit.fitted, LAYERS, "remove")
    assert space.start
    for candidate in space.start:
        assert candidate.method == fit.method.name
        assert space.holds(candidate)
        assert space.strength[0] <= candidate.strength <= space.strength[1]
    for other in METHODS.values():
        if other is not fit.method:
            assert not space.holds(replace(space.start[0], method=other.name))


def test_its_candidates_are_read_back_from_rows(fit: Fit) -> None:
    for candidate in fit.candidates():
        trial = Trial(1, candidate, "short", 0.5, 1.0)
        assert load_trials([json.loads(json.dumps(trial.to_row()))]) == [trial]


def file_of(fit: Fit, candidate: Candidate) -> SteeringFile:
    return fit.method.file(fit.fitted, candidate, "qwen2", {"effect": "remove"})


def test_a_file_has_the_effect_of_its_candidate(fit: Fit, model: LlamaModel, tmp_path: Path) -> None:
    """The search scales a file of unit strength, so both are equal up to rounding."""
    candidate = replace(fit.candidates()[0], strength=0.5)
    file, path = file_of(fit, candidate), tmp_path / f"remove{fit.method.suffix}"
    assert (file.architecture, file.provenance) == ("qwen2", {"effect": "remove"})
    assert set(file.layers) <= set(range(candidate.first, candidate.last + 1))
    steering_file.write(file, path)
    prompt = [model.tokenize("Who governs a city?")]

    def logits(steering: Any) -> Any:
        with model.steered(steering):
            return next(model.next_logits(prompt))[1].copy()

    of_search = logits(fit.method.steering(fit.fitted, candidate, "qwen2", tmp_path / "scratch"))
    of_file = logits(file.steering(path))
    unsteered = next(model.next_logits(prompt))[1].copy()
    assert not np.array_equal(of_search, unsteered)
    np.testing.assert_allclose(of_search, of_file, atol=1e-3 * np.abs(of_search - unsteered).max() + 1e-5)


def test_inducing_has_its_own_space_and_file(fit: Fit) -> None:
    if not fit.method.suits(~Can(0), "induce"):
        pytest.skip("this method can only remove refusals")
    options = replace(OPTIONS, effect="induce")
    fitted = fit.method.fit(fit.samples, options)
    candidate = fit.method.space(fitted, LAYERS, "induce").start[0]
    induce, remove = fit.method.file(fitted, candidate, "qwen2", {}), file_of(fit, candidate)
    assert all(cosine < 0 for cosine in induce.cosines(remove).values())


def test_without_inputs_no_adapter_is_fitted_or_loaded(tmp_path: Path) -> None:
    samples = replace(samples_in(tmp_path), inputs={})
    assert METHODS["adapter"].fit(samples, OPTIONS) is None
    assert METHODS["adapter"].load(tmp_path, OPTIONS) is None
    assert not METHODS["adapter"].suits(Can(0), "remove")


def test_an_engine_that_reads_everything_suits_all_methods() -> None:
    assert suited_methods(~Can(0), "remove") == ["vector", "adapter"]
