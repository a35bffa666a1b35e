"""Groups that are left out of a fit, and what the fit without them does on them, on a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import leave_out
import numpy as np
import pytest
from fixtures.fit_samples import LAYERS, OPTIONS, samples_in
from leave_out import Bench, groups_of

from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Steering
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.evaluation.gate_activation import gate_activations, minimal_pairs
from rs_gguf.methods import METHODS
from rs_gguf.methods.adapter import arguments, space_of
from rs_gguf.methods.samples import Samples
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Run
from rs_gguf.prompts.grid import grid
from rs_gguf.records.conversation import KINDS, SPLITS, Judgement, Kind, Prompt, Split
from rs_gguf.records.rows import Row

SAID = {
    "sensitive": "Where can a secret vote be held",
    "harmful": "Where can a secret bomb be laid",
    "benign": "Where can a secret letter be kept",
}


class Judge:
    """Every prompt is refused explicitly, whatever the answer."""

    name = "stand-in"

    def judge(self, pairs: Sequence[tuple[str, Any]]) -> Iterator[tuple[int, Judgement]]:
        yield from ((i, Judgement(0.9, "stand-in", "direct")) for i in range(len(pairs)))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return samples_in(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def model(samples: Samples) -> Iterator[LlamaModel]:
    assert samples.model is not None
    with LlamaModel(samples.model, n_parallel=4, n_ctx=512, n_threads=1) as model:
        yield model


def pool() -> dict[str, dict[Kind, list[Prompt]]]:
    """Return by split and kind two members of minimal pairs, of topic t0, and one prompt of t0 and t1."""

    def paired(kind: Kind, split: Split, i: int) -> Prompt:
        return Prompt(f"{SAID[kind]} {split} {i}?", kind, topic="t0", split=split, pair=f"{split} {i}")

    return {
        split: {
            kind: [
                *(paired(kind, split, i) for i in range(2)),
                *(Prompt(f"{kind} {split} {i}", kind, topic=f"t{i}", split=split) for i in range(2)),
            ]
            for kind in KINDS
        }
        for split in SPLITS
    }


def run_of(model: LlamaModel, folder: Path) -> Any:
    return SimpleNamespace(
        model=model, judge=Judge(), recipe=Recipe(), pool=pool(), folder=RunFolder(folder),
    )  # fmt: skip


def test_vocabularies_are_found_at_the_beginnings_of_words() -> None:
    groups = groups_of("vocabulary", ["secrecy"], [Prompt("A secret.", "benign")])
    inside = groups["secrecy"]
    for text in ("Hiding in attics", "ANONYMOUS sources", "他们秘密开会", "un mouvement clandestin"):
        assert inside(Prompt(text, "sensitive"))
    for text in ("The secretary of state", "a hideous chide", "desecret"):
        assert not inside(Prompt(text, "sensitive"))
    with pytest.raises(InputError, match="no fit prompt belongs to the vocabulary poetry"):
        groups_of("vocabulary", ["poetry"], [Prompt("A poem.", "benign")])


def test_every_vocabulary_has_harmful_prompts_of_the_grid() -> None:
    prompts = grid(["harmful"])
    for name, inside in groups_of("vocabulary", None, prompts).items():
        assert sum(map(inside, prompts)) >= leave_out.LEAST, name


def test_the_largest_groups_are_the_default() -> None:
    prompts = [Prompt(f"{i} {j}", "harmful", form=f"f{i}") for i in range(12) for j in range(i + 1)]
    prompts += [Prompt(str(i), "benign", form="look") for i in range(99)]
    groups = groups_of("form", None, prompts)
    assert list(groups) == [f"f{i}" for i in range(11, 3, -1)]
    assert groups["f5"](prompts[-100]) is False
    assert [p for p in prompts if groups["f4"](p)] == [p for p in prompts if p.form == "f4"]


def test_a_row_equals_fits_and_activations_made_by_hand(
    samples: Samples, model: LlamaModel, tmp_path: Path
) -> None:
    run = run_of(model, tmp_path)
    options = replace(OPTIONS, gate_ridges=[1.0])
    candidate = space_of([1.0], LAYERS).start[0]
    bench = Bench(cast("Run", run), samples, options, candidate)
    everything = bench.fit(samples)
    row = bench.row(lambda p: p.topic == "t0", everything, 0)

    every = [*samples.prompts, *samples.gate_only]
    kept = [i for i, p in enumerate(every) if p.topic != "t0"]
    assert row["left_out"] == len(every) - len(kept) > 0
    without = samples.take(np.array(kept))
    assert [*without.prompts, *without.gate_only] == [every[i] for i in kept]
    fits: dict[str, Any] = {"all": everything, "without": METHODS["adapter"].fit(without, options)}
    # Fewer than 8 prompts of the topic are unseen, so those of the fit split are among them.
    tested: list[list[Prompt]] = [
        [p for split in ("tune", "validation", "fit") for p in run.pool[split][kind] if p.topic == "t0"]
        for kind in leave_out.TESTED
    ]
    found = {}
    for name, fitted in fits.items():
        gates = {key: a[0] for key, (a, _) in fitted.factors(*arguments(candidate)).items()}
        steering = METHODS["adapter"].steering(fitted, candidate, "qwen2", tmp_path / name)
        conversations = [[(t, ()) for t in chat_tokens(model, prompts, None)] for prompts in tested]
        sides = [gate_activations(model, steering, gates, each)[:, 0] for each in conversations]
        pairs = minimal_pairs(model, steering, gates, [*tested[0], *tested[1]], None)
        assert pairs is not None
        assert pairs.separated.of == 6
        found[name] = {
            "auroc": np.mean([(a > b) + (a == b) / 2 for a in sides[0] for b in sides[1]]),
            "opened": [sum(sides[0] > 0.5), 9],
            "closed": [sum(sides[1] <= 0.5), 9],
            "pairs": [pairs.separated.n, 6],
        }
    assert {name: row[name] for name in fits} == found
    assert (
        np.abs(fits["all"].sensitive_gate["ffn_down"] - fits["without"].sensitive_gate["ffn_down"]).max()
        > 1e-3
    )


def test_answers_are_judged_unsteered_and_under_both_fits(
    samples: Samples, model: LlamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(model, tmp_path)
    candidate = space_of([1.0], LAYERS).start[0]
    bench = Bench(cast("Run", run), samples, OPTIONS, candidate)
    asked: list[tuple[int, bool]] = []
    answers = Bench.answers

    def recorded(self: Bench, steering: Steering, prompts: Sequence[Prompt]) -> Any:
        asked.append((len(prompts), bool(steering.adapters)))
        return answers(self, steering, prompts)

    monkeypatch.setattr(Bench, "answers", recorded)
    row = bench.row(lambda p: p.topic == "t0", bench.fit(samples), 3)
    assert asked == [(6, False), (6, True), (6, True)]
    for fit in ("all", "without"):
        assert (row[fit]["explicit"], row[fit]["kept"]) == ([3, 3], [3, 3])
    leave_out.print_table({"t0": row})


def test_a_kind_that_the_group_lacks_is_taken_from_other_groups(
    samples: Samples, model: LlamaModel, tmp_path: Path
) -> None:
    run = run_of(model, tmp_path)
    bench = Bench(cast("Run", run), samples, OPTIONS, space_of([1.0], LAYERS).start[0])

    def inside(prompt: Prompt) -> bool:
        return prompt.topic == "t0" and (prompt.kind == "sensitive" or prompt.split != "fit")

    own = [p for split in ("tune", "validation", "fit") for p in run.pool[split]["sensitive"][:3]]
    assert bench.tested("sensitive", inside) == own
    others = [p for split in ("tune", "validation") for p in run.pool[split]["harmful"]]
    assert bench.tested("harmful", inside) == others


def test_a_second_call_continues_from_the_rows(
    samples: Samples, model: LlamaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, fitted = run_of(model, tmp_path), []

    class Opened:
        def __enter__(self) -> Any:
            return run

        def __exit__(self, *_: object) -> None:
            pass

    def row(self: Bench, inside: Any, everything: Any, n_answers: int) -> Row:
        fitted.append(n_answers)
        found = {"auroc": 0.9, "opened": [7, 8], "closed": [8, 8], "pairs": [1, 2]}
        return {"left_out": 5, "all": found, "without": {**found, "explicit": [6, 1], "kept": [3, 4]}}

    monkeypatch.setattr(leave_out, "open_run", lambda *_: Opened())
    monkeypatch.setattr(recipes, "load", lambda _: run.recipe)
    monkeypatch.setattr(leave_out, "samples_of", lambda _: samples)
    monkeypatch.setattr(Bench, "fit", lambda *_: None)
    monkeypatch.setattr(Bench, "row", row)
    command = ["leave_out.py", str(tmp_path), "--by", "topic", "--json", str(tmp_path / "rows.json")]
    for more in (
        ["--groups", "t0"],
        ["--groups", "t0", "t1"],
        ["--answers", "9"],
        ["--ridge", "0.5"],
    ):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        leave_out.main()
    # Then all three topics with answers, and all of the ridge.
    assert fitted == [0, 0, 9, 9, 9, 0, 0, 0]
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 8
    lines = capsys.readouterr().out.splitlines()
    assert "| t0 | 5 | all | 0.900 | 7 of 8 | 8 of 8 | 1 of 2 | – | – |" in lines
    assert "| t0 | 5 | without | 0.900 | 7 of 8 | 8 of 8 | 1 of 2 | 6 → 1 | 3 of 4 |" in lines
