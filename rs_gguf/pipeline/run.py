"""The pipeline: prompts → answers → scores → activations → directions → strength → GGUF → before/after.

A recipe and a run folder go in; `remove.gguf` and `remove-adapter.gguf` (or `induce…`), `metrics.json`,
`report.html` and `card.md` come out. Each stage reads the files of the stages before it and, but for the
report, is skipped while its inputs are the same.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rs_gguf.activations.capture import capture_all, captured, conversations
from rs_gguf.activations.store import ActivationStore, DamagedStoreError
from rs_gguf.engines import engine_for, open_engine
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Can, Engine
from rs_gguf.errors import InputError
from rs_gguf.estimators import ESTIMATORS
from rs_gguf.estimators.device import resolve_device
from rs_gguf.judges.judge import try_out
from rs_gguf.judges.registry import Judge, kind_and_name, open_judge_spec, shipped_version
from rs_gguf.machine import ALONE, Processes
from rs_gguf.methods import METHODS, baselines
from rs_gguf.methods.samples import Samples
from rs_gguf.models import resolve as models
from rs_gguf.models import shape
from rs_gguf.pipeline.folder import RunFolder, key_of
from rs_gguf.pipeline.recipe import Recipe, dump
from rs_gguf.pipeline.stage import Progress, Silent
from rs_gguf.pipeline.stages import answers as answering
from rs_gguf.pipeline.stages import fit as fitting
from rs_gguf.pipeline.stages import tune as tuning
from rs_gguf.pipeline.stages import write as writing
from rs_gguf.pipeline.stages.measure import WrittenFile, measure
from rs_gguf.prompts import contexts
from rs_gguf.prompts import grid as prompts
from rs_gguf.prompts.contexts import Context
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.files import from_home, sha256
from rs_gguf.records.metrics import RunRecord
from rs_gguf.records.rows import read_json, write_json, write_rows
from rs_gguf.records.trials import Trial
from rs_gguf.report.page import write_card, write_report
from rs_gguf.search.rungs import Rungs
from rs_gguf.version import __version__

_SHARED = ("capture", "fit")  # that all processes do together


def run(
    recipe: Recipe, out: Path, *, fresh: bool = False, progress: Progress | None = None, until: str = "report"
) -> dict[str, Any]:
    """Run the stages up to `until` in the folder `out` and return the metrics (empty before `measure`).

    Resumes by itself: what an earlier call with the same recipe finished is not done again. Where the model,
    a prompt file or the judge cannot be had, the folder stays as it was.

    Several processes (torchrun) share the stages `capture` and `fit`. Rank 0 runs the others; the other ranks
    return nothing once the fit is done.

    Raises:
        InputError: something in the recipe, its files or the machine does not serve; the message says what.
        GateError: a written file's effect could not be observed on the model, or it was read back otherwise.
    """
    folder = RunFolder(out)
    with Processes.of_torchrun() as processes:
        if processes.rank > 0:
            with contextlib.closing(Pipeline(recipe, folder, Silent(), processes)) as pipeline:
                pipeline.follow()
            return {}
        return _run(recipe, folder, fresh, progress or Silent(), until, processes)


def _run(
    recipe: Recipe,
    folder: RunFolder,
    fresh: bool,
    progress: Progress,
    until: str,
    processes: Processes,
) -> dict[str, Any]:
    with folder.locked(), contextlib.closing(Pipeline(recipe, folder, progress, processes)) as pipeline:
        # What is mistyped or out of reach must cost nothing. The key needs the model and the prompts.
        key = pipeline._key("score")
        if until != "answer" and (fresh or not folder.is_done("score", key)):
            try_out(pipeline.judge)
        dump(recipe, folder / "recipe.toml")
        if fresh:
            folder.forget_all()
        stages = STAGES[: STAGES.index(until) + 1]
        together = stages[: STAGES.index(_SHARED[-1]) + 1]
        for stage in together:
            pipeline.do(stage)
        pipeline.release()
        for stage in stages[len(together) :]:
            pipeline.do(stage)
        return pipeline.metrics().mapping() if until in ("measure", "report") else {}


class Pipeline:
    """The stages of one run. Models are loaded when a stage first needs them."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, progress: Progress, processes: Processes = ALONE
    ) -> None:
        unknown = sorted(set(recipe.estimators) - ESTIMATORS.keys())
        if unknown:
            raise InputError(
                f"recipe: fit.estimators: no estimator {', '.join(unknown)}; "
                f"there are {', '.join(ESTIMATORS)}."
            )
        self.recipe, self.folder, self.progress, self.processes = recipe, folder, progress, processes
        self._open = contextlib.ExitStack()
        if "ablation" in recipe.measure.baselines and (
            recipe.effect == "induce" or Can.LORA not in engine_for(self.model_path).can
        ):
            raise InputError(baselines.NO_ABLATION)

    def close(self) -> None:
        self._open.close()

    def do(self, stage: str) -> None:
        """Run one stage unless it is done with the same inputs.

        The report is always written again: it takes seconds, and shows what others put into the folder too.
        """
        key = self._key(stage)
        if stage != "report" and self.folder.is_done(stage, key):
            self.progress.skipped(stage)
            return
        # What it and later stages left may be of another recipe: it counts no more once it is replaced. Hours
        # of answers and judgements are replaced at the end, so that a wrong recipe can be taken back before.
        if stage not in ("answer", "score"):
            self.folder.forget(*STAGES[STAGES.index(stage) :])
        start = time.monotonic()
        if stage in _SHARED:
            self.processes.from_first((stage, key))
        getattr(self, f"_{stage}")(key)
        self.folder.mark_done(stage, key, time.monotonic() - start)

    def follow(self) -> None:
        """Do this rank's part of the stages that rank 0 begins, until it releases the others.

        Where rank 0 fails it ends without a word, and torchrun ends the others.
        """
        while (work := self.processes.from_first(None)) is not None:
            stage, key = work
            getattr(self, f"_{stage}")(key)

    def release(self) -> None:
        """Let the other ranks go."""
        self.processes.from_first(None)

    def metrics(self) -> RunRecord:
        return RunRecord.read(self.folder / "metrics.json")

    def _key(self, stage: str) -> str:
        """Hash of all that matters up to this stage: recipe sections, prompts, model, judge, version."""
        recipe = self.recipe
        # Of later stages nothing is read: a file that is no model is told of when it is loaded.
        parts: dict[str, Callable[[], list[Any]]] = {
            "answer": lambda: [
                __version__, self.model_hash, recipe.seed, recipe.answers.tokens, recipe.answers.temperature,
                recipe.prompts.system, [p.id for p in self.prompts["fit"] + self.prompts["tune"]],
            ],
            "score": lambda: [recipe.judge, self.judge_hash, shipped_version(), self._answered()],
            "capture": lambda: [[p.id for p in self.unanswered], [asdict(c) for c in contexts.shipped()]],
            "fit": lambda: [
                # Subjects, topics and forms count: a gate weighs by them, and a search samples by them.
                recipe.effect, {**recipe.fit.model_dump(), "device": resolve_device(recipe.fit.device).type},
                [p.to_row() for p in self.prompts["fit"] + self.unanswered + self.prompts["tune"]],
            ],
            "tune": lambda: [recipe.tune.model_dump(), recipe.tune.full and recipe.answers.test_tokens],
            "write": list,
            "measure": lambda: [
                recipe.answers.test_tokens, recipe.measure.model_dump(),
                [p.to_row() for p in self.prompts["test"]],
            ],
            "report": list,
        }  # fmt: skip
        return key_of([(name, parts[name]()) for name in STAGES[: STAGES.index(stage) + 1]])

    def _answered(self) -> str | None:
        """SHA-256 of the answers: the same recipe may get others, from servers or in other batches."""
        path = self.folder / "answers.jsonl"
        return sha256(path) if path.is_file() else None

    # ---- what the stages work on -----------------------------------------------------------------

    @cached_property
    def _pool(self) -> dict[str, dict[str, list[Prompt]]]:
        return prompts.pool(self.recipe.prompts.files)

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """Prompts by split, each kind cut to the recipe's size."""
        return {
            split: [
                prompt
                for rows in kinds.values()
                for prompt in prompts.stratified(
                    rows, getattr(self.recipe.prompts, split), seed=self.recipe.seed
                )
            ]
            for split, kinds in self._pool.items()
        }

    @cached_property
    def unanswered(self) -> list[Prompt]:
        """More prompts to fit on, which are not answered: for gates, if the model can have any.

        They are read `in_contexts`.
        """
        can = engine_for(self.model_path).can
        if Can.WRITERS not in can or not shape.of_gguf(self.model_path).writers:
            return []
        answered = {p.id for p in self.prompts["fit"] + self.prompts["tune"]}
        size, seed = self.recipe.prompts.unanswered, self.recipe.seed
        others = ([p for p in rows if p.id not in answered] for rows in self._pool["fit"].values())
        return [prompt for rows in others for prompt in prompts.stratified(rows, size, seed=seed)]

    @cached_property
    def in_contexts(self) -> list[tuple[Prompt, Context]]:
        """The `unanswered` prompts in the order in which they are read, with what stands around each."""
        return contexts.spread(self.unanswered, ChatFormat.of(self.model), seed=self.recipe.seed)

    @cached_property
    def model_path(self) -> Path:
        return models.resolve(self.recipe.model, progress=self.progress.download)

    @cached_property
    def model_hash(self) -> str:
        return models.fingerprint(self.model_path)

    @cached_property
    def model(self) -> Engine:
        model = open_engine(self.model_path, n_parallel=self.recipe.answers.parallel)
        self._open.callback(model.close)
        return model

    @cached_property
    def judge_hash(self) -> str | None:
        """Of a judge that the recipe names by its file, in whose place another one may be put."""
        _, name = kind_and_name(self.recipe.judge or "")
        path = from_home(name)
        return models.fingerprint(path) if path.is_file() else None

    @cached_property
    def judge(self) -> Judge:
        opened = open_judge_spec(self.recipe.judge, loaded=self.model, progress=self.progress.download)
        return self._open.enter_context(opened)

    # ---- stages ----------------------------------------------------------------------------------

    def _answer(self, key: str) -> None:
        asked = self.prompts["fit"] + self.prompts["tune"]
        log = self.folder.log("answers.jsonl", key)
        missing = [p for p in asked if p.id not in log.rows]
        self._check_lengths()
        with self.progress.stage("answer", len(asked)) as advance:
            advance(len(asked) - len(missing))
            for i, found in answering.answers(self.model, missing, self.recipe):
                log.append({**missing[i].to_row(), **found.to_row()})
                advance(1)
        self.folder.forget(*STAGES)
        log.finish([p.id for p in asked])

    def _check_lengths(self) -> None:
        """Raise `InputError` for a prompt that some stage could not read: the last ones come hours later."""
        tokens, full = self.recipe.answers.tokens, self.recipe.answers.test_tokens
        most = {"fit": tokens, "tune": max(tokens, full) if self.recipe.tune.full else tokens, "test": full}
        system, chat = self.recipe.prompts.system, ChatFormat.of(self.model)
        for split, max_tokens in most.items():
            self.model.check_lengths(chat_tokens(self.model, self.prompts[split], system), max_tokens)
        if "system-prompt" in self.recipe.measure.baselines and chat.takes_system:
            longer = baselines.system_prompt(
                self.prompts["fit"], self.recipe.effect, system, seed=self.recipe.seed
            ).system
            self.model.check_lengths(chat_tokens(self.model, self.prompts["test"], longer), full)
        if self.unanswered:
            self.model.check_lengths(
                [c.tokens(chat, self.model, p.prompt, system) for p, c in self.in_contexts]
            )

    def _score(self, key: str) -> None:
        rows = self.folder.read_rows("answers.jsonl")
        log = self.folder.log("scores.jsonl", key)
        missing = [row for row in rows if row["id"] not in log.rows]
        judge = self.judge  # before the stage is drawn: its download has a bar of its own
        with self.progress.stage("score", len(rows)) as advance:
            advance(len(rows) - len(missing))
            for row in answering.scores(judge, missing):
                log.append(row)
                advance(1)
        self.folder.forget(*STAGES[STAGES.index("score") :])
        log.finish([row["id"] for row in rows])

    def _capture(self, key: str) -> None:
        """Block outputs and writers' inputs of the fit prompts, in the store."""
        asked, system = self.prompts["fit"], self.recipe.prompts.system
        answers = {row["id"]: row["tokens"] for row in self.folder.read_rows("answers.jsonl")}
        refused = {name for name, row in answering.judged(self.folder).items() if row["confidence"] > 0}
        with self.progress.stage("capture", len(asked) + len(self.unanswered)) as advance:
            read, prefix = conversations(self.model, asked, system, answers, refused, self.in_contexts)
            ids = [p.id for p in asked] + [p.id for p, _ in self.in_contexts]
            capture_all(
                self.model, ids, read, prefix, self._store(key), processes=self.processes, advance=advance
            )

    def _files(self, name: str) -> list[Path]:
        """Where the files of a method are written."""
        return [self.folder / f"{self.recipe.effect}{suffix}" for suffix in METHODS[name].suffixes]

    def _store(self, key: str) -> ActivationStore:
        return ActivationStore(self.folder / "activations", key)

    def _fit(self, _: str) -> None:
        options, n_layer = self.recipe.fit_options, self.model.n_layer
        suited = [method for method in METHODS.values() if method.suits(self.model)]
        total = sum(method.steps(options, n_layer) for method in suited)
        with self.progress.stage("fit", total) as advance:
            fitting.fit(
                self.samples(),
                options,
                self.folder.path,
                processes=self.processes,
                advance=advance,
            )

    def samples(self) -> Samples:
        """The fit prompts with what was captured of them, those first whose answers could be judged.

        Raises:
            InputError: no answer could be judged.
            DamagedStoreError: what was captured was changed, or belongs to another recipe or version.
        """
        asked, scores = [(p, "") for p in self.prompts["fit"]], answering.judged(self.folder)
        asked += [(p, context.name) for p, context in self.in_contexts]
        known = np.array([p.id in scores for p, _ in asked])
        judged, others = np.flatnonzero(known), np.flatnonzero(~known)
        if not judged.size:
            raise InputError(
                f"fit: none of the {len(self.prompts['fit'])} answers could be judged; scores.jsonl says "
                "why. Answers that end within a thinking trace need more room: raise answers.tokens."
            )
        try:
            activations, inputs = captured(
                self._store(self._key("capture")), len(asked), inputs=Can.WRITERS in self.model.can
            )
        except DamagedStoreError:
            # Not that of another recipe or version: what is there is whole for it.
            if self.folder.is_done("capture", self._key("capture")):
                self.folder.forget("capture")
            raise
        return Samples(
            [asked[i][0] for i in judged],
            activations.take(judged),
            np.array([scores[asked[i][0].id]["confidence"] for i in judged]),
            {name: rows.of(np.concatenate([judged, others])) for name, rows in inputs.items()},
            self.folder.path,
            [asked[i][0] for i in others],
            [scores[asked[i][0].id]["category"] for i in judged],
            [asked[i][1] for i in others],
        )

    def _tune(self, _: str) -> None:
        tuning.tune(self.rungs(), self.recipe, self.folder, self.progress, fit_key=self._key("fit"))

    def rungs(self) -> Rungs:
        """What measures candidates of this run, once it is fitted."""
        fitted = fitting.load(self.folder.path, self.recipe.fit_options)
        unsteered = answering.unsteered(self.folder, self.prompts["tune"])
        recipe = self.recipe
        return Rungs(
            self.model, self.judge, unsteered, fitted, self.folder.path,
            brief=recipe.asking(recipe.answers.tokens), full=recipe.asking(recipe.answers.test_tokens),
            n_full=recipe.tune.full, rule=recipe.safety, seed=recipe.seed,
        )  # fmt: skip

    def _write(self, _: str) -> None:
        """The files, each loaded again and its effect on the model observed."""
        chosen = tuning.chosen(self.folder)
        shown: dict[str, Any] = {}
        with self.progress.stage("write", len(chosen)) as advance:
            for name, trial in chosen.items():
                self._write_file(name, trial)
                shown[name] = writing.proven(self._files(name), self.model)
                advance(1)
        write_json(self.folder / "proof.json", shown)

    def _write_file(self, name: str, trial: Trial) -> None:
        facts = {
            "effect": self.recipe.effect,
            "model.name": models.name_of(self.recipe.model, self.model_path),
            "model.sha256": self.model_hash,
        }
        writing.write(self._files(name), trial, self.recipe, self.folder.path, self.model.architecture, facts)

    def _measure(self, key: str) -> None:
        """Before and after on the test split, then `metrics.json` and the figures in the files' metadata."""
        asked = self.prompts["test"]
        shown = read_json(self.folder / "proof.json")
        chosen = tuning.chosen(self.folder)
        for name, trial in chosen.items():
            if not all(path.is_file() for path in self._files(name)):  # somebody took one away
                self._write_file(name, trial)
        files = {name: WrittenFile(self._files(name), trial, shown[name]) for name, trial in chosen.items()}
        recipe = self.recipe
        others = baselines.build(
            recipe.measure.baselines, self.prompts["fit"], self.samples, self.model, self.folder.path,
            effect=recipe.effect, system=recipe.prompts.system, seed=recipe.seed,
        )  # fmt: skip
        # A search that was run again may have chosen otherwise: those rows tell nothing of these files.
        key = key_of(key, {name: asdict(trial.candidate) for name, trial in chosen.items()})
        log, judge = self.folder.log("measured.jsonl", key), self.judge
        with self.progress.stage("measure", (1 + len(others) + len(files)) * len(asked)) as advance:
            rows, record = measure(
                self.model, judge, asked, files, others, self.recipe, log,
                model_sha256=self.model_hash, advance=advance,
                subset=len(asked) < sum(map(len, self._pool["test"].values())),
            )  # fmt: skip
        write_rows(self.folder / "evaluation.jsonl", rows)
        tuned = read_json(self.folder / "tune.json")
        found = {**record.mapping(), "rank_correlation": tuned["rank_correlation"]}
        RunRecord.model_validate(found).write(self.folder / "metrics.json")
        log.finish(list(log.rows))

    def _report(self, _: str) -> None:
        for path in itertools.chain.from_iterable(map(self._files, tuning.chosen(self.folder))):
            if not path.is_file():
                raise InputError(
                    f"{path}, which this run wrote, is gone. Put it back, or run again with --fresh."
                )
        # The times of all stages before are known only now.
        record = self.metrics().model_copy(update={"seconds": self.folder.seconds()})
        record.write(self.folder / "metrics.json")
        with self.progress.stage("report", 2) as advance:
            write_report(self.folder.path)
            advance(1)
            write_card(self.folder.path)
            advance(1)
