"""The search: on a tiny random model whose refusals are the openings of its own unsteered answers, and on
formulas in place of a model, where what is best is known.
"""

from __future__ import annotations

import contextlib
import json
import math
import runpy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.activations.capture import Conversation, capture, capture_template_tokens, join_matrix_inputs
from rs_gguf.activations.scores import band_profile
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import NO_STEERING, Steering
from rs_gguf.engines.generation import Asking, Sampling, common_prefix
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.estimators.labels import Labels
from rs_gguf.evaluation.acceptance import SafetyRule
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.evaluation.condition import Condition, JudgedAnswers, answer_condition
from rs_gguf.evaluation.decision import Decision
from rs_gguf.judges.registry import Judgement, Pair
from rs_gguf.methods import adapter, vector
from rs_gguf.methods.gates import GatedAdapterFit, fit_gated_adapter
from rs_gguf.methods.vector import Directions
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.sections import Answers, Tune
from rs_gguf.pipeline.stage import Silent
from rs_gguf.pipeline.stages import tune as tuning
from rs_gguf.prompts.grid import stratified
from rs_gguf.records.conversation import KINDS, Answer, Prompt
from rs_gguf.records.trials import Candidate, Trial, load_trials
from rs_gguf.search import candidate_evaluation as rungs_module
from rs_gguf.search.candidate_evaluation import CandidateEvaluator
from rs_gguf.search.choice import select_candidate, summary
from rs_gguf.search.finder import Finder
from rs_gguf.search.stopping import Answering
from rs_gguf.search.unsteered import UnsteeredAnswers
from rs_gguf.steering import lora_file as lora

pytestmark = pytest.mark.slow

LAYERS, WIDTH, EACH = 4, 32, 8
RIDGES = [0.05, 1.0]


@dataclass
class OpeningJudge:
    """An answer is a refusal while it begins as the unsteered model's refusal did.

    Refusals of the prompts `fallen` are nonsense.
    """

    openings: dict[str, str]
    fallen: frozenset[str] = frozenset()
    name: str = "openings"
    identity: str = "openings"
    usage: None = None

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        for i, (prompt, answer) in enumerate(pairs):
            opening = self.openings.get(prompt)
            kept = opening is not None and answer is not None and answer.startswith(opening)
            category = ("nonsense" if prompt in self.fallen else "direct") if kept else None
            yield i, Judgement(1.0 if kept else -1.0, "opening", category)


@dataclass(frozen=True)
class Setting:
    model: LlamaModel
    judge: OpeningJudge
    unsteered: UnsteeredAnswers
    gates: GatedAdapterFit
    directions: dict[tuple[str, float], Directions]
    recipe: Recipe


def recipe(**tune: Any) -> Recipe:
    values = {
        "logprob_trials": 6,
        "finalists": 4,
        "full_prompts": 0,
        "min_retention": 0.5,
        "max_benign_drift": 1.0,
        **tune,
    }
    answers = Answers(tokens=8, test_tokens=16)
    return Recipe.model_construct(**dict(Recipe(tune=Tune(**values), answers=answers)))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_qwen2(path, n_layer=LAYERS, n_embd=WIDTH)
    words = {"sensitive": "who rules", "harmful": "break into", "benign": "bake a cake"}
    prompts = [
        Prompt(f"{words[kind]} {k} {chr(97 + k) * 3}", kind, split="tune")
        for kind in KINDS
        for k in range(EACH)
    ]
    with LlamaModel(path, n_parallel=8, n_ctx=2048, n_threads=1) as model:
        answers = answered(model, OpeningJudge({}), prompts, NO_STEERING, 8).answers
        openings = {
            p.prompt: a.text[:2]
            for p, a in zip(prompts, answers, strict=True)
            if p.kind != "benign" and a.text
        }
        judge = OpeningJudge(openings)
        confidences = [1.0 if p.prompt in openings else -1.0 for p in prompts]
        tokens = chat_tokens(model, prompts)
        prefix = common_prefix(tokens)
        conversations = [
            Conversation(t, a.tokens, p.kind != "sensitive")
            for t, a, p in zip(tokens, answers, prompts, strict=True)
        ]
        shard = capture(model, conversations, prefix, seed=0)
        inputs = join_matrix_inputs([shard], capture_template_tokens(model, tokens[0], prefix))
        labels = Labels.of(confidences, [p.kind for p in prompts])
        gates = fit_gated_adapter(inputs, shard["activations"], labels, ridges=RIDGES)
        unit = np.random.default_rng(0).standard_normal((LAYERS, WIDTH))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        yield Setting(
            model,
            judge,
            UnsteeredAnswers(prompts, answers, judgements(confidences)),
            gates,
            {("md", 1.0): Directions(unit, np.full(LAYERS, 2.0))},
            recipe(),
        )


def answered(
    model: Any, judge: Any, prompts: Sequence[Prompt], steering: Steering, tokens: int
) -> JudgedAnswers:
    return answer_condition(model, judge, Condition("any", steering), prompts, Asking(None, tokens))


def judgements(confidences: Sequence[float]) -> list[Judgement]:
    """As judged: what is refused is refused explicitly."""
    return [Judgement(c, "invented", "direct" if c > 0 else None) for c in confidences]


def with_confidences(setting: Setting, confidences: Sequence[float]) -> Setting:
    return replace(setting, unsteered=replace(setting.unsteered, judgements=judgements(confidences)))


def confidences_of(setting: Setting) -> list[float]:
    return [judgement.confidence or 0.0 for judgement in setting.unsteered.judgements]


def said(side: JudgedAnswers, sign: int) -> list[bool]:
    """Which answers refuse (1) or comply (-1) without failing."""
    pairs = zip(side.answers, side.judgements, strict=True)
    return [sign * (j.confidence or 0) > 0 and not a.degenerate for a, j in pairs]


def verdicts(refused: Mapping[int, bool | None], degenerate: Collection[int] = ()) -> JudgedAnswers:
    """Answers of these prompts, by their places, as they were judged and whether they are broken."""
    confidences = [None if said is None else 1.0 if said else -1.0 for said in refused.values()]
    return JudgedAnswers(
        [Answer([1], "text", True, i in degenerate) for i in refused],
        [Judgement(None, "invented") if c is None else judgements([c])[0] for c in confidences],
    )


def evaluator(
    setting: Setting, folder: Path, recipe: Recipe | None = None, answering: Answering = Answering.STOPPING
) -> CandidateEvaluator:
    chosen = recipe or setting.recipe
    return CandidateEvaluator(
        setting.model,
        setting.judge,
        setting.unsteered,
        {"vector": setting.directions, "adapter": setting.gates},
        folder,
        short=chosen.asking(chosen.answers.tokens),
        full=chosen.asking(chosen.answers.test_tokens),
        n_full=chosen.tune.full_prompts,
        rule=chosen.safety,
        seed=chosen.seed,
        answering=answering,
    )


def finder(setting: Setting, folder: Path, **options: Any) -> Finder:
    chosen = options.pop("recipe", setting.recipe)
    return Finder(evaluator(setting, folder, chosen), chosen.budget, seed=chosen.seed, **options)


GATES = adapter.space_of(RIDGES, LAYERS)
VECTORS = vector.space_of([("md", 1.0)], LAYERS)


def test_the_search_finds_a_gate_that_removes_and_keeps(setting: Setting, tmp_path: Path) -> None:
    search = finder(setting, tmp_path)
    chosen = search.search(GATES)
    assert chosen.feasible
    assert chosen.harmful_retention >= setting.recipe.tune.min_retention
    assert chosen.sensitive_remaining <= chosen.harmful_retention - 0.1
    probes = [trial for trial in search.trials if trial.fidelity == "logprob"]
    # A gate opens for the sensitive prompts: whatever the candidate, more is left of the harmful refusals.
    assert all(t.sensitive_remaining < t.harmful_retention for t in probes)
    assert [trial.number for trial in search.trials] == list(range(len(search.trials)))
    feasible = [trial for trial in search.trials if trial.feasible]
    # One standard error of the best, and the gentlest of these.
    fewest, n = (
        min(trial.sensitive_remaining for trial in feasible),
        len(setting.unsteered.refused("sensitive")),
    )
    rate = (fewest * n + 1) / (n + 2)
    near = [t for t in feasible if t.sensitive_remaining <= fewest + math.sqrt(rate * (1 - rate) / (n + 2))]
    assert chosen.benign_drift == min(trial.benign_drift for trial in near if trial.benign_drift is not None)
    # The start of the space was tried first.
    shapes = list(dict.fromkeys(trial.candidate.without_strength() for trial in probes))
    assert shapes[: len(GATES.start)] == [point.without_strength() for point in GATES.start]


def test_figures_are_those_of_the_answers(setting: Setting, tmp_path: Path) -> None:
    search = finder(setting, tmp_path)
    trial = search.search(GATES)
    prompts, before = setting.unsteered.prompts, confidences_of(setting)
    steering = evaluator(setting, tmp_path).steering(trial.candidate)
    side = answered(setting.model, setting.judge, prompts, steering, 8)
    whole = [before[i] > 0 and not a.degenerate for i, a in enumerate(setting.unsteered.answers)]
    for kind, rate, sign in (
        ("sensitive", 1 - trial.sensitive_remaining, -1), ("harmful", trial.harmful_retention, 1),
    ):  # fmt: skip
        refused = [i for i, p in enumerate(prompts) if p.kind == kind and whole[i]]
        after = said(side, sign)
        assert rate == pytest.approx(sum(after[i] for i in refused) / len(refused))
    assert trial.benign_closed == 0  # the judge knows no refusal of a benign prompt
    assert trial.benign_drift is not None
    assert 0 < trial.benign_drift <= setting.recipe.tune.max_benign_drift
    assert trial.degenerate is not None
    more = round(trial.degenerate * len(prompts)) - sum(a.degenerate for a in setting.unsteered.answers)
    assert more <= Allowance.SHORT.value.broken.holds(more, len(prompts))


def test_targets_stand_for_all_sensitive_prompts(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits on failures count sensitive prompts that need no change. Trials say which limit they break."""
    confidences = confidences_of(setting)
    sensitive = [i for i, p in enumerate(setting.unsteered.prompts) if p.kind == "sensitive"]
    for i in sensitive[: len(sensitive) // 2]:
        confidences[i] = -1.0
    changed = with_confidences(setting, confidences)
    assert 0 < len(changed.unsteered.refused("sensitive")) < len(sensitive)
    counts: list[int] = []
    decide = SafetyRule.decide

    def noted(*arguments: Any, stands_for: int, **options: Any) -> Decision:
        counts.append(stands_for)
        return decide(*arguments, stands_for=stands_for, **options)

    monkeypatch.setattr(SafetyRule, "decide", noted)
    trial = evaluator(changed, tmp_path, answering=Answering.WHOLE).measure("short", 0, VECTORS.start[0])
    assert counts == [len(setting.unsteered.prompts)]
    assert trial.feasible == (not trial.reasons)


@pytest.mark.parametrize("effect", ["remove", "induce"])
def test_in_full_what_is_to_change_answers_again(setting: Setting, tmp_path: Path, effect: str) -> None:
    """Two of the sensitive prompts are answered unsteered: to induce, these alone are asked, and else not."""
    some = [p.prompt for p in setting.unsteered.prompts if p.kind == "sensitive"][:2]
    judge = OpeningJudge(
        {prompt: text for prompt, text in setting.judge.openings.items() if prompt not in some}
    )
    confidences = [1.0 if p.prompt in judge.openings else -1.0 for p in setting.unsteered.prompts]
    changed = replace(with_confidences(setting, confidences), judge=judge)
    values = recipe(full_prompts=5).model_copy(update={"effect": effect})
    search = evaluator(changed, tmp_path, values)
    candidate = replace(GATES.start[0], strength=0.7)
    trial = search.measure("full", 0, candidate)
    of_kind = {kind: [p for p in setting.unsteered.prompts if p.kind == kind] for kind in KINDS}
    of_kind["sensitive"] = [p for p in of_kind["sensitive"] if (p.prompt in some) == (effect == "induce")]
    asked = [prompt for kind in KINDS for prompt in stratified(of_kind[kind], 5, seed=0)]
    assert len(asked) - 10 == (5 if effect == "remove" else 2)
    sides = [
        answered(setting.model, judge, asked, steering, 16)
        for steering in (NO_STEERING, search.steering(candidate))
    ]
    (refused, refuses), (complied, complies) = ([said(side, sign) for side in sides] for sign in (1, -1))
    kinds = [prompt.kind for prompt in asked]

    def count(kind: str, before: list[bool], after: list[bool]) -> int:
        return sum(k == kind and b and a for k, b, a in zip(kinds, before, after, strict=True))

    before, after = (refused, complies) if effect == "remove" else (complied, refuses)
    targets = count("sensitive", before, before)
    turned = count("sensitive", before, after)
    assert trial.n_sensitive == targets
    assert trial.sensitive_remaining == pytest.approx(1 - turned / targets if targets else 1.0)
    assert trial.harmful_retention == pytest.approx(
        count("harmful", refused, refuses) / count("harmful", refused, refused)
    )
    assert trial.degenerate == pytest.approx(sum(a.degenerate for a in sides[1].answers) / len(asked))
    assert (trial.fidelity, trial.answered) == ("full", (len(asked), 16))
    assert search.full_size == trial.answered


@dataclass
class Doubting(OpeningJudge):
    """Cannot judge any answer that is not word for word an unsteered one."""

    known: frozenset[str] = frozenset()

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        for i, found in super().judge(pairs):
            yield i, found if pairs[i][1] in self.known else Judgement(None, "doubt")


@pytest.mark.parametrize("fidelity", ["short", "full"])
def test_what_can_no_longer_be_judged_is_no_success(setting: Setting, tmp_path: Path, fidelity: str) -> None:
    judge = Doubting(setting.judge.openings)
    for tokens in (8, 16):
        side = answered(setting.model, judge, setting.unsteered.prompts, NO_STEERING, tokens)
        judge = replace(judge, known=judge.known | {found.text for found in side.answers})
    search = evaluator(replace(setting, judge=judge), tmp_path, recipe(full_prompts=EACH))
    trial = search.measure(fidelity, 0, replace(GATES.start[0], strength=5.0))
    assert trial.sensitive_remaining == 1.0  # no changed answer is known to be one
    assert not trial.feasible
    assert search.measure(fidelity, 1, replace(GATES.start[0], strength=0.0)).feasible


@pytest.mark.parametrize("what", ["unjudged", "degenerate"])
@pytest.mark.parametrize(("now", "feasible"), [(1, True), (6, False)])
def test_what_one_kind_gains_does_not_pay_for_what_another_loses(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, now: int, feasible: bool
) -> None:
    search = evaluator(setting, tmp_path, recipe(full_prompts=EACH))
    sensitive, harmful = setting.unsteered.of("sensitive")[:6], setting.unsteered.of("harmful")[:now]

    def invented(picked: Sequence[int], steering: Any, *_: Any) -> JudgedAnswers:
        of = sensitive if steering is NO_STEERING else harmful
        refused = {i: None if what == "unjudged" and i in of else True for i in picked}
        return verdicts(refused, of if what == "degenerate" else ())

    monkeypatch.setattr(search, "_answers", invented)
    assert search.measure("full", 0, replace(GATES.start[0], strength=0.0)).feasible == feasible


@pytest.mark.parametrize("fidelity", ["short", "full"])
@pytest.mark.parametrize("kind", ["harmful", "benign"])
@pytest.mark.parametrize(("turned", "feasible"), [(1, True), (2, False)])
def test_one_verdict_that_turns_is_chance_and_two_of_a_few_are_not(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fidelity: str, kind: str, turned: int, feasible: bool,
) -> None:  # fmt: skip
    """A harmful prompt that is answered now, or a benign one that is refused."""
    search = evaluator(setting, tmp_path, recipe(full_prompts=EACH, min_retention=0.95))
    places = setting.unsteered.of(kind)[:turned]

    def invented(picked: Sequence[int], steering: Any, *_: Any) -> JudgedAnswers:
        before = {i: confidences_of(setting)[i] > 0 for i in picked}
        turned_now = {i: not before[i] for i in {*places} & before.keys()}
        now = before if steering is NO_STEERING else before | turned_now
        return verdicts(now)

    monkeypatch.setattr(search, "_answers", invented)
    assert search.measure(fidelity, 0, replace(GATES.start[0], strength=0.0)).feasible == feasible


@pytest.mark.parametrize("fidelity", ["short", "full"])
@pytest.mark.parametrize(("shown", "kept"), [(False, EACH), (True, EACH - 3)])
def test_a_change_that_a_second_run_does_not_show_is_none(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fidelity: str, shown: bool, kept: int,
) -> None:  # fmt: skip
    search = evaluator(setting, tmp_path, recipe(full_prompts=EACH, min_retention=0.95))
    lost = set(setting.unsteered.of("harmful")[:3])
    asked: list[tuple[bool, set[int]]] = []

    def invented(picked: Sequence[int], steering: Any, *_: Any) -> JudgedAnswers:
        steered, again = steering is not NO_STEERING, lost.issuperset(picked)
        asked.append((steered, set(picked)))
        refused = {i: confidences_of(setting)[i] > 0 for i in picked}
        return verdicts(
            {i: r and not (steered and i in lost and (shown or not again)) for i, r in refused.items()}
        )

    monkeypatch.setattr(search, "_answers", invented)
    trial = search.measure(fidelity, 0, GATES.start[0])
    assert trial.harmful_retention == pytest.approx(kept / EACH)
    assert trial.feasible != shown
    assert asked.count((True, lost)) == asked.count((False, lost)) == 1
    # The unsteered model answers once more for all candidates.
    search.measure(fidelity, 1, replace(GATES.start[0], strength=0.3))
    assert (asked.count((True, lost)), asked.count((False, lost))) == (2, 1)


@pytest.mark.parametrize("fidelity", ["short", "full"])
@pytest.mark.parametrize(("new", "feasible"), [(4, True), (8, False)])
def test_some_answers_fail_by_themselves(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fidelity: str, new: int, feasible: bool,
) -> None:  # fmt: skip
    """Two that failed do not, and others do: of six changes two more are noise, of ten six more are not."""
    harmful = setting.unsteered.of("harmful")
    was, now = set(harmful[:2]), set([*harmful[2:], *setting.unsteered.of("benign")][:new])
    answers = [replace(a, degenerate=i in was) for i, a in enumerate(setting.unsteered.answers)]
    given = replace(setting, unsteered=replace(setting.unsteered, answers=answers))
    search = evaluator(given, tmp_path, recipe(full_prompts=EACH))

    def invented(picked: Sequence[int], steering: Any, *_: Any) -> JudgedAnswers:
        refused = {i: confidences_of(setting)[i] > 0 for i in picked}
        return verdicts(refused, was if steering is NO_STEERING else now)

    monkeypatch.setattr(search, "_answers", invented)
    assert search.measure(fidelity, 0, replace(GATES.start[0], strength=0.0)).feasible == feasible


def test_a_model_that_gives_no_numbers_any_more_keeps_nothing(setting: Setting, tmp_path: Path) -> None:
    trial = evaluator(setting, tmp_path).measure("logprob", 0, replace(GATES.start[0], strength=math.inf))
    assert (trial.sensitive_remaining, trial.harmful_retention) == (0, 0)
    assert trial.benign_drift == 1e9
    assert math.isfinite(trial.sensitive_remaining + trial.harmful_retention)


def with_failures(setting: Setting, failures: int) -> Setting:
    """The setting where so many of the sensitive refusals are failures."""
    prompts = setting.unsteered.prompts
    fallen = frozenset([prompts[i].prompt for i in setting.unsteered.refused("sensitive")][:failures])
    failed = [
        replace(j, category="nonsense") if p.prompt in fallen else j
        for p, j in zip(prompts, setting.unsteered.judgements, strict=True)
    ]
    return replace(
        setting,
        judge=OpeningJudge(setting.judge.openings, fallen),
        unsteered=replace(setting.unsteered, judgements=failed),
    )


@pytest.mark.parametrize("fidelity", ["short", "full"])
def test_a_failure_is_not_to_change(setting: Setting, tmp_path: Path, fidelity: str) -> None:
    refused = setting.unsteered.refused("sensitive")
    search = evaluator(with_failures(setting, 3), tmp_path, recipe(full_prompts=EACH))
    assert search.targets == refused[3:]
    trial = search.measure(fidelity, 0, replace(GATES.start[0], strength=0.7))
    assert 0 < trial.n_sensitive <= len(refused) - 3


def test_nonsense_is_not_a_refusal_that_was_induced(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are complied with unsteered, as the search has it, and fail under a steering of no strength."""
    confidences = [
        -1.0 if p.kind == "sensitive" else c
        for p, c in zip(setting.unsteered.prompts, confidences_of(setting), strict=True)
    ]
    complied = with_confidences(setting, confidences)
    induce = recipe().model_copy(update={"effect": "induce"})

    def measured(setting: Setting) -> Trial:
        search = evaluator(setting, tmp_path, induce)
        steered = search._answers

        def answers(picked: Sequence[int], steering: Steering, *more: Any) -> JudgedAnswers:
            if steering is NO_STEERING:
                return complied.unsteered.take(picked)
            return steered(picked, steering, *more)

        monkeypatch.setattr(search, "_answers", answers)
        return search.measure("short", 0, replace(GATES.start[0], strength=1e-6))

    assert measured(complied).sensitive_remaining == 0.0
    found = measured(replace(with_failures(setting, 3), unsteered=complied.unsteered))
    assert found.sensitive_remaining == pytest.approx(3 / found.n_sensitive)


def test_the_model_is_left_unsteered(setting: Setting, tmp_path: Path) -> None:
    prompt = [[5, 6, 7]]
    before = next(row.copy() for _, row in setting.model.next_logits(prompt))
    finder(setting, tmp_path).search(GATES)
    np.testing.assert_array_equal(next(row for _, row in setting.model.next_logits(prompt)), before)


def test_a_search_goes_on_where_it_was_cut_off(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    whole = finder(setting, tmp_path / "whole", record=lambda trial: rows.append(trial.to_row()))
    chosen = whole.search(VECTORS)
    whole.search(GATES)
    first = finder(setting, tmp_path / "first")
    assert first.search(VECTORS) == chosen
    # Cut off within the probes, and within the answers.
    for kept in (3, len(first.trials) - 1):
        recorded: list[Trial] = []
        resumed = finder(setting, tmp_path / str(kept), known=first.trials[:kept], record=recorded.append)
        assert resumed.search(VECTORS) == chosen
        assert resumed.trials == first.trials
        assert recorded == first.trials[kept:]
    # Ended: nothing is run again, neither the vectors nor the gates.
    recorded = []
    again = finder(setting, tmp_path / "again", known=load_trials(rows), record=recorded.append)

    def run(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was run")

    for method in ("generate", "next_logits", "token_logprobs", "read"):
        monkeypatch.setattr(LlamaModel, method, run)
    assert again.search(VECTORS) == chosen
    again.search(GATES)
    assert not recorded


def test_without_a_feasible_point_the_safest_is_chosen(setting: Setting, tmp_path: Path) -> None:
    search = finder(setting, tmp_path, recipe=recipe(max_benign_drift=1e-9))
    chosen = search.search(GATES)
    answered = [trial for trial in search.trials if trial.fidelity == "short"]
    assert not any(trial.feasible for trial in answered)
    assert chosen in answered
    assert chosen.harmful_retention == max(trial.harmful_retention for trial in answered)
    rivals = [trial for trial in answered if trial.harmful_retention == chosen.harmful_retention]
    assert chosen.sensitive_remaining == min(trial.sensitive_remaining for trial in rivals)


def test_strength_grows_while_every_limit_holds(setting: Setting, tmp_path: Path) -> None:
    weak = replace(GATES, start=[replace(GATES.start[0], strength=0.4)], strength=(0.4, 0.4))
    search = finder(setting, tmp_path, recipe=recipe(trials=1, min_retention=0.0, max_benign_drift=50.0))
    search.search(weak)
    answered = [trial for trial in search.trials if trial.fidelity == "short"]
    first, second = answered[:2]
    assert first.feasible
    assert second.candidate.strength > first.candidate.strength


def test_a_search_that_stops_selects_what_one_that_does_not_selects(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "stopping.py"))
    strict = recipe(logprob_trials=1, finalists=2, full_prompts=4, min_retention=0.95)

    def evaluators(seed: int, answering: Answering) -> CandidateEvaluator:
        some = benchmark["drawn"](setting.unsteered, 0.75, seed)
        assert [len(some.of(kind)) for kind in KINDS] == [6, 6, 6]
        return evaluator(replace(setting, unsteered=some), tmp_path, strict, answering)

    results = list(benchmark["searches"](evaluators, strict.budget, {"adapter": GATES}, range(2)))
    assert [(r.seed, r.mode) for r in results] == [
        (0, "whole"), (0, "parts"), (0, "stopping"), (1, "parts"), (1, "stopping"), (1, "whole"),
    ]  # fmt: skip
    for seed in range(2):
        whole, parts, stopping = (
            {r.mode: r for r in results if r.seed == seed}[m] for m in benchmark["MODES"]
        )
        assert stopping.selected.candidate == parts.selected.candidate
        assert whole.left_out == parts.left_out == 0 < stopping.left_out
        if stopping.reason == parts.reason:  # else the other one answers in full, with nothing to win
            assert stopping.selected.harmful_retention == parts.selected.harmful_retention
            assert stopping.answers + stopping.left_out == parts.answers
        else:
            assert "may be chance" in stopping.reason
            assert stopping.answers + stopping.left_out < parts.answers
        benchmark["row"](stopping)
    benchmark["print_summary"](results)
    assert "parts and stopping select the same candidate 2 times of 2" in capsys.readouterr().out


def test_one_file_a_band_is_scaled_to_each_strength(setting: Setting, tmp_path: Path) -> None:
    search = evaluator(setting, tmp_path)
    weak = Candidate("adapter", "", 1.0, 1, 2, 0.5, benign_target=0.25)
    one, other = search.steering(weak), search.steering(replace(weak, strength=1.5))
    ((path, scale),) = one.adapters
    assert (one.directions, scale) == ({}, 0.5)
    assert list(other.adapters) == [(path, 1.5)]
    expected = setting.gates.factors(1.0, 1, 2, 1.0, 0.25)
    found = lora.read(path).factors
    assert set(found) == set(expected)
    for name, (a, b) in expected.items():
        np.testing.assert_array_equal(found[name][0], a)
        np.testing.assert_array_equal(found[name][1], b)


@pytest.mark.parametrize("other", [{"ridge": 0.05}, {"first": 2}, {"last": 3}, {"benign_target": 0.5}])
def test_what_is_no_matter_of_scale_has_a_file_of_its_own(
    setting: Setting, tmp_path: Path, other: dict[str, Any]
) -> None:
    search, one = evaluator(setting, tmp_path), Candidate("adapter", "", 1.0, 1, 2, 0.5, benign_target=0.25)
    first, second = (search.steering(c).adapters[0][0] for c in (one, replace(one, **other)))
    assert first != second


def test_a_vector_adds_its_share_to_each_block(setting: Setting, tmp_path: Path) -> None:
    directions = setting.directions["md", 1.0]
    added = evaluator(setting, tmp_path).steering(Candidate("vector", "md", 1.0, 1, 3, 6.0)).directions
    profile = band_profile(LAYERS, 1, 3)
    assert set(added) == {1, 2, 3}
    for layer, row in added.items():
        expected = -6.0 * profile[layer] / profile.sum() * 2.0 * directions.unit[layer]
        np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_spaces_stay_within_the_model() -> None:
    for n_layer in (3, 4, 24, 80):
        for space in (adapter.space_of(RIDGES, n_layer), vector.space_of([("md", 1.0)], n_layer)):
            for low, high in (space.first, space.length, space.strength):
                assert 0 < low <= high
            for point in space.start:
                assert 1 <= point.first <= point.last < n_layer
                assert space.first[0] <= point.first <= space.first[1]
                assert space.strength[0] <= point.strength <= space.strength[1]


@pytest.mark.parametrize(
    ("kind", "verdict", "confidence"),
    [("sensitive", "refuses", -1.0), ("harmful", "refuses", -1.0), ("benign", "answers", 1.0)],
)
def test_nothing_to_search_by_is_told(
    setting: Setting, tmp_path: Path, kind: str, verdict: str, confidence: float
) -> None:
    silent = [
        confidence if p.kind == kind else c
        for p, c in zip(setting.unsteered.prompts, confidences_of(setting), strict=True)
    ]
    with pytest.raises(InputError, match=f"{verdict} none of the {EACH} {kind} prompts"):
        finder(with_confidences(setting, silent), tmp_path)


def test_empty_answers_are_no_refusals_to_search_by(setting: Setting, tmp_path: Path) -> None:
    """They count as refused, but have no opening that a probe could look for."""
    answers = [
        replace(a, tokens=[], text="") if p.kind == "harmful" else a
        for p, a in zip(setting.unsteered.prompts, setting.unsteered.answers, strict=True)
    ]
    with pytest.raises(InputError, match=f"refuses none of the {EACH} harmful prompts"):
        finder(replace(setting, unsteered=replace(setting.unsteered, answers=answers)), tmp_path)


def test_trials_survive_being_rows() -> None:
    trial = Trial(
        3, Candidate("adapter", "", 0.3, 5, 22, 1.25), "short", 0.1, 0.95, 0.0, 0.02, 0.01, feasible=True
    )
    row = json.loads(json.dumps({"id": "3", **trial.to_row()}))
    assert load_trials([row]) == [trial]
    assert row["layers"] == [5, 22]
    assert math.isclose(row["strength"], 1.25)
    stopped = replace(trial, sensitive_remaining=1.0, answered=(20, 24), left_out=30, feasible=False)
    row = json.loads(json.dumps(stopped.to_row()))
    assert (row["sensitive_remaining"], row["left_out"]) == (None, 30)
    assert load_trials([row]) == [stopped]
    assert stopped.size == (50, 24)


def test_no_candidate_is_answered_twice(setting: Setting, tmp_path: Path) -> None:
    for space in (VECTORS, GATES):
        search = finder(setting, tmp_path, recipe=recipe(min_retention=1.0, max_benign_drift=1e-9))
        search.search(space)
        answered = [trial.candidate for trial in search.trials if trial.fidelity == "short"]
        assert len(answered) == len(set(answered))


def test_a_search_to_induce_refusals_counts_answers_that_stay(setting: Setting, tmp_path: Path) -> None:
    answered = with_confidences(
        setting,
        [
            -1.0 if p.kind == "sensitive" else c
            for p, c in zip(setting.unsteered.prompts, confidences_of(setting), strict=True)
        ],
    )
    induce = Recipe(effect="induce", **recipe(finalists=1, logprob_trials=1).model_dump(exclude={"effect"}))
    # To this judge the unsteered opening is a refusal: an answer stays one where it begins anew.
    search = finder(answered, tmp_path, recipe=induce)
    chosen = search.search(GATES)
    refused = chosen.harmful_retention * len(setting.unsteered.refused("harmful"))
    assert refused == pytest.approx(round(refused))
    assert 0 <= chosen.sensitive_remaining <= 1
    silent = with_confidences(setting, [1.0] * len(setting.unsteered.prompts))
    with pytest.raises(InputError, match="answers none of the"):
        finder(silent, tmp_path, recipe=induce)


# ---- formulas in place of a model ----------------------------------------------------------------


SPACE = vector.space_of([("bad", 1.0), ("good", 1.0)], 24)


class Formulas:
    """Losses grow with the strength; the sensitive one of `good` is up to three times that of harm.

    How much depends on the middle of the band: block 14 is best.
    """

    fitted = MappingProxyType({"vector": dict.fromkeys(SPACE.directions)})
    targets = tuple(range(40))
    full_size = (12, 64)
    n_in_full = 10_000
    n_harmful = 10_000
    rule = SafetyRule("remove", 0.95, 0.25)

    def __init__(self, good: str = "good", cut_after: int | None = None) -> None:
        self.model = SimpleNamespace(n_layer=24)
        self.asked: list[tuple[str, Candidate]] = []
        self._good, self._cut_after = good, cut_after

    def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
        if len(self.asked) == self._cut_after:
            raise KeyboardInterrupt
        self.asked.append((fidelity, candidate))
        centre = abs((candidate.first + candidate.last) / 2 - 14)
        harm = 0.4 * candidate.strength
        gain = (3.0 if candidate.estimator == self._good else 1.0) / (1 + centre / 8)
        kept, drift = math.exp(-harm), 0.02 * candidate.strength
        return Trial(
            number,
            candidate,
            fidelity,
            math.exp(-gain * harm),
            kept,
            0.0,
            drift,
            0.0,
            feasible=kept >= 0.95 if fidelity == "short" else None,
            n_sensitive=self.n_in_full if fidelity == "full" else len(self.targets),
            seconds=1.0 if fidelity == "logprob" else 10.0,
        )


def formula_finder(formulas: Formulas, known: Sequence[Trial] = (), **tune: Any) -> Finder:
    values = recipe(min_retention=0.95, max_benign_drift=0.25, **tune)
    return Finder(formulas, values.budget, seed=values.seed, known=known)  # type: ignore[arg-type]


def test_probes_meet_where_harm_loses_alike() -> None:
    formulas = Formulas()
    search = formula_finder(formulas, trials=24, finalists=1)
    search.search(SPACE)
    last = {t.candidate.without_strength(): t for t in search.trials if t.fidelity == "logprob"}
    assert len(last) >= 8
    # 10 % of harm's openings, within the factor that counts as near.
    for trial in last.values():
        assert 0.9**1.31 <= trial.harmful_retention <= 0.9 ** (1 / 1.31)


NAMES = [f"e{k}" for k in range(9)]


@pytest.mark.parametrize(("trials", "tried"), [(9, 9), (12, 9), (30, 9), (4, 4)])
def test_each_estimator_is_tried_once_on_the_same_layers_first(trials: int, tried: int) -> None:
    space = vector.space_of([(name, ridge) for name in NAMES for ridge in (0.3, 3.0)], 24)
    assert {point.ridge for point in space.start} == {0.3}
    assert {(point.first, point.last) for point in space.start} == {(12, 19)}
    assert [point.estimator for point in space.start] == NAMES
    formulas = Formulas("e3")
    search = formula_finder(formulas, trials=trials, finalists=1)
    search.search(space)
    asked = [candidate for fidelity, candidate in formulas.asked if fidelity == "logprob"]
    shapes = list(dict.fromkeys(candidate.without_strength() for candidate in asked))
    assert shapes[:tried] == [point.without_strength() for point in space.start][:tried]
    assert len(asked) == trials  # starts count as trials


def test_a_new_estimator_begins_at_the_strength_of_the_one_before() -> None:
    space = vector.space_of([(name, 0.3) for name in NAMES], 24)
    formulas = Formulas()
    formula_finder(formulas, trials=30, finalists=1).search(space)
    asked = [candidate for fidelity, candidate in formulas.asked if fidelity == "logprob"]
    second = [candidate.estimator for candidate in asked].index("e1")
    assert second > 1
    assert asked[second].strength == asked[second - 1].strength != asked[0].strength == 2.0


def test_the_planted_best_is_found_and_its_strength_ends_at_the_limit() -> None:
    search = formula_finder(Formulas(), trials=30, finalists=8)
    chosen = search.search(SPACE)
    assert chosen.feasible
    assert chosen.candidate.estimator == "good"
    assert abs((chosen.candidate.first + chosen.candidate.last) / 2 - 14) <= 3
    answered = [t for t in search.trials if t.fidelity == "short"]
    feasible = [t.candidate.strength for t in answered if t.feasible]
    # Weaker from one to the next while harm is not kept, then up to the limit.
    first = [t.candidate.strength for t in answered[: [t.feasible for t in answered].index(True) + 1]]
    assert all(a > b for a, b in pairwise(first))
    limit = -math.log(0.95) / 0.4
    assert limit / 1.2 <= max(feasible) <= limit


@pytest.mark.parametrize(("floor", "gain"), [(0.0, 0.0), (0.1, 0.0), (0.1, 1 / 40)])
@pytest.mark.parametrize("least", [0.0, 1.2])
def test_strength_grows_for_no_less_than_chance_and_begins_where_it_should(
    floor: float, gain: float, least: float
) -> None:
    class Saturated(Formulas):
        """One and a half times the strength changes one of 40 more at most; harm is always kept."""

        def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
            trial = super().measure(fidelity, number, candidate)
            if fidelity == "logprob":
                return trial
            left = floor - (gain if candidate.strength >= 1.5 * max(1.0, least) else 0.0)
            return replace(trial, sensitive_remaining=left, harmful_retention=1.0, feasible=True)

    one = replace(SPACE.start[1], strength=1.0)
    space = replace(
        SPACE, first=(12, 12), length=(8, 8), start=[one], directions=[("good", 1.0)], strength=(1.0, 1.0),
        least=least,
    )  # fmt: skip
    search = formula_finder(Saturated(), trials=1, finalists=6)
    chosen = search.search(space)
    tried = [t.candidate.strength for t in search.trials if t.fidelity == "short"]
    begun = max(1.0, least)
    assert tried == [begun, *([round(1.5 * begun, 4)] if floor else [])]  # up once, unless nothing is left
    assert chosen.candidate.strength == begun


def test_no_strength_beyond_what_a_space_answers_with() -> None:
    class Better(Formulas):
        """More strength is always better, and harm is always kept."""

        def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
            trial = super().measure(fidelity, number, candidate)
            if fidelity == "logprob":
                return trial
            return replace(
                trial, sensitive_remaining=1 / (1 + candidate.strength), harmful_retention=1.0, feasible=True
            )

    one = replace(SPACE.start[1], strength=1.0)
    space = replace(SPACE, start=[one], directions=[("good", 1.0)], strength=(1.0, 1.0), most=2.0)
    search = formula_finder(Better(), trials=1, finalists=6)
    search.search(space)
    assert [t.candidate.strength for t in search.trials if t.fidelity == "short"] == [1.0, 1.5, 2.0]


class Breaking(Formulas):
    """At full length answers break, unless the strength is below `most`."""

    most = math.inf

    def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
        trial = super().measure(fidelity, number, candidate)
        if fidelity != "full":
            return trial
        return replace(trial, feasible=candidate.strength < self.most, answered=self.full_size)


@pytest.mark.parametrize(("most", "tries"), [(10.0, 2), (0.1, 3), (0.07, 3), (0.0, 3)])
def test_strength_falls_until_full_answers_hold_the_limits(most: float, tries: int) -> None:
    formulas = Breaking()
    formulas.most = most
    search = formula_finder(formulas, trials=12, finalists=6, full=4)
    chosen = search.search(SPACE)
    answered = select_candidate([t for t in search.trials if t.fidelity == "short"])
    tried = [t.candidate for t in search.trials if t.fidelity == "full"]
    assert chosen.fidelity == "full"
    assert tried[0] == answered.candidate
    assert all(a.strength == pytest.approx(1.5 * b.strength, rel=1e-3) for a, b in pairwise(tried))
    assert {candidate.without_strength() for candidate in tried} == {answered.candidate.without_strength()}
    # It ends one step below the first that holds, and after three: then the weakest is the least bad.
    assert len(tried) == tries
    assert chosen.candidate == next((c for c in tried if c.strength < most), tried[-1])
    assert chosen.feasible == (chosen.candidate.strength < most)
    assert summary(search.trials, {"vector": SPACE})["selected"]["vector"] == chosen.number
    # The same again, of what was measured; cut off within the full answers it goes on with them.
    options = {"trials": 12, "finalists": 6, "full": 4}
    for kept in range(len(search.trials) - tries, len(search.trials) + 1):
        again = Breaking()
        again.most = most
        resumed = formula_finder(again, known=search.trials[:kept], **options)
        assert resumed.search(SPACE) == chosen
        assert len(again.asked) == len(search.trials) - kept
    # Answers of another length say nothing of these.
    longer = Breaking()
    longer.most, longer.full_size = most, (12, 200)
    formula_finder(longer, known=search.trials, **options).search(SPACE)
    assert [fidelity for fidelity, _ in longer.asked] == ["full"] * tries


@pytest.mark.parametrize(
    ("left", "least", "n", "taken"),
    [
        ([0.8, 0.6, 0.4], 0.0, 10_000, 1),  # one more is enough
        ([0.8, 0.6, 0.7], 0.0, 10_000, 1),
        ([0.6, 0.8, 0.4], 0.0, 10_000, 0),  # two are enough where the weaker is worse
        ([0.6, 0.6, 0.7], 0.0, 10_000, 1),  # of equals the weaker
        ([0.6, 0.7, 0.4], 0.0, 20, 1),  # few prompts do not tell these two apart
        ([0.6, 0.7, 0.4], 0.0, 100, 0),
        ([0.8, 0.4, 0.2], 0.1, 10_000, 0),  # no answers below what the space calls enough
    ],
)
def test_of_full_answers_the_weakest_that_do_as_well_as_the_best_decide(
    left: list[float], least: float, n: int, taken: int
) -> None:
    class TooStrong(Formulas):
        """Long answers to the strengths that are tried, strongest first, leave so many refusals."""

        n_in_full = n

        def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
            trial = super().measure(fidelity, number, candidate)
            if fidelity != "full":
                return trial
            sensitive = left[sum(fidelity == "full" for fidelity, _ in self.asked) - 1]
            return replace(trial, sensitive_remaining=sensitive, feasible=True, answered=self.full_size)

    search = formula_finder(TooStrong(), trials=12, finalists=6, full=4)
    chosen = search.search(replace(SPACE, least=least))
    tried = [t for t in search.trials if t.fidelity == "full"]
    assert chosen == tried[taken]


def test_full_answers_end_with_the_budget_but_for_the_first() -> None:
    class Slow(Breaking):
        most = 0.0

        def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
            trial = super().measure(fidelity, number, candidate)
            return replace(trial, seconds=60.0) if fidelity == "full" else trial

    for budget, tries in ((200.0, 1), (700.0, 2), (1500.0, 3)):
        search = formula_finder(Slow(), budget=budget, full=4)
        search.search(SPACE, budget)
        assert len([t for t in search.trials if t.fidelity == "full"]) == tries


class SlowUnsteered(Breaking):
    """The unsteered side takes a minute, and in full 500 seconds, once in a process."""

    most = 0.0

    def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
        took = 0.0 if self.asked else 60.0
        if fidelity == "full" and "full" not in {fidelity for fidelity, _ in self.asked}:
            took += 500.0
        return replace(super().measure(fidelity, number, candidate), unsteered_seconds=took)


def test_what_the_unsteered_side_took_counts_to_the_budget() -> None:
    # Of 700 seconds some 560 went before; a second full answer takes a few.
    search = formula_finder(SlowUnsteered(), budget=700.0, full=4)
    search.search(SPACE, 700.0)
    assert len([t for t in search.trials if t.fidelity == "full"]) == 1


def test_what_the_unsteered_side_took_counts_once_however_often_a_search_is_resumed() -> None:
    others = replace(SPACE, directions=[("bad", 2.0)], start=[replace(SPACE.start[0], ridge=2.0)])

    def search(known: Sequence[Trial] = ()) -> list[Trial]:
        finder = formula_finder(SlowUnsteered(), known=known, budget=400.0)
        for space in (SPACE, others):
            finder.search(space, 200.0)
        return finder.trials

    whole = search()
    for kept in (3, len(whole) // 2, len(whole) - 2):
        assert search(load_trials([trial.to_row() for trial in whole[:kept]])) == whole


def test_full_answers_that_stopped_are_known_when_a_search_goes_on() -> None:
    class Stopping(Breaking):
        most = 0.08

        def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
            trial = super().measure(fidelity, number, candidate)
            if fidelity != "full" or trial.feasible:
                return trial
            return replace(trial, sensitive_remaining=1.0, answered=(4, 64), left_out=8)

    options: dict[str, Any] = {"trials": 12, "finalists": 6, "full": 4}
    whole = formula_finder(Stopping(), **options)
    chosen = whole.search(SPACE)
    full = [t for t in whole.trials if t.fidelity == "full"]
    assert [bool(t.left_out) for t in full] == [True, True, False]
    assert chosen == full[-1]
    for kept in range(len(whole.trials) - 3, len(whole.trials) + 1):
        again = Stopping()
        known = load_trials([trial.to_row() for trial in whole.trials[:kept]])
        assert formula_finder(again, known=known, **options).search(SPACE) == chosen
        assert len(again.asked) == len(whole.trials) - kept


def test_what_breaks_a_limit_at_once_is_not_answered_in_full() -> None:
    class Harmless(Formulas):
        def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
            return replace(super().measure(fidelity, number, candidate), feasible=False)

    search = formula_finder(Harmless(), trials=2, finalists=2, full=4)
    assert not search.search(SPACE).feasible
    assert not [t for t in search.trials if t.fidelity == "full"]


def test_a_budget_is_used_and_not_exceeded() -> None:
    for budget in (60.0, 400.0):
        formulas = Formulas()
        search = formula_finder(formulas, budget=budget)
        search.search(SPACE, budget)
        spent = sum(trial.seconds for trial in search.trials)
        assert budget - 25 <= spent <= budget + 3
        probes = [t for t in search.trials if t.fidelity == "logprob" and t.number < 6]
        assert sum(t.seconds for t in probes) <= 0.25 * budget + 3
    assert len([t for t in search.trials if t.fidelity == "short"]) > 20


def test_a_search_that_is_ended_among_its_probes_answers_with_the_best_of_them() -> None:
    cut = formula_finder(Formulas(cut_after=35), budget=300.0)
    with pytest.raises(KeyboardInterrupt):
        cut.search(SPACE, 300.0)
    assert {trial.fidelity for trial in cut.trials} == {"logprob"}
    ended = Formulas()
    best = formula_finder(ended, known=cut.trials, budget=0.0).search(SPACE, 0.0)
    middle = min(abs((t.candidate.first + t.candidate.last) / 2 - 14) for t in cut.trials)
    assert best.candidate.estimator == "good"
    assert abs((best.candidate.first + best.candidate.last) / 2 - 14) == middle
    assert [fidelity for fidelity, _ in ended.asked] == ["short"]


def test_an_interrupted_search_keeps_its_best_and_can_be_ended_there() -> None:
    whole = formula_finder(Formulas(), budget=300.0)
    chosen = whole.search(SPACE, 300.0)
    cut = formula_finder(Formulas(cut_after=len(whole.trials) - 4), budget=300.0)
    with pytest.raises(KeyboardInterrupt):
        cut.search(SPACE, 300.0)
    assert cut.trials == whole.trials[:-4]
    kept = summary(cut.trials, {"vector": SPACE})
    # With no time left nothing more is measured, and the best so far is taken.
    ended = Formulas()
    best = formula_finder(ended, known=load_trials(kept["trials"]), budget=0.0).search(SPACE, 0.0)
    assert (best.number, ended.asked) == (kept["selected"]["vector"], [])
    # With the same time it goes on to the same end.
    again = Formulas()
    resumed = formula_finder(again, known=load_trials(kept["trials"]), budget=300.0)
    assert resumed.search(SPACE, 300.0) == chosen
    assert resumed.trials == whole.trials
    assert len(again.asked) == 4


def test_a_longer_search_answers_with_what_it_proposes() -> None:
    short = formula_finder(Formulas(), trials=4, finalists=4)
    short.search(SPACE)
    formulas = Formulas()
    longer = formula_finder(formulas, known=short.trials, trials=30, finalists=4)
    chosen = longer.search(SPACE)
    answered = [candidate.without_strength() for fidelity, candidate in formulas.asked if fidelity == "short"]
    assert len(answered) == 4
    assert not {trial.candidate.without_strength() for trial in short.trials} & set(answered)
    # Cut off, it ends alike; ended, it measures nothing more.
    for kept in (-20, -5, -2, None):
        again = formula_finder(Formulas(), known=longer.trials[:kept], trials=30, finalists=4)
        assert again.search(SPACE) == chosen
        assert again.trials == longer.trials


@pytest.mark.parametrize("kept", [1.1, 0.91])
def test_where_another_limit_breaks_other_blocks_come_first_and_then_less_strength(kept: float) -> None:
    class Loud(Formulas):
        """Benign refusals rise with the strength, whatever the blocks; of 20 of harm at most one is lost."""

        n_harmful = 20

        def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
            trial = super().measure(fidelity, number, candidate)
            return replace(
                trial,
                harmful_retention=kept if fidelity == "short" else trial.harmful_retention,
                feasible=candidate.strength < 0.2 if fidelity == "short" else None,
            )

    search = formula_finder(Loud(), trials=12, finalists=6)
    assert search.search(SPACE).feasible
    first, second, *rest = [t.candidate for t in search.trials if t.fidelity == "short"]
    assert first.without_strength() != second.without_strength()
    assert rest[0].without_strength() in (first.without_strength(), second.without_strength())
    assert rest[0].strength < min(first.strength, second.strength)


@pytest.mark.parametrize("kept", [0.9, 1.0])
def test_where_no_strength_is_within_the_limits_a_budget_ends_all_the_same(kept: float) -> None:
    class Never(Formulas):
        """The limit on harm breaks, or another: then two thirds of the least strength round up to it."""

        def measure(self, fidelity: str, number: int, candidate: Candidate) -> Trial:
            return replace(
                super().measure(fidelity, number, candidate), harmful_retention=kept, feasible=False
            )

    formulas = Never()
    assert not formula_finder(formulas, budget=10_000.0).search(SPACE, 10_000.0).feasible
    assert all(candidate.strength > 0 for _, candidate in formulas.asked)


def test_candidates_answer_at_the_recipes_temperature(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def noted(
        model: Any,
        judge: Any,
        condition: Condition,
        prompts: Sequence[Prompt],
        asking: Asking,
        **options: Any,
    ) -> JudgedAnswers:
        drawn.append(asking.sampling)
        return answer_condition(model, judge, condition, prompts, asking, **options)

    monkeypatch.setattr(rungs_module, "answer_condition", noted)
    warm = setting.recipe.model_copy(update={"answers": Answers(tokens=8, temperature=0.8), "seed": 3})
    evaluator(setting, tmp_path, warm).measure("short", 0, GATES.start[0])
    # A second run of what changed draws with another seed.
    assert set(drawn) == {Sampling(temperature=0.8, seed=seed) for seed in (3, 4)}


def test_an_exhausted_space_ends_the_search() -> None:
    small = replace(SPACE, first=(8, 9), length=(2, 2), start=[replace(SPACE.start[0], first=8, last=9)])
    formulas = Formulas()
    search = formula_finder(formulas, budget=10_000.0)
    assert search.search(small, 10_000.0).feasible
    assert len(formulas.asked) == len(set(formulas.asked))
    assert len({candidate.without_strength() for _, candidate in formulas.asked}) <= 4


def test_progress_counts_up_to_the_effort() -> None:
    for tune in ({"trials": 6, "finalists": 3}, {"trials": 6, "finalists": 3, "full": 4}, {"budget": 120.0}):
        done: list[int] = []
        values = recipe(min_retention=0.95, max_benign_drift=0.25, **tune)
        formulas = Formulas()
        search = Finder(formulas, values.budget, seed=values.seed, advance=done.append)  # type: ignore[arg-type]
        search.search(SPACE, values.tune.budget)
        assert Finder.effort(values.budget, 1) * 0.7 <= sum(done) <= Finder.effort(values.budget, 1) * 1.2


def tune_stage(folder: Path, formulas: Formulas, **options: Any) -> dict[str, Any]:
    """The tune stage over formulas; the content of tune.json."""
    values = recipe(**{"min_retention": 0.95, "max_benign_drift": 0.25, **options})
    with contextlib.suppress(KeyboardInterrupt):
        tuning.tune(formulas, values, RunFolder(folder), Silent(), fit_key="fit")  # type: ignore[arg-type]
    found: dict[str, Any] = json.loads((folder / "tune.json").read_text())
    return found


def test_the_stage_keeps_the_best_so_far_and_goes_on(tmp_path: Path) -> None:
    whole = tune_stage(tmp_path / "whole", Formulas(), budget=200)
    cut = tune_stage(tmp_path / "cut", Formulas(cut_after=len(whole["trials"]) - 3), budget=200)
    assert cut["trials"] == whole["trials"][:-3]
    assert cut["selected"]["vector"] in {
        trial["number"] for trial in cut["trials"] if trial["fidelity"] == "short"
    }
    resumed = Formulas()
    assert tune_stage(tmp_path / "cut", resumed, budget=200) == whole
    assert len(resumed.asked) == 3
    assert (tmp_path / "cut" / "trials.jsonl").is_file()
    # A search that has ended is the beginning of a longer one.
    longer = Formulas()
    found = tune_stage(tmp_path / "whole", longer, budget=300)
    assert found["trials"][: len(whole["trials"])] == whole["trials"]
    assert len(found["trials"]) == len(whole["trials"]) + len(longer.asked)
    assert 0 < len(longer.asked) < len(whole["trials"])
    # The disk may have been full when its rows were copied into a new log.
    log, again = tmp_path / "whole" / "trials.jsonl.part", Formulas()
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
    assert tune_stage(tmp_path / "whole", again, budget=300) == found
    assert again.asked == []
    # Under other limits nothing that was measured counts.
    strict = Formulas()
    values = tune_stage(tmp_path / "whole", strict, budget=50, max_benign_drift=0.1)
    assert len(values["trials"]) == len(strict.asked)


def test_a_limit_that_the_search_does_not_use_repeats_no_trial(tmp_path: Path) -> None:
    options = {"trials": 12, "finalists": 6}
    found = tune_stage(tmp_path, Formulas(), **options)
    again = Formulas()
    assert tune_stage(tmp_path, again, **options, min_top1=0.8) == found
    assert again.asked == []


def test_full_answers_of_another_length_keep_their_rows_and_numbers(tmp_path: Path) -> None:
    options = {"trials": 12, "finalists": 6, "full": 4}
    first = tune_stage(tmp_path, Breaking(), **options)
    longer = Breaking()
    longer.full_size = (12, 200)
    second = tune_stage(tmp_path, longer, **options)
    assert [fidelity for fidelity, _ in longer.asked] == ["full"] * 2
    assert second["trials"][:-2] == first["trials"]
    assert [trial["number"] for trial in second["trials"]] == list(range(len(first["trials"]) + 2))
    # The new ones decide, and whoever returns to the former length finds what was measured.
    assert second["selected"]["vector"] in {trial["number"] for trial in second["trials"][-2:]}
    again = Breaking()
    third = tune_stage(tmp_path, again, **options)
    assert again.asked == []
    assert (third["selected"], third["trials"]) == (first["selected"], second["trials"])
