"""The pipeline: prompts → answers → scores → activations → directions → strength → GGUF → before/after.

A recipe and a run folder go in; `remove.gguf`, `metrics.json`, `report.html` and `card.md` come out. Each
stage reads the files of the stages before it and is skipped while its inputs are the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rs_gguf import control_vector, metrics, models, prompts, proof
from rs_gguf.arrays import holds, load_arrays, save_arrays
from rs_gguf.constrained import ContrastRidge, ResidualRidge, SafeRidge, SensitiveRidge
from rs_gguf.errors import GateError, InputError
from rs_gguf.estimators import (
    DirectionEstimator,
    MeanDifference,
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
    WeightedMeanDifference,
    WeightedRidgeMeanDifference,
    fit_paths,
)
from rs_gguf.evaluation import (
    NO_STEERING,
    Answer,
    Model,
    Steering,
    answer,
    answer_and_judge,
    chat_tokens,
    drift,
)
from rs_gguf.files import read_json, sha256, write_json
from rs_gguf.judges import NEUTRAL, Judge, Judgement, open_judge
from rs_gguf.layers import calibration_scales, layer_auroc, layer_scores
from rs_gguf.llama import LlamaModel, Sampling
from rs_gguf.projection import project
from rs_gguf.prompts import KINDS, Prompt
from rs_gguf.recipe import Recipe, dump
from rs_gguf.report import write_card, write_report
from rs_gguf.run_folder import Row, RowLog, RunFolder, key_of
from rs_gguf.steering import SteeringVector
from rs_gguf.targets import TorchModel
from rs_gguf.tuning import Directions, Finder, Unsteered, load_trials
from rs_gguf.version import __version__

ESTIMATORS: dict[str, type[DirectionEstimator]] = {
    estimator.name: estimator
    for estimator in (
        MeanDifference,
        WeightedMeanDifference,
        RidgeMeanDifference,
        WeightedRidgeMeanDifference,
        UncentredWeightedRidgeMeanDifference,
        SensitiveRidge,
        ContrastRidge,
        SafeRidge,
        ResidualRidge,
    )
}

STAGES = ("answer", "score", "capture", "fit", "tune", "write", "measure", "report")

_SHARD = 64  # prompts whose activations are lost at most when a capture is killed
_DRIFT_PAIRS = 128  # conversations, as in the paper


class Progress(Protocol):
    """Where a run tells how far it is. The library's own is silent."""

    def stage(self, name: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Enter a stage of `total` items; the value advances the count."""
        ...

    def skipped(self, name: str) -> None:
        """A stage was done before."""
        ...

    def download(self, done: int, total: int) -> None:
        """Bytes of a model download."""
        ...


class _Silent:
    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda n: None

    def skipped(self, name: str) -> None:
        pass

    def download(self, done: int, total: int) -> None:
        pass


def run(
    recipe: Recipe, out: Path, *, fresh: bool = False, progress: Progress | None = None, until: str = "report"
) -> dict[str, Any]:
    """Run the stages up to `until` in the folder `out` and return the metrics (empty before `measure`).

    Resumes by itself: what an earlier call with the same recipe finished is not done again.

    Raises:
        InputError: something in the recipe, its files or the machine does not serve; the message says what.
        GateError: the written vector's effect could not be observed on the model.
    """
    folder = RunFolder(out, fresh=fresh)
    with folder.locked(), contextlib.closing(Pipeline(recipe, folder, progress or _Silent())) as pipeline:
        dump(recipe, folder / "recipe.toml")
        for stage in STAGES[: STAGES.index(until) + 1]:
            pipeline.do(stage)
        return pipeline.metrics() if until in ("measure", "report") else {}


class Pipeline:
    """The stages of one run. Models are loaded when a stage first needs them."""

    def __init__(self, recipe: Recipe, folder: RunFolder, progress: Progress) -> None:
        unknown = sorted(set(recipe.fit.estimators) - ESTIMATORS.keys())
        if unknown:
            raise InputError(
                f"recipe: fit.estimators: no estimator {', '.join(unknown)}; "
                f"there are {', '.join(ESTIMATORS)}."
            )
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self._open: list[LlamaModel | TorchModel] = []
        self._test_pool = 0  # test prompts there are, before the recipe's cut

    def close(self) -> None:
        for model in self._open:
            model.close()

    def do(self, stage: str) -> None:
        """Run one stage unless it is done with the same inputs."""
        key = self._key(stage)
        if self.folder.is_done(stage, key):
            self.progress.skipped(stage)
            return
        start = time.monotonic()
        getattr(self, f"_{stage}")(key)
        self.folder.mark_done(stage, key, time.monotonic() - start)

    def metrics(self) -> dict[str, Any]:
        value: dict[str, Any] = read_json(self.folder / "metrics.json")
        return value

    def _key(self, stage: str) -> str:
        """Hash of all that matters up to this stage: recipe sections, prompts, model, version."""
        recipe = self.recipe
        parts: dict[str, Any] = {
            "answer": [
                __version__, self.model_hash, recipe.seed, recipe.answers.tokens, recipe.answers.temperature,
                recipe.prompts.system, [p.id for p in self.prompts["fit"] + self.prompts["tune"]],
            ],
            "score": [recipe.judge],
            "capture": [],
            "fit": recipe.fit.model_dump(),
            "tune": recipe.tune.model_dump(),
            "write": [],
            "measure": [recipe.answers.test_tokens, [p.id for p in self.prompts["test"]]],
            "report": [],
        }  # fmt: skip
        before = STAGES[: STAGES.index(stage) + 1]
        return key_of([(name, parts[name]) for name in before])

    # ---- what the stages work on -----------------------------------------------------------------

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """Prompts by split, each kind cut to the recipe's size."""
        chosen: dict[str, list[Prompt]] = {split: [] for split in prompts.SPLITS}
        for kind in KINDS:
            files = getattr(self.recipe.prompts, kind)
            rows = [row for path in files for row in prompts.load(path, kind)] or prompts.grid([kind])
            for split in prompts.SPLITS:
                pool = [row for row in rows if row.split == split]
                self._test_pool += len(pool) if split == "test" else 0
                size = getattr(self.recipe.prompts, split)
                chosen[split] += prompts.stratified(pool, size, seed=self.recipe.seed)
        return chosen

    @cached_property
    def model_path(self) -> Path:
        return models.resolve(self.recipe.model, progress=self.progress.download)

    @cached_property
    def model_hash(self) -> str:
        return models.fingerprint(self.model_path)

    @cached_property
    def model(self) -> Model:
        return self._load(self.model_path)

    @cached_property
    def judge(self) -> Judge:
        path = models.resolve(self.recipe.judge or models.DEFAULT, progress=self.progress.download)
        if path == self.model_path and isinstance(self.model, LlamaModel):
            return open_judge(self.model)
        judge = LlamaModel(path)
        self._open.append(judge)
        return open_judge(judge)

    def _load(self, path: Path) -> Model:
        model: Model = (
            TorchModel(path) if path.is_dir() else LlamaModel(path, n_parallel=self.recipe.answers.parallel)
        )
        self._open.append(model)
        return model

    # ---- stages ----------------------------------------------------------------------------------

    def _answer(self, key: str) -> None:
        asked = self.prompts["fit"] + self.prompts["tune"]
        log = RowLog(self.folder, "answers.jsonl", key)
        missing = [p for p in asked if p.id not in log.rows]
        sampling = Sampling(temperature=self.recipe.answers.temperature, seed=self.recipe.seed)
        with self.progress.stage("answer", len(asked)) as advance:
            advance(len(asked) - len(missing))
            tokens = chat_tokens(self.model, missing, self.recipe.prompts.system)
            for i, found in answer(
                self.model, tokens, max_tokens=self.recipe.answers.tokens, sampling=sampling
            ):
                log.append(
                    {
                        **prompts.to_row(missing[i]),
                        "answer": found.text,
                        "tokens": found.tokens,
                        "finished": found.finished,
                        "degenerate": found.degenerate,
                    }
                )
                advance(1)
        log.finish([p.id for p in asked])

    def _score(self, key: str) -> None:
        rows = self.folder.read_rows("answers.jsonl")
        log = RowLog(self.folder, "scores.jsonl", key)
        missing = [row for row in rows if row["id"] not in log.rows]
        with self.progress.stage("score", len(rows)) as advance:
            advance(len(rows) - len(missing))
            for i, graded in self.judge.judge([(row["prompt"], row["answer"]) for row in missing]):
                log.append({"id": missing[i]["id"], **_graded(graded), "judge": self.judge.name})
                advance(1)
        log.finish([row["id"] for row in rows])

    def _capture(self, key: str) -> None:
        """Residuals of the fit prompts at the last prompt token, every block, in shards."""
        asked = self.prompts["fit"]
        layers = range(self.model.n_layer)
        with self.progress.stage("capture", len(asked)) as advance:
            for start in range(0, len(asked), _SHARD):
                shard = asked[start : start + _SHARD]
                path = self._shard(start)
                if not holds(path, key):
                    tokens = chat_tokens(self.model, shard, self.recipe.prompts.system)
                    block = np.empty((len(shard), len(layers), self.model.n_embd), dtype=np.float32)
                    for i, found in self.model.activations(tokens, layers=layers):
                        block[i] = found["l_out"]
                    save_arrays(path, {"activations": block}, {"key": key})
                advance(len(shard))

    def _shard(self, start: int) -> Path:
        return self.folder / "activations" / f"{start // _SHARD:05d}.safetensors"

    def _fit(self, _: str) -> None:
        asked = self.prompts["fit"]
        activations = np.concatenate(
            [load_arrays(self._shard(start))["activations"] for start in range(0, len(asked), _SHARD)]
        )
        scores = {row["id"]: row["confidence"] for row in self.folder.read_rows("scores.jsonl")}
        judged = [i for i, p in enumerate(asked) if scores[p.id] is not None]
        activations = activations[judged]
        confidence = np.array([scores[asked[i].id] for i in judged])
        kinds = [asked[i].kind for i in judged]
        groups = np.array([[asked[i].topic, asked[i].form, asked[i].language] for i in judged])
        _check_classes(confidence, kinds)
        found: dict[str, np.ndarray[Any, Any]] = {}
        summary = []
        with self.progress.stage("fit", len(self.recipe.fit.estimators)) as advance:
            paths = fit_paths(  # all in one call: estimators with the same classes share a factorisation
                activations,
                confidence,
                [ESTIMATORS[name]() for name in self.recipe.fit.estimators],
                ridges=self.recipe.fit.ridges,
                kinds=kinds,
                groups=groups,
            )
            for name, path in zip(self.recipe.fit.estimators, paths, strict=True):
                for k, ridge in enumerate(self.recipe.fit.ridges):
                    unit = path.directions[k]
                    rows = unit[:, np.newaxis].astype(np.float32)
                    projected = project(activations, rows, path.offset)[:, :, 0]
                    scales = calibration_scales(projected, confidence)[1]
                    label = f"{name}@{ridge:g}"
                    found |= {f"{label}/unit": unit, f"{label}/scales": scales}
                    summary.append(
                        {
                            "estimator": name,
                            "ridge": ridge,
                            "score": layer_scores(projected, confidence).tolist(),
                            "auroc": layer_auroc(projected, confidence).tolist(),
                            "harm_cosine": path.harm_cosine[k].tolist(),
                        }
                    )
                advance(1)
        save_arrays(self.folder / "directions.safetensors", found, {})
        counts = {kind: _counts(confidence, kinds, kind) for kind in KINDS}
        write_json(self.folder / "fit.json", {"samples": counts, "directions": summary})

    def _tune(self, key: str) -> None:
        log = RowLog(self.folder, "trials.jsonl", key)
        total = self.recipe.tune.trials + self.recipe.tune.finalists
        with self.progress.stage("tune", total) as advance:
            finder = Finder(
                self.model,
                self.judge,
                self._unsteered(),
                self._directions(),
                self.recipe,
                known=load_trials(list(log.rows.values())),
                record=lambda trial: log.append({"id": str(trial.number), **trial.to_row()}),
                advance=advance,
            )
            chosen = finder.search()
        log.finish(list(log.rows))
        rows = [trial.to_row() for trial in finder.trials]
        write_json(self.folder / "tune.json", {"chosen": chosen.number, "trials": rows})

    def _unsteered(self) -> Unsteered:
        ids = {p.id for p in self.prompts["tune"]}
        rows = [row for row in self.folder.read_rows("answers.jsonl") if row["id"] in ids]
        scores = {row["id"]: row["confidence"] for row in self.folder.read_rows("scores.jsonl")}
        return Unsteered(
            self.prompts["tune"],
            [Answer(row["tokens"], row["answer"], row["finished"], row["degenerate"]) for row in rows],
            [scores[row["id"]] for row in rows],
        )

    def _directions(self) -> dict[tuple[str, float], Directions]:
        arrays = load_arrays(self.folder / "directions.safetensors")
        found = {}
        for name in self.recipe.fit.estimators:
            for ridge in self.recipe.fit.ridges:
                label = f"{name}@{ridge:g}"
                found[name, ridge] = Directions(arrays[f"{label}/unit"], arrays[f"{label}/scales"])
        return found

    def _chosen(self) -> Row:
        tuned = read_json(self.folder / "tune.json")
        row: Row = next(r for r in tuned["trials"] if r["number"] == tuned["chosen"])
        return row

    def _write(self, _: str) -> None:
        row = self._chosen()
        (trial,) = load_trials([row])
        directions = self._directions()[trial.candidate.estimator, trial.candidate.ridge]
        vector = SteeringVector(
            trial.candidate.steering(directions),
            {
                "tool": f"rs-gguf {__version__}",
                "method": "Refusal Steering, arXiv 2512.16602",
                "effect": "remove",
                "model.name": self.model_path.stem,
                "model.sha256": self.model_hash,
                "estimator": trial.candidate.estimator,
                "ridge.relative": trial.candidate.ridge,
                "layers": list(row["layers"]),
                "strength": trial.candidate.strength,
                "calibration": "scale 1.0 is the strength chosen on the tune split",
                "measured": False,
            },
            self.model.architecture,
        )
        path = self.folder / "remove.gguf"
        with self.progress.stage("write", 1) as advance:
            control_vector.write(vector, path)
            if isinstance(self.model, LlamaModel):
                shown = proof.prove_vector(control_vector.read(path), self.model)
                result: dict[str, Any] = {
                    "effect_observed": shown.effect_observed,
                    "largest_relative_error": shown.largest_relative_error,
                    "kl_mean": shown.kl_mean,
                    "reasons": list(shown.reasons),
                }
                if not shown.effect_observed:
                    raise GateError(f"{path}: " + " ".join(shown.reasons))
            else:
                result = {
                    "effect_observed": None,
                    "largest_relative_error": None,
                    "kl_mean": None,
                    "reasons": ["fitted on a Hugging Face folder; run `rs-export check --model` on its GGUF"],
                }
            write_json(self.folder / "proof.json", result)
            advance(1)

    def _measure(self, key: str) -> None:
        """Before and after on the test split, then `metrics.json` and the figures in the file's metadata."""
        asked = self.prompts["test"]
        vector = control_vector.read(self.folder / "remove.gguf")
        steering = Steering(vector.directions)
        sides = {"baseline": NO_STEERING, "steered": steering}
        log = RowLog(self.folder, "measured.jsonl", key)
        speeds: dict[str, float] = {}
        with self.progress.stage("measure", 2 * len(asked)) as advance:
            for side, applied in sides.items():
                missing = [p for p in asked if f"{side}:{p.id}" not in log.rows]
                advance(len(asked) - len(missing))
                for start in range(0, len(missing), _SHARD):
                    part = missing[start : start + _SHARD]
                    answers, confidences, speed = answer_and_judge(
                        self.model,
                        self.judge,
                        part,
                        steering=applied,
                        max_tokens=self.recipe.answers.test_tokens,
                        system=self.recipe.prompts.system,
                        sampling=Sampling(temperature=self.recipe.answers.temperature, seed=self.recipe.seed),
                        advance=advance,
                    )
                    for prompt, found, confidence in zip(part, answers, confidences, strict=True):
                        log.append(
                            {
                                "id": f"{side}:{prompt.id}",
                                "answer": found.text,
                                "tokens": found.tokens,
                                "degenerate": found.degenerate,
                                "confidence": confidence,
                                "tokens_per_second": round(speed, 1),
                            }
                        )
        for side in sides:
            speeds[side] = float(np.median([log.rows[f"{side}:{p.id}"]["tokens_per_second"] for p in asked]))
        rows = [_paired(p, log.rows[f"baseline:{p.id}"], log.rows[f"steered:{p.id}"]) for p in asked]
        benign = [
            (tokens, log.rows[f"baseline:{p.id}"]["tokens"])
            for p, tokens in zip(
                asked, chat_tokens(self.model, asked, self.recipe.prompts.system), strict=True
            )
            if p.kind == "benign" and (log.rows[f"baseline:{p.id}"]["confidence"] or 0) <= 0
        ]
        moved, agreement = drift(self.model, benign[:_DRIFT_PAIRS], steering)
        self.folder.write_rows("evaluation.jsonl", rows)
        sets = metrics.summarise_kinds(rows)
        reasons = metrics.gate(sets, moved, self.recipe)
        path = self.folder / "remove.gguf"
        _record_figures(path, vector, sets, moved, passed=not reasons)
        row = self._chosen()
        facts = {name: row[name] for name in ("estimator", "ridge", "layers", "strength")}
        value = metrics.build(
            recipe=self.recipe,
            model=self.model,
            model_sha256=self.model_hash,
            judge=self.judge.name,
            vector={"file": path.name, "sha256": sha256(path), **facts, "scale": 1.0},
            sets=sets,
            reasons=reasons,
            benign_drift=moved,
            top1_agreement=agreement,
            proof=read_json(self.folder / "proof.json"),
            tokens_per_second=speeds,
            subset=len(asked) < self._test_pool,
            file=path,
        )
        write_json(self.folder / "metrics.json", value)
        log.finish(list(log.rows))

    def _report(self, _: str) -> None:
        # The times of all stages are known only now.
        write_json(self.folder / "metrics.json", {**self.metrics(), "seconds": self.folder.seconds()})
        with self.progress.stage("report", 2) as advance:
            write_report(self.folder.path)
            advance(1)
            write_card(self.folder.path)
            advance(1)


def _record_figures(
    path: Path, vector: SteeringVector, sets: dict[str, dict[str, Any]], moved: float, *, passed: bool
) -> None:
    """Put what was measured into the file's own metadata, so that it travels with it."""
    figures: dict[str, Any] = {"measured": True, "gate.passed": passed, "metrics.benign_drift": moved}
    for kind, found in sets.items():
        figures[f"metrics.{kind}"] = [found["refusal_baseline"], found["refusal_steered"]]
    control_vector.write(
        SteeringVector(vector.directions, {**vector.provenance, **figures}, vector.architecture), path
    )


def _check_classes(confidence: np.ndarray[Any, Any], kinds: Sequence[str]) -> None:
    for kind, side in (("sensitive", "refused"), ("benign", "answered"), ("harmful", "refused")):
        counts = _counts(confidence, kinds, kind)
        if counts[side] == 0:
            raise InputError(
                f"fit: none of the {sum(counts.values())} {kind} prompts was {side}: no class to fit on. "
                f"Use more or other {kind} prompts (prompts.fit, prompts.{kind}) or another model."
            )


def _counts(confidence: np.ndarray[Any, Any], kinds: Sequence[str], kind: str) -> dict[str, int]:
    values = confidence[np.array([k == kind for k in kinds])]
    return {
        "refused": int((values > NEUTRAL).sum()),
        "answered": int((values < -NEUTRAL).sum()),
        "neutral": int((np.abs(values) <= NEUTRAL).sum()),
    }


def _graded(judgement: Judgement) -> Row:
    confidence = None if judgement.confidence is None else round(judgement.confidence, 6)
    return {"confidence": confidence, "verdict": judgement.verdict, "mode": judgement.mode}


def _paired(prompt: Prompt, before: Row, after: Row) -> Row:
    row: Row = dict(prompts.to_row(prompt))
    for side, found in (("baseline", before), ("steered", after)):
        for name in ("answer", "confidence", "degenerate"):
            row[f"{name}_{side}"] = found[name]
    return row
