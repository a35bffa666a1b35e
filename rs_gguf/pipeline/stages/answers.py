"""The answer and score stages: the unsteered answers to the fit and tune prompts, and their judgements.

`answers.jsonl` and `judgements.jsonl` come out, row by row as they are ready. What later stages need of these
files is read here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rs_gguf.engines.answers import answer, chat_tokens, has_trace
from rs_gguf.engines.engine import Can, Engine
from rs_gguf.engines.server.llama_server import LlamaServer
from rs_gguf.errors import InputError
from rs_gguf.judges.registry import Judge, shipped_version
from rs_gguf.methods import baselines
from rs_gguf.pipeline.costs import ROW, ROW_TOKEN, Cost, Costs, mean_length
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.prompts.degenerate import is_degenerate
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import KINDS, Answer, Generation, Judgement, Prompt
from rs_gguf.records.files import sha256
from rs_gguf.records.rows import Row
from rs_gguf.search.candidate_evaluation import UnsteeredAnswers
from rs_gguf.version import __version__

COUNTED = ("refused", "answered", "not judged")
_BEGINNING = 16  # tokens of an answer, in which a thinking trace begins if there is one


class Answers(Stage):
    """The unsteered answers to the fit and tune prompts."""

    info = STAGES["answer"]
    replaces_at_end = True  # hours of answers: a wrong recipe can be taken back before

    def inputs(self, run: Run) -> list[Any]:
        recipe = run.recipe
        return [
            __version__, run.model_hash, recipe.seed, recipe.answers.tokens, recipe.answers.temperature,
            recipe.prompts.system, [p.id for p in run.prompts["fit"] + run.prompts["tune"]],
        ]  # fmt: skip

    def work(self, run: Run, key: str) -> None:
        asked = run.prompts["fit"] + run.prompts["tune"]
        log = run.folder.log("answers.jsonl", key)
        missing = [p for p in asked if p.id not in log.rows]
        _check_lengths(run)
        with run.progress.stage(self.info.name, len(asked)) as advance:
            advance(len(asked) - len(missing))
            for i, found in answers(run.model, missing, run.recipe):
                log.append({**missing[i].to_row(), **found.to_row()})
                advance(1)
        run.forget_from(self)
        log.finish([p.id for p in asked])

    def cost(self, costs: Costs) -> Cost:
        n, answers = costs.count("fit", "tune"), costs.recipe.answers
        return Cost(
            0.0 if answers.servers else costs.answers(n, answers.tokens),
            costs.memory(),
            n * (ROW + mean_length(answers.tokens) * ROW_TOKEN),
            n * costs.prompt,
            n * mean_length(answers.tokens),
        )


class Scores(Stage):
    """What the judge says of these answers."""

    info = STAGES["score"]
    replaces_at_end = True

    def inputs(self, run: Run) -> list[Any]:
        # The answers count: the same recipe may get others, from servers or in other batches.
        path = run.folder / "answers.jsonl"
        answered = sha256(path) if path.is_file() else None
        return [run.recipe.judge, run.judge_hash, shipped_version(), answered]

    def work(self, run: Run, key: str) -> None:
        rows = run.folder.read_rows("answers.jsonl")
        log = run.folder.log("judgements.jsonl", key)
        missing = [row for row in rows if row["id"] not in log.rows]
        judge = run.judge  # before the stage is drawn: its download has a bar of its own
        with run.progress.stage(self.info.name, len(rows)) as advance:
            advance(len(rows) - len(missing))
            for row in scores(judge, missing):
                log.append(row)
                advance(1)
        run.forget_from(self)
        log.finish([row["id"] for row in rows])

    def cost(self, costs: Costs) -> Cost:
        n, limit = costs.count("fit", "tune"), costs.recipe.answers.tokens
        return Cost(costs.judgements(n, limit), costs.memory(), n * ROW / 4, n * costs.pair(limit))


def _check_lengths(run: Run) -> None:
    """Raise `InputError` for a prompt that some stage could not read: the last ones come hours later."""
    recipe, model = run.recipe, run.model
    tokens, full = recipe.answers.tokens, recipe.answers.test_tokens
    most = {"fit": tokens, "tune": max(tokens, full) if recipe.tune.full_prompts else tokens, "test": full}
    system, chat = recipe.prompts.system, ChatFormat.of(model)
    for split, max_tokens in most.items():
        model.check_lengths(chat_tokens(model, run.prompts[split], system), max_tokens)
    if "system-prompt" in recipe.measure.baselines and chat.takes_system:
        longer = baselines.system_prompt(run.prompts["fit"], recipe.effect, system, seed=recipe.seed).system
        model.check_lengths(chat_tokens(model, run.prompts["test"], longer), full)
    if run.gate_only:
        model.check_lengths([c.tokens(chat, model, p.prompt, system) for p, c in run.in_contexts])


def answers(model: Engine, asked: Sequence[Prompt], recipe: Recipe) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) of the model by itself, here or on the recipe's servers, as they come.

    Raises:
        InputError: no server can be used, one has another model or an adapter in force, or the model thinks
            before it answers, which servers do not tell.
    """
    options, system = recipe.answers, recipe.prompts.system
    if options.servers is None:
        tokens = chat_tokens(model, asked, system)
        yield from answer(model, tokens, max_tokens=options.tokens, sampling=recipe.sampling)
        return
    # A trace shows in how an answer begins, whether the chat template opens it or the model itself does.
    for _, begun in answer(model, chat_tokens(model, asked[:1], system), max_tokens=_BEGINNING):
        if has_trace(model, begun):
            raise InputError(
                "answers.servers: the model thinks before it answers, and servers do not tell the tokens of "
                "its trace: the answer would be read as its beginning. Let the model answer here, without "
                "answers.servers."
            )
    servers = LlamaServer(options.servers, [])
    servers.expect_unsteered()
    if Can.LLAMA_CPP in model.can:  # of which llama-servers tell the same figures
        servers.expect_model({"n_vocab": model.n_vocab, "n_params": model.n_params})
    for i, found in servers.answer(asked, 0.0, recipe.asking(options.tokens)):
        # Servers tell the text alone; capture and drift go by tokens, and so do short loops.
        said = model.tokenize(found.text, special=False)
        looped = bool(said) and is_degenerate(Generation(said, found.text, found.finished))
        yield i, replace(found, tokens=said, degenerate=found.degenerate or looped)


def scores(judge: Judge, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the judgement of each row of `answers.jsonl` as it comes, in any order."""
    pairs = [(row["prompt"], Answer.from_row(row).to_judge) for row in rows]
    for i, found in judge.judge(pairs):
        yield {
            "id": rows[i]["id"],
            "confidence": None if found.confidence is None else round(found.confidence, 6),
            "verdict": found.verdict,
            "mode": found.mode,
            "category": found.category,
            "judge": judge.name,
        }


def judged(folder: RunFolder) -> dict[str, Row]:
    """What the judge said of answers, by the prompt's id; those that could not be judged are left out."""
    rows = folder.read_rows("judgements.jsonl")
    return {row["id"]: row for row in rows if row["confidence"] is not None}


def counts(folder: RunFolder) -> dict[str, dict[str, int]]:
    """By kind how many prompts of fit and tune are refused, answered and not judged."""
    said = judged(folder)
    found: dict[str, dict[str, int]] = {kind: dict.fromkeys(COUNTED, 0) for kind in KINDS}
    for row in folder.read_rows("answers.jsonl"):
        score = said.get(row["id"])
        verdict = "not judged" if score is None else "refused" if score["confidence"] > 0 else "answered"
        found[row["kind"]][verdict] += 1
    return found


def unsteered(folder: RunFolder, asked: Sequence[Prompt]) -> UnsteeredAnswers:
    """Return the prompts `asked` with their unsteered answers and judgements."""
    ids = {p.id for p in asked}
    rows = [row for row in folder.read_rows("answers.jsonl") if row["id"] in ids]
    judgements = {row["id"]: row for row in folder.read_rows("judgements.jsonl")}
    return UnsteeredAnswers(
        asked,
        [Answer.from_row(row) for row in rows],
        [
            Judgement(judgements[row["id"]]["confidence"], "recorded", judgements[row["id"]]["category"])
            for row in rows
        ],
    )
