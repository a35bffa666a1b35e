"""Measure the files of a published folder or of a run folder again.

A folder with `recipe.toml`, `metrics.json` and the GGUF files named there goes in, and perhaps a sealed set.
On the validation split, new `metrics.json`, `test_answers.jsonl`, `report.html` and `card.md` come out; on a
sealed set `sealed.json`, `sealed_answers.jsonl`, `sealed_outcomes.jsonl` and a row of the set's ledger.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rs_gguf.errors import InputError
from rs_gguf.methods import METHODS
from rs_gguf.pipeline import recipe as recipes
from rs_gguf.pipeline.folder import RunFolder, moved_file
from rs_gguf.pipeline.reproduce import refuse_private
from rs_gguf.pipeline.run import open_run
from rs_gguf.pipeline.stage import Progress, Run
from rs_gguf.pipeline.stages.file_record import WrittenFile
from rs_gguf.pipeline.stages.measure import Measured, answers_key, measure_files
from rs_gguf.pipeline.stages.write import effect_of
from rs_gguf.prompts import sealed as sealed_sets
from rs_gguf.records.conversation import Prompt
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import FileRecord, RunRecord
from rs_gguf.records.rows import Row, RowLog, write_rows
from rs_gguf.records.sealed import NAME as SEALED
from rs_gguf.records.sealed import SealedRecord, SealedSet
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.report.page import write_card, write_report
from rs_gguf.steering import file as steering_file
from rs_gguf.version import __version__

_LEAST_TOKENS = 100  # of an answer: reported figures use no shorter ones
# A reason of the acceptance criteria, in records without `feasible`: no candidate was within all limits.
_INFEASIBLE = ("no candidate met every limit", "no configuration held every limit")


def remeasure(
    path: Path,
    *,
    sealed: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[RunRecord, Path]:
    """Measure the files in the folder `path` and return the record, and the file that holds it.

    A killed call goes on where it stopped. The recipe's judge grades; answers have the recipe's
    `test_tokens`, and 100 at least.

    overrides: changes of the recipe, such as `engine.gpu_layers=20`.
    sealed: the sealed set to open, in place of the validation split. The files stay unchanged.

    Raises:
        InputError: the folder lacks a file or has another one, or the model is another one. Or the sealed
            set cannot be opened: it breaks a rule of `prompts.sealed`, or was opened for other files.
        VerificationError: the effect of a file that was changed was not observed on the model.
    """
    old = RunRecord.read(path / "metrics.json")
    folder = RunFolder(path)
    refuse_private(path, overrides)
    recipe = recipes.load(folder / "recipe.toml", overrides)
    if recipe.answers.test_tokens < _LEAST_TOKENS:
        recipe = recipes.load(folder / "recipe.toml", [*overrides, f"answers.test_tokens={_LEAST_TOKENS}"])
    moved = {
        str(kind): [moved_file(path, file) for file in files] for kind, files in recipe.prompts.files.items()
    }
    recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update=moved)})
    files = {name: _written(folder, name, file) for name, file in old.files.items()}
    with folder.locked(), open_run(recipe, folder, progress) as run:
        if run.model_hash != old.model.sha256:
            raise InputError(
                f"the files in {path} are for the model with SHA-256 {old.model.sha256}; {recipe.model} has "
                f"{run.model_hash}. Name that model in recipe.toml."
            )
        for name, file in files.items():
            if sha256(file.path) != old.files[name].sha256:
                files[name] = replace(file, effect=effect_of(file.path, run.model))
        if sealed is None:
            return _on_validation(run, old, files)
        return _on_sealed(run, old, files, sealed)


def _on_validation(run: Run, old: RunRecord, files: Mapping[str, WrittenFile]) -> tuple[RunRecord, Path]:
    folder, prompts = run.folder, run.prompts["validation"]
    log = RowLog(folder / "remeasured.jsonl", answers_key(run, prompts, files))
    measured = measure_files(run, prompts, files, log)
    record = _record(run, old, measured, subset=len(prompts) < sum(map(len, run.pool["validation"].values())))
    write_rows(folder / "test_answers.jsonl", measured.rows)
    record.write(folder / "metrics.json")
    write_report(folder.path)
    write_card(folder.path)
    log.delete()
    return record, folder / "metrics.json"


def _on_sealed(
    run: Run, old: RunRecord, files: Mapping[str, WrittenFile], path: Path
) -> tuple[RunRecord, Path]:
    folder, sealed = run.folder, sealed_sets.load(path)
    others = [p for kinds in run.pool.values() for rows in kinds.values() for p in rows]
    if reasons := sealed_sets.check(sealed, others):
        raise InputError(f"{path} cannot be opened as a sealed set: " + "; ".join(reasons) + ".")
    hashes = {file.path.name: sha256(file.path) for file in files.values()}
    opened = sealed_sets.open_for(path, hashes)
    log = RowLog(folder / "sealed_measured.jsonl", answers_key(run, sealed, files))
    measured = measure_files(run, sealed, files, log, into_files=False)
    record = _record(run, old, measured, subset=False)
    write_rows(folder / "sealed_answers.jsonl", measured.rows)
    write_rows(folder / "sealed_outcomes.jsonl", outcomes_of(sealed, measured.rows))
    facts = SealedSet(set=opened["set"], set_sha256=opened["set_sha256"], opened=opened["date"])
    on_sealed = SealedRecord(**{**dict(record), "seconds": None}, sealed=facts)
    on_sealed.write(folder / SEALED)
    if (folder / "test_answers.jsonl").is_file():  # a published folder has none; its pages come from the run
        write_report(folder.path)
        write_card(folder.path)
    verdicts = {file.file: file.acceptance.verdict for file in measured.files.values()}
    sealed_sets.record_verdicts(path, verdicts)
    log.delete()
    return on_sealed, folder / SEALED


def outcomes_of(prompts: Sequence[Prompt], rows: Sequence[Row]) -> list[Row]:
    """Return prompts with their outcomes, without answers and thinking traces: they may be published."""
    columns = ("outcome_", "unconfirmed_", "disputed_")
    return [
        {
            **prompt.to_row(),
            "split": "sealed",
            **{key: value for key, value in row.items() if key.startswith(columns)},
        }
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _written(folder: RunFolder, name: str, record: FileRecord) -> WrittenFile:
    """Return a file as the measure stage takes it, with the facts of its trial from the earlier record.

    Raises:
        InputError: the file is missing, or its metadata and the record disagree.
    """
    if name not in METHODS or Path(record.file).name != record.file:
        raise InputError(
            f"{folder.path}/metrics.json names {name}: {record.file!r}. Accepted: {', '.join(METHODS)}, "
            "and a file in the folder itself."
        )
    path = folder / record.file
    if not path.is_file():
        raise InputError(f"{path} is missing, which metrics.json names. Put it back.")
    facts = steering_file.read(path).provenance
    recorded = {"estimator": record.estimator, "layers": [*record.layers], "strength": record.strength}
    for fact, value in recorded.items():
        if facts.get(fact) != value:
            raise InputError(
                f"{path} is not the file that metrics.json describes: its metadata give {fact} "
                f"{facts.get(fact)}, and not {value}. Put that file back, or run again."
            )
    first, last = record.layers
    plain = Candidate(name, "", record.ridge, first, last, record.strength, record.benign_target)
    if record.estimator == plain.recorded:  # a label, where the method has no estimator
        candidate = plain
    else:
        candidate = Candidate(**{**asdict(plain), "estimator": record.estimator})
    feasible = record.feasible
    if feasible is None:  # a record of an earlier version
        feasible = not any(text in reason for reason in record.acceptance.reasons for text in _INFEASIBLE)
    nan = float("nan")  # of the search: measure() uses neither figure
    trial = Trial(0, candidate, "full", nan, nan, feasible=feasible)
    return WrittenFile(METHODS[name].word, path, trial, record.effect_check.model_dump())


def _record(run: Run, old: RunRecord, measured: Measured, *, subset: bool) -> RunRecord:
    """Return the record of a measurement; model, search and seconds stay."""
    return old.model_copy(
        update={
            "date": datetime.date.today().isoformat(),
            "tool": f"rs-gguf {__version__}",
            "judge": measured.judge,
            "test_tokens": run.recipe.answers.test_tokens,
            "subset": subset,
            "seed": run.recipe.seed,
            "files": measured.files,
            "baselines": tuple(measured.baselines),
        }
    )
