"""The answer and score stages: the unsteered answers to the fit and tune prompts, and their judgements.

Prompts, a model and a judge go in; the rows of `answers.jsonl` and `judgements.jsonl` come out. Later stages
read these files with functions of this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rs_gguf.engines.answers import answer, chat_tokens, has_trace
from rs_gguf.engines.engine import Can, Engine
from rs_gguf.engines.generation import TRACE_TOKENS
from rs_gguf.engines.server.llama_server import LlamaServer
from rs_gguf.errors import InputError
from rs_gguf.evaluation.known_answers import check_can_answer
from rs_gguf.evaluation.outcomes import Outcome, count_outcomes, outcome_of
from rs_gguf.judges.registry import Judge, shipped_version
from rs_gguf.methods import baselines
from rs_gguf.pipeline.costs import ROW, ROW_TOKEN, Cost, Costs, mean_length
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import KINDS, SPLITS, Answer, Generation, Judgement, Prompt, Split
from rs_gguf.records.files import sha256
from rs_gguf.records.metrics import Outcomes
from rs_gguf.records.rows import Row
from rs_gguf.search.unsteered import UnsteeredAnswers
from rs_gguf.version import __version__

_SPLITS: tuple[Split, ...] = ("fit", "tune")  # whose prompts the unsteered model answers before the fit
_BEGINNING = 16  # tokens of an answer; a thinking trace, if any, begins within them


class Answers(Stage):
    """The stage that lets the unsteered model answer the fit and tune prompts."""

    info = STAGES["answer"]
    replaces_at_end = True  # answers take hours: a user can return from a wrong recipe without loss

    def inputs(self, run: Run) -> list[Any]:
        recipe = run.recipe
        return [
            __version__, run.model_hash, recipe.seed, recipe.answers.fit_tokens, recipe.answers.tokens,
            recipe.answers.temperature, recipe.prompts.system,
            [p.id for split in _SPLITS for p in run.prompts[split]],
            # Nothing by default: older folders keep their keys.
            *recipe.engine.result_options.split(),
            *([] if recipe.answers.trace_tokens == TRACE_TOKENS else [recipe.answers.trace_tokens]),
        ]  # fmt: skip

    def work(self, run: Run, key: str) -> None:
        prompts = run.prompts["fit"] + run.prompts["tune"]
        log = run.folder.log("answers.jsonl", key)
        missing = [p for p in prompts if p.id not in log.rows]
        _check_lengths(run)
        if run.recipe.answers.check and not log.rows:
            check_can_answer(run.model)
        with run.progress.stage(self.info.name, len(prompts)) as advance:
            advance(len(prompts) - len(missing))
            for split in _SPLITS:
                asked = [p for p in missing if p.split == split]
                for i, one in answers(run.model, asked, run.recipe, run.recipe.answers.limit(split)):
                    log.append({**asked[i].to_row(), **one.to_row()})
                    advance(1)
        run.forget_from(self)
        log.finish([p.id for p in prompts])

    def cost(self, costs: Costs) -> Cost:
        answers = costs.recipe.answers
        limits = {split: answers.limit(split) for split in _SPLITS}
        tokens = sum(costs.count(split) * mean_length(limit) for split, limit in limits.items())
        seconds = sum(costs.answers(costs.count(split), limit) for split, limit in limits.items())
        n = costs.count(*_SPLITS)
        return Cost(
            0.0 if answers.servers else seconds,
            costs.memory(),
            n * ROW + tokens * ROW_TOKEN,
            n * costs.prompt,
            tokens,
        )


class Scores(Stage):
    """The stage that judges these answers."""

    info = STAGES["score"]
    replaces_at_end = True

    def inputs(self, run: Run) -> list[Any]:
        # The answers are an input: servers or other batches may give other answers with the same recipe.
        path = run.folder / "answers.jsonl"
        answers_hash = sha256(path) if path.is_file() else None
        return [run.recipe.judge, run.judge_hash, shipped_version(), answers_hash]

    def work(self, run: Run, key: str) -> None:
        rows = run.folder.read_rows("answers.jsonl")
        log = run.folder.log("judgements.jsonl", key)
        missing = [row for row in rows if row["id"] not in log.rows]
        judge = run.judge  # loaded before the progress bar starts, since its download has another bar
        with run.progress.stage(self.info.name, len(rows)) as advance:
            advance(len(rows) - len(missing))
            for row in scores(judge, missing):
                log.append(row)
                advance(1)
        run.forget_from(self)
        log.finish([row["id"] for row in rows])

    def cost(self, costs: Costs) -> Cost:
        limits = {split: costs.recipe.answers.limit(split) for split in _SPLITS}
        seconds = sum(costs.judgements(costs.count(split), limit) for split, limit in limits.items())
        tokens = sum(costs.count(split) * costs.pair(limit) for split, limit in limits.items())
        return Cost(seconds, costs.memory(), costs.count(*_SPLITS) * ROW / 4, tokens)


def _check_lengths(run: Run) -> None:
    """Raise `InputError` if a prompt is too long for any stage; the last stages come hours later."""
    recipe, model = run.recipe, run.model
    full = recipe.answers.test_tokens
    limits = {split: recipe.answers.limit(split) for split in SPLITS}
    if recipe.tune.full_prompts:
        limits["tune"] = max(limits["tune"], full)
    system, chat = recipe.prompts.system, ChatFormat.of(model)
    for split, max_tokens in limits.items():
        model.check_lengths(chat_tokens(model, run.prompts[split], system), max_tokens)
    if "system-prompt" in recipe.measure.baselines and chat.takes_system:
        wordings = baselines.system_prompts(run.prompts["fit"], recipe.effect, system, seed=recipe.seed)
        longest = max((wording.system or "" for wording in wordings), key=len)
        model.check_lengths(chat_tokens(model, run.prompts["validation"], longest), full)
        model.check_lengths(chat_tokens(model, run.prompts["tune"], longest), recipe.answers.tokens)
    if run.gate_only:
        model.check_lengths([c.tokens(chat, model, p.prompt, system) for p, c in run.in_contexts])


def answers(
    model: Engine, prompts: Sequence[Prompt], recipe: Recipe, max_tokens: int
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) of the unsteered model as answers are ready, from here or the recipe's servers.

    Raises:
        InputError: no server can be used, or a server has another model or an active adapter. Or the model
            thinks before it answers, and servers do not return the tokens of the trace.
    """
    options, system = recipe.answers, recipe.prompts.system
    if options.servers is None:
        conversations = chat_tokens(model, prompts, system)
        yield from answer(
            model, conversations, max_tokens=max_tokens, trace_tokens=options.trace_tokens,
            sampling=recipe.sampling,
        )  # fmt: skip
        return
    # The beginning of an answer shows whether it has a trace, which the template or the model itself opens.
    for _, beginning in answer(model, chat_tokens(model, prompts[:1], system), max_tokens=_BEGINNING):
        if has_trace(model, beginning):
            raise InputError(
                "answers.servers: the model thinks before it answers, but servers do not return the tokens "
                "of the trace. Only models without a trace are accepted. Let the model answer on this "
                "machine (answers.servers=none)."
            )
    servers = LlamaServer(options.servers, [])
    servers.expect_unsteered()
    if Can.LLAMA_CPP in model.can:  # only then do both report the same figures
        servers.expect_model({"n_vocab": model.n_vocab, "n_params": model.n_params})
    for i, text_only in servers.answer(prompts, 0.0, recipe.asking(max_tokens)):
        # Servers return text alone; capture, drift and the detection of short loops need tokens.
        tokens = model.tokenize(text_only.text, special=False)
        looped = bool(tokens) and is_degenerate(Generation(tokens, text_only.text, text_only.finished))
        yield i, replace(text_only, tokens=tokens, degenerate=text_only.degenerate or looped)


def scores(judge: Judge, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the judgement of each row of `answers.jsonl` when it is ready, in any order."""
    pairs = [(row["prompt"], Answer.from_row(row).to_judge) for row in rows]
    for i, judgement in judge.judge(pairs):
        yield {
            "id": rows[i]["id"],
            "confidence": None if judgement.confidence is None else round(judgement.confidence, 6),
            "verdict": judgement.verdict,
            "mode": judgement.mode,
            "category": judgement.category,
            "judge": judge.name,
        }


def judged(folder: RunFolder) -> dict[str, Row]:
    """Return the rows of `judgements.jsonl` by prompt id, without answers that fail or have no judgement.

    A failure has a high confidence without being a refusal: what fits directions must not take it for one.
    """
    answers = {row["id"]: Answer.from_row(row) for row in folder.read_rows("answers.jsonl")}
    return {
        row["id"]: row
        for row in folder.read_rows("judgements.jsonl")
        if row["confidence"] is not None
        and outcome_of(answers[row["id"]], Judgement.from_row(row)) != "fails"
    }


def counts(folder: RunFolder) -> dict[str, Outcomes]:
    """Return the outcomes of the fit and tune prompts by kind."""
    judgements = _judgements(folder)
    outcomes: dict[str, list[Outcome]] = {kind: [] for kind in KINDS}
    for row in folder.read_rows("answers.jsonl"):
        outcomes[row["kind"]].append(outcome_of(Answer.from_row(row), judgements[row["id"]]))
    return {kind: count_outcomes(of_kind) for kind, of_kind in outcomes.items()}


def unsteered(folder: RunFolder, prompts: Sequence[Prompt]) -> UnsteeredAnswers:
    """Return these prompts with their unsteered answers and judgements."""
    ids = {p.id for p in prompts}
    rows = [row for row in folder.read_rows("answers.jsonl") if row["id"] in ids]
    judgements = _judgements(folder)
    return UnsteeredAnswers(
        prompts, [Answer.from_row(row) for row in rows], [judgements[row["id"]] for row in rows]
    )


def _judgements(folder: RunFolder) -> dict[str, Judgement]:
    return {row["id"]: Judgement.from_row(row) for row in folder.read_rows("judgements.jsonl")}
