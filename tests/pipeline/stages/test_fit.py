"""Test the fit stage with every method, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from fixtures.fit_samples import LAYERS, OPTIONS, WIDE, samples_in

from rs_gguf.methods import METHODS
from rs_gguf.pipeline import sections
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Run
from rs_gguf.pipeline.stages import fit as stage
from rs_gguf.pipeline.stages.fit import Fit, fit, fitted_as, load
from rs_gguf.prompts.contexts import PLAIN, Context
from rs_gguf.records.conversation import KINDS, Prompt
from rs_gguf.records.files import load_arrays

WORKER = """
import sys
from pathlib import Path
from fixtures.fit_samples import OPTIONS, WIDE, samples_in
from rs_gguf.machine import Processes
from rs_gguf.pipeline.stages.fit import fit
folder = Path(sys.argv[1])
with Processes.of_torchrun() as processes:
    own = folder / str(processes.rank)
    own.mkdir()
    fit(samples_in(own, WIDE), OPTIONS, own, processes=processes, advance=lambda n: None)
"""


def inputs(**options: Any) -> Any:
    recipe = Recipe(fit=sections.Fit(**options))
    run = SimpleNamespace(recipe=recipe, prompts={"fit": [], "tune": []}, gate_only=[])
    return Fit().inputs(cast("Run", run))


@pytest.mark.parametrize(
    "options", [{"gate_refits": 1}, {"ridges": [1.0]}, {"gate_ridges": [1.0]}, {"estimators": ["md"]}]
)
def test_options_are_inputs_of_the_fit(options: dict[str, Any]) -> None:
    assert inputs(**options) != inputs()


def test_another_device_gives_the_same_fit() -> None:
    assert inputs(device="cuda") == inputs(device="cpu") == inputs()


def test_to_remove_a_refusal_that_a_context_asks_for_is_fitted_as_harmful() -> None:
    asking = Context("kitchen", system="Decline all but recipes.", refusals_asked=True)
    prompts = {kind: Prompt("Who rules?", kind, topic="Europe", form="question") for kind in KINDS}
    for kind, prompt in prompts.items():
        assert fitted_as(prompt, PLAIN, "remove") == fitted_as(prompt, asking, "induce") == prompt
        assert fitted_as(prompt, asking, "remove").kind == ("benign" if kind == "benign" else "harmful")
    moved = fitted_as(prompts["sensitive"], asking, "remove")
    assert (moved.prompt, moved.topic, moved.form) == ("Who rules?", "refusal asked", "")


@pytest.mark.parametrize("name", ["HARMFUL_TARGET_RATIO", "TOPIC_SAMPLES", "OFF_TARGET_WEIGHT"])
def test_constants_of_the_gates_are_inputs_of_the_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = inputs()
    monkeypatch.setattr(stage, name, 99)
    assert inputs() != before


@pytest.mark.slow
def test_every_method_writes_its_file_and_is_loaded(tmp_path: Path) -> None:
    advanced: list[int] = []
    fit(samples_in(tmp_path), OPTIONS, tmp_path, advance=advanced.append)
    assert sum(advanced) == sum(method.steps(OPTIONS, LAYERS) for method in METHODS.values())
    assert all((tmp_path / method.artefact).is_file() for method in METHODS.values())
    assert list(load(tmp_path, OPTIONS)) == list(METHODS)
    record = json.loads((tmp_path / "fit.json").read_text())
    assert list(record) == ["samples", "directions"]
    assert [row["estimator"] for row in record["directions"]] == ["md", "wrmd", "wrmd"]


@pytest.mark.slow
def test_a_method_without_its_inputs_writes_nothing(tmp_path: Path) -> None:
    fit(samples_in(tmp_path), OPTIONS, tmp_path, advance=lambda _: None)
    of_folder = replace(samples_in(tmp_path), inputs={}, model=None)
    fit(of_folder, OPTIONS, tmp_path, advance=lambda _: None)
    assert list(load(tmp_path, OPTIONS)) == ["vector"]
    assert not (tmp_path / METHODS["adapter"].artefact).exists()


@pytest.mark.slow
def test_two_processes_fit_what_one_does_and_the_first_writes(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    root = Path(__file__).parents[3]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "worker.py"), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["tiny.gguf"]  # the fixture's own
    one = tmp_path / "one"
    one.mkdir()
    fit(samples_in(one, WIDE), OPTIONS, one, advance=lambda _: None)
    for method in METHODS.values():
        alone, shared = (load_arrays(folder / method.artefact) for folder in (one, tmp_path / "0"))
        assert list(alone) == list(shared)
        for name, rows in alone.items():
            # Directions and the contrast are kept in float64, gate vectors in float32.
            tolerance = 1e-10 if rows.dtype == np.float64 else 1e-6 * np.abs(rows).max()
            np.testing.assert_allclose(shared[name], rows, rtol=0, atol=tolerance, err_msg=name)
