"""Test the whole pipeline on tiny random models: one that always thinks first, and one of experts.

The judge is a stand-in at an endpoint. It decides by the prompt, so that every class has samples, and records
what it judged.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fixtures.endpoints import Server, without_proxy_or_key
from fixtures.tiny_gguf import write_tiny_folder, write_tiny_qwen2
from fixtures.tiny_qwen3 import THINKING_TEMPLATE, write_tiny_qwen3
from fixtures.tiny_run import LIKED, PLAIN_TEMPLATE, SMALL, Judge

from rs_gguf.activations.store import ActivationStore, DamagedStoreError
from rs_gguf.cli.main import main
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Steering, read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.judges.judge import EXAMPLE
from rs_gguf.judges.local import KeywordJudge
from rs_gguf.methods import METHODS
from rs_gguf.pipeline import recipe
from rs_gguf.pipeline import stage as stage_module
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.run import open_run, run
from rs_gguf.pipeline.stage import Run, Silent
from rs_gguf.pipeline.stages import answers as answering
from rs_gguf.pipeline.stages import measure as measuring
from rs_gguf.pipeline.stages import write as writing
from rs_gguf.pipeline.stages.fit import samples
from rs_gguf.prompts import contexts
from rs_gguf.prompts.template import ChatFormat
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import Answer, Prompt
from rs_gguf.records.files import save_arrays, sha256
from rs_gguf.records.metrics import JudgeRecord
from rs_gguf.records.rows import Row, RowLog, read_json, write_json, write_rows
from rs_gguf.records.trials import Candidate, Trial
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.vector import SteeringVector

pytestmark = pytest.mark.slow


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    without_proxy_or_key(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    judging = Judge()
    server = Server(judging, ["judge"])
    judging.url = server.url
    yield judging
    server.stop()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def check_inputs(one: Run, places: Sequence[int]) -> None:
    """Check that activations and inputs of one matrix belong to their prompts, by capturing them again."""
    captured = samples(one)
    every = [*captured.prompts, *captured.gate_only]
    chat = ChatFormat.of(one.model)
    fit = one.prompts["fit"]
    read = dict(zip([p.id for p in fit], chat_tokens(one.model, fit, None), strict=True))
    read |= {p.id: c.tokens(chat, one.model, p.prompt, None) for p, c in one.in_contexts}
    inputs = captured.inputs["attn_output"].last_token.layer_rows(1, np.arange(len(every))).numpy()
    kept = {"kqv_out": inputs, "l_out": captured.activations.layer_rows(1).numpy()}  # l_out: judged prompts
    for place in places:
        tokens = read[every[place].id]
        again = read_last(one.model, [tokens], range(2), tuple(kept))
        for name in [name for name, rows in kept.items() if place < len(rows)]:
            distance = np.linalg.norm(kept[name] - again[name][0, 1], axis=1)
            assert distance.argmin() == place
            assert distance[place] < 1e-2 * np.linalg.norm(again[name][0, 1])


def test_a_model_that_thinks_first(judge: Judge, tmp_path: Path) -> None:
    model = tmp_path / "thinking.gguf"
    write_tiny_qwen3(model, THINKING_TEMPLATE, liked=LIKED, seed=2)
    variants = ["fit.gate_refits=1", "prompts.gate_only=28"]  # three prompts in each context
    variants.append("answers.trace_tokens=0")  # the limit of an answer truncates half of the traces
    chosen = recipe.load(None, [*SMALL, *variants, f"model={model}", f"judge={judge.url}"])
    metrics = run(chosen, tmp_path / "out")

    answers = {row["id"]: row for row in rows(tmp_path / "out" / "answers.jsonl")}
    with LlamaModel(model, n_ctx=512) as loaded:
        texts = {i: loaded.detokenize(row["tokens"]) for i, row in answers.items()}
    closed = {i for i, text in texts.items() if "</think>" in text}
    assert 40 < len(closed) < len(answers)  # both cases occur
    for i, row in answers.items():
        assert row["answer"] == (texts[i].partition("</think>")[2].strip() if i in closed else "")
    for row in rows(tmp_path / "out" / "judgements.jsonl"):
        # An answer that was truncated within the trace is not judged; one that ended there is empty.
        judged = row["id"] in closed or answers[row["id"]]["finished"] or answers[row["id"]]["degenerate"]
        assert (row["confidence"] is not None) == judged, row
    traces = {text.partition("</think>")[0].strip() for text in texts.values()}
    assert not [text for text in judge.judged if any(len(t) > 8 and t in text for t in traces)]

    # Prompts without a judgement come last, each with its own inputs.
    with open_run(chosen, RunFolder(tmp_path / "out")) as one:
        captured, asked = samples(one), {p.id for p in one.prompts["fit"]}
        unjudged = [p for p in captured.gate_only if p.id in asked]
        assert 0 < len(unjudged) < 40
        assert len(captured.prompts) + len(unjudged) == len(captured.activations) + len(unjudged) == 72
        unanswered = [p for p in captured.gate_only if p.id not in asked]
        assert len(unanswered) == 84
        assert not {p.id for p in unanswered} & answers.keys()
        assert {p.split for p in unanswered} == {"fit"}
        names = dict(zip((p.id for p in captured.gate_only), captured.contexts, strict=True))
        assert {names[p.id] for p in unanswered} == {context.name for context in contexts.shipped()}
        assert {names[p.id] for p in unjudged} == {""}
        # A gate must stay closed where the system prompt asks for a refusal.
        asked_for = {c.name for c in contexts.shipped() if c.refusals_asked}
        within = zip(captured.gate_only, captured.contexts, strict=True)
        kinds = {p.kind for p, context in within if context in asked_for}
        assert kinds == {"harmful", "benign"}
        assert "refusal asked" in {p.topic for p in captured.gate_only}
        # Each context is a group, for which the gate must stay closed.
        assert set(captured.labels().groups[:, 3]) == {"", *(context.name for context in contexts.shipped())}
        n = len(captured.prompts)
        check_inputs(one, [0, n - 1, n, n + len(unjudged), n + len(unjudged) + 83])

    assert metrics["model"]["architecture"] == "qwen3"
    assert set(metrics["files"]["vector"]["sets"]) == {"sensitive", "harmful", "benign"}
    assert list(metrics["files"]) == list(METHODS)
    for file in metrics["files"].values():
        assert file["effect_check"]["effect_observed"] is True
    assert sum(one_set["n"] for one_set in metrics["files"]["vector"]["sets"].values()) > 0
    assert control_vector.read(tmp_path / "out" / "remove.gguf").architecture == "qwen3"
    folder = tmp_path / "out"
    files = [folder / "remove.gguf", folder / "remove-adapter.gguf"]
    vector, adapter = control_vector.read(files[0]), lora.read(files[1])
    assert adapter.provenance["measured"] is vector.provenance["measured"] is True
    assert [file["llama_cpp"]["command"] for file in metrics["files"].values()] == [
        f"llama-server -m {model} --control-vector {files[0]} "
        f"--control-vector-layer-range {vector.layers[0]} {vector.layers[-1]}",
        f"llama-server -m {model} --lora {files[1]}",
    ]
    card = (folder / "card.md").read_text("utf-8")
    assert all(sha256(file) in card for file in files)
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_mixture_of_experts(judge: Judge, tmp_path: Path) -> None:
    """The store is damaged before the fit, so that the next run captures it again."""
    model, out = tmp_path / "experts.gguf", tmp_path / "out"
    write_tiny_qwen3(model, PLAIN_TEMPLATE, experts=4, liked={**LIKED, "</think>": 0.0}, seed=2)
    chosen = recipe.load(None, [*SMALL, f"model={model}", f"judge={judge.url}"])
    run(chosen, out, until="capture")
    shard = out / "activations" / "00001.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(InputError, match=r"00001.safetensors is missing or was changed"):
        run(chosen, out)
    metrics = run(chosen, out)
    assert shard.read_bytes() == before

    assert metrics["model"]["architecture"] == "qwen3moe"
    assert [one_set["n"] for one_set in metrics["files"]["vector"]["sets"].values()] == [4, 4, 4]
    assert list(metrics["files"]) == ["vector", "adapter"]
    for file in metrics["files"].values():
        assert file["effect_check"]["effect_observed"] is True
    # Expert layers have no single ffn_down for a gate vector: only attn_output is left.
    factors = lora.read(out / "remove-adapter.gguf").factors
    assert factors
    assert all(".attn_output." in name for name in factors)

    # A file that was moved is reported as missing.
    (out / "remove.gguf").rename(out / "moved.gguf")
    with pytest.raises(InputError, match=r"remove\.gguf, which this run wrote, is missing"):
        run(chosen, out)
    more = recipe.load(None, [*SMALL, "prompts.validation=6", f"model={model}", f"judge={judge.url}"])
    run(more, out)  # it measures again, and writes the missing file for that
    written, moved = control_vector.read(out / "remove.gguf"), control_vector.read(out / "moved.gguf")
    np.testing.assert_equal(dict(written.directions), dict(moved.directions))
    (out / "moved.gguf").unlink()

    # --fresh deletes all files that stages leave for each other, and no others.
    RunFolder(out).forget_all()
    kept = {"recipe.toml", "remove.gguf", "remove-adapter.gguf", "report.html", "card.md"}
    assert {path.name for path in out.iterdir()} - {".lock"} == kept


def test_a_hugging_face_folder(judge: Judge, tmp_path: Path) -> None:
    """It gets a control vector without an adapter, and no effect check, which needs llama.cpp."""
    write_tiny_folder(tmp_path / "model")
    fewer = [
        "prompts.fit=8",
        "prompts.tune=4",
        "answers.fit_tokens=8",
        "answers.tokens=8",
        "answers.test_tokens=8",
        "tune.full_prompts=0",
    ]
    fewer += ["measure.baselines=[]"]
    chosen = recipe.load(None, [*SMALL, *fewer, f"model={tmp_path / 'model'}", f"judge={judge.url}"])
    out = tmp_path / "out"
    metrics = run(chosen, out)

    assert (metrics["model"]["architecture"], metrics["model"]["n_layer"]) == ("qwen2", 3)
    assert [one_set["n"] for one_set in metrics["files"]["vector"]["sets"].values()] == [4, 4, 4]
    assert "adapter" not in metrics["files"]
    assert not (out / "remove-adapter.gguf").exists()
    effect = metrics["files"]["vector"]["effect_check"]
    assert (effect["effect_observed"], effect["kl_mean"]) == (None, None)
    assert "rs-export check --model" in effect["reasons"][0]
    vector = control_vector.read(out / "remove.gguf")
    assert (vector.architecture, vector.provenance["measured"]) == ("qwen2", True)
    written = rows(out / "test_answers.jsonl")
    assert all("answer_adapter" not in row for row in written)
    assert any(row["answer_vector"] != row["answer_unsteered"] for row in written)
    kept = {name: (out / name).read_bytes() for name in ("state.json", "recipe.toml", "tune.json")}
    refused = CliRunner().invoke(main, ["report", "--out", str(out), "--set", "fit.ridges=[7.0]"])
    assert refused.exit_code == 2
    assert "the stage fit is out of date" in refused.stderr
    assert {name: (out / name).read_bytes() for name in kept} == kept
    (out / "report.html").unlink()
    assert CliRunner().invoke(main, ["report", "--out", str(out)]).exit_code == 0
    assert (out / "report.html").is_file()
    # Another limit that the search does not use: nothing is answered again.
    counted = Counted()
    run(recipe.load(out / "recipe.toml", ["tune.min_top1=0.1"]), out, progress=counted)
    assert counted.steps == {"measure": [12, 12], "report": [1, 1]}
    assert rows(out / "test_answers.jsonl") == written
    assert "remove.gguf" in (out / "card.md").read_text(encoding="utf-8")
    assert (out / "report.html").is_file()


def test_a_file_without_its_effect_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of earlier stages are invented."""
    model, folder = tmp_path / "tiny.gguf", RunFolder(tmp_path / "out")
    write_tiny_qwen2(model)
    chosen = recipe.load(None, [*SMALL, f"model={model}", "judge=keywords"])
    trial = Trial(0, Candidate("vector", "contrast-wrmd", 1.0, 1, 2, 2.0), "short", 0.0, 1.0)
    write_json(folder / "tune.json", {"trials": [trial.to_row()], "selected": {"vector": 0}})
    unit = np.random.default_rng(0).standard_normal((3, 32))
    directions = {"contrast-wrmd@1/unit": unit, "contrast-wrmd@1/scales": np.ones(3)}
    save_arrays(folder / "directions.safetensors", directions)
    recipe.dump(chosen, folder / "recipe.toml")
    with open_run(chosen, folder) as one:
        for stage in list(STAGES)[: list(STAGES).index("write")]:
            folder.mark_done(stage, one.key(stage), 0.0)

    steered = LlamaModel.steered

    @contextlib.contextmanager
    def halved(self: LlamaModel, steering: Steering) -> Iterator[None]:
        with steered(self, steering.scaled(0.5)):
            yield

    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "steered", halved)
        failed = CliRunner().invoke(main, ["write", "--out", str(folder.path)])
    assert failed.exit_code == 1
    assert f"\nError: {folder / 'remove.gguf'}: " in failed.stderr
    assert "relative error 0.5" in failed.stderr
    assert not (folder / "effect_check.json").exists()
    again = CliRunner().invoke(main, ["write", "--out", str(folder.path)])
    assert again.exit_code == 0, again.output
    assert read_json(folder / "effect_check.json")["vector"]["effect_observed"] is True


def test_the_recipes_system_prompt_precedes_every_prompt(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some contexts have their own system prompt; the baseline's text follows the recipe's."""
    read: dict[str, list[Sequence[int]]] = {"generate": [], "token_logprobs": [], "read": []}

    def spied(name: str) -> Callable[..., Any]:
        method = getattr(LlamaModel, name)

        def called(self: LlamaModel, given: Any, *arguments: Any, **options: Any) -> Any:
            read[name] += [one[0] for one in given] if name == "token_logprobs" else given
            return method(self, given, *arguments, **options)

        return called

    for name in read:
        monkeypatch.setattr(LlamaModel, name, spied(name))
    monkeypatch.setattr(writing, "effect_of", lambda *_: {})  # the effect check has its own prompts
    write_tiny_qwen3(tmp_path / "plain.gguf", PLAIN_TEMPLATE, liked=LIKED, seed=2)
    values = [*SMALL, f"model={tmp_path / 'plain.gguf'}", f"judge={judge.url}", "prompts.system=Be kind."]
    fewer = [
        "prompts.fit=8",
        "prompts.tune=4",
        "answers.fit_tokens=8",
        "answers.tokens=8",
        "answers.test_tokens=8",
        "tune.logprob_trials=1",
    ]
    run(recipe.load(None, values + fewer), tmp_path / "out", until="measure")

    with LlamaModel(tmp_path / "plain.gguf", n_parallel=1, n_ctx=256) as model:
        said = {name: [model.detokenize(t, special=True) for t in tokens] for name, tokens in read.items()}
        probe = model.detokenize([0], special=True)  # a token that the matrices are looked for with
    own = [f"<|im_start|>system\n{c.system}" for c in contexts.shipped() if c.system]
    for name, texts in said.items():
        others = [text for text in texts if not text.startswith("<|im_start|>system\nBe kind.")]
        assert len(others) < len(texts)
        assert all(name == "read" and (text == probe or text.startswith(tuple(own))) for text in others)
    assert any("Be kind.\n\nYou are a helpful assistant." in text for text in said["generate"])


def test_a_model_that_never_stops_thinking_is_an_error(judge: Judge, tmp_path: Path) -> None:
    model = tmp_path / "lost.gguf"
    write_tiny_qwen3(model, THINKING_TEMPLATE, liked=dict.fromkeys("etaoinshrdlucmfw", 9.0), seed=2)
    hot = "answers.temperature=4.0"  # no trace is then a loop, which would be judged
    short = "answers.trace_tokens=0"
    chosen = recipe.load(None, [*SMALL, hot, short, f"model={model}", f"judge={judge.url}"])
    with pytest.raises(InputError, match=r"none of the 72 answers could be judged.*answers.fit_tokens"):
        run(chosen, tmp_path / "out")
    assert set(judge.judged) == {EXAMPLE[1]}  # the trial before the run


def kill(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def test_after_a_kill_before_the_mark_nothing_is_answered_twice(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "plain.gguf"
    write_tiny_qwen3(model, PLAIN_TEMPLATE, liked=LIKED, seed=2)
    chosen = recipe.load(None, [*SMALL, f"model={model}", f"judge={judge.url}"])

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_done", kill)
        with pytest.raises(KeyboardInterrupt):
            run(chosen, tmp_path / "out", until="answer")
    counted = Counted()
    run(chosen, tmp_path / "out", until="answer", progress=counted)
    assert counted.steps == {"answer": [96]}  # all answers were in the log
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_killed_run_makes_the_files_of_one_that_was_not(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same answers, killed in the middle of the search and of the measurement."""
    model, out, whole = tmp_path / "plain.gguf", tmp_path / "out", tmp_path / "whole"
    write_tiny_qwen3(model, PLAIN_TEMPLATE, liked=LIKED, seed=2)
    chosen = recipe.load(None, [*SMALL, f"model={model}", f"judge={judge.url}"])
    run(chosen, whole, until="score")
    shutil.copytree(whole, out)
    append = RowLog.append
    for log, count in (("trials.jsonl", 3), ("measured.jsonl", 16)):
        left = itertools.count(count, -1)

        def at_most(self: RowLog, row: Row, log: str = log, left: Iterator[int] = left) -> None:
            append(self, row)
            if self._final.name == log and next(left) == 1:
                kill()

        with monkeypatch.context() as patch:
            patch.setattr(RowLog, "append", at_most)
            with pytest.raises(KeyboardInterrupt):
                run(chosen, out)
        assert (out / f"{log}.part").read_text().count("\n") == 1 + count
    for folder in (out, whole):
        run(chosen, folder)
    tuned = [read_json(folder / "tune.json") for folder in (out, whole)]
    for found in tuned:
        for trial in found["trials"]:
            del trial["seconds"], trial["unsteered_seconds"]
    assert tuned[0] == tuned[1]
    for name in ("directions.safetensors", "test_answers.jsonl", "remove.gguf", "remove-adapter.gguf"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name

    # A machine without the device of the fit does not fit again.
    assert not torch.cuda.is_available()
    chosen = recipe.load(None, [*SMALL, f"model={model}", f"judge={judge.url}", "fit.device=cuda"])
    counted = Counted()
    run(chosen, out, progress=counted)
    assert counted.steps.keys() == {"report"}  # it is always written
    with pytest.raises(InputError, match="PyTorch sees no CUDA device"):
        run(chosen, out, fresh=True)


def test_a_user_can_return_from_a_wrong_recipe_while_it_answers(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "plain.gguf"
    write_tiny_qwen3(model, PLAIN_TEMPLATE, liked=LIKED, seed=2)
    right, wrong = (
        recipe.load(None, [*SMALL, f"model={model}", f"judge={judge.url}", f"seed={seed}"]) for seed in (1, 2)
    )

    run(right, tmp_path / "out", until="score")
    with monkeypatch.context() as patch:
        patch.setattr(answering, "answers", kill)
        with pytest.raises(KeyboardInterrupt):
            run(wrong, tmp_path / "out", until="score")
    counted = Counted()
    run(right, tmp_path / "out", until="score", progress=counted)
    assert counted.steps == {}


def test_a_model_that_cannot_answer_stops_the_run_before_its_first_answer(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tmp_path / "plain.gguf", tmp_path / "out"
    write_tiny_qwen3(model, PLAIN_TEMPLATE, liked=LIKED, seed=2)
    values = [*SMALL, f"model={model}", f"judge={judge.url}"]
    checked = recipe.load(None, [*values, "answers.check=true"])
    with monkeypatch.context() as patch:
        patch.setattr(answering, "answers", lambda *_: pytest.fail("an answer was begun"))
        with pytest.raises(InputError, match="the model cannot answer"):
            run(checked, out, until="answer")
    run(recipe.load(None, values), out, until="answer")
    before = (out / "answers.jsonl").read_bytes()
    monkeypatch.setattr(answering, "check_can_answer", lambda _: pytest.fail("checked again"))
    run(checked, out, until="answer")  # the check is not an input of the answers
    assert (out / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("spare", [0, 40], ids=["alone", "with the baseline's system prompt"])
def test_a_prompt_that_is_too_long_for_a_later_stage_is_an_error_at_once(
    spare: int, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "plain.gguf"
    write_tiny_qwen3(model, PLAIN_TEMPLATE, liked=LIKED, seed=2)
    rows = [{"prompt": split, "split": split} for split in ("fit", "tune", "validation")]
    with LlamaModel(model, n_parallel=1) as loaded:
        (shortest,) = chat_tokens(loaded, [Prompt("test", "benign")])
        (longer,) = chat_tokens(loaded, [Prompt("test" + 10 * "a", "benign")])
        assert len(longer) == len(shortest) + 10
        rows[-1]["prompt"] += (loaded.max_length - 32 - len(shortest) + 1 - spare) * "a"
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = [*SMALL, f"model={model}", f"judge={judge.url}", f"prompts.benign=['{tmp_path / 'long.jsonl'}']"]
    monkeypatch.setattr(answering, "answers", lambda *_: pytest.fail("an answer was begun"))
    with pytest.raises(InputError, match=r"a prompt has \d+ tokens and its answer may have \d+"):
        run(recipe.load(None, values), tmp_path / "out", until="answer")


class Counted(Silent):
    """Records the steps of each stage; a download must not show its bar within the bar of a stage."""

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}
        self.within = ""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        self.within, steps = name, self.steps.setdefault(name, [])
        yield lambda n: steps.append(n) if n else None
        self.within = ""

    def download(self, done: int, total: int) -> None:
        assert not self.within


def test_a_judge_is_fetched_before_its_stage_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions of rich cannot show two live displays at once."""
    opened: list[str] = []

    @contextlib.contextmanager
    def fetched(spec: str | None, *, progress: Callable[[int, int], None], **_: object) -> Iterator[Any]:
        progress(1, 2)
        opened.append(counted.within)
        yield KeywordJudge()

    monkeypatch.setattr(stage_module, "open_judge_spec", fetched)
    monkeypatch.setattr(measuring, "measure", kill)
    monkeypatch.setattr(Run, "model", None)
    monkeypatch.setattr(Run, "model_hash", "")
    monkeypatch.setattr(Run, "key", lambda run, stage: stage)
    for stage in ("score", "measure"):
        folder, counted = RunFolder(tmp_path / stage), Counted()
        write_rows(folder / "answers.jsonl", [])
        (folder / "effect_check.json").write_text('{"vector": {}}')
        trial = Trial(0, Candidate("vector", "contrast-wrmd", 1.0, 1, 2, 2.0), "short", 0.0, 1.0)
        write_json(folder / "tune.json", {"trials": [trial.to_row()], "selected": {"vector": 0}})
        vector = SteeringVector({1: np.ones(4, dtype=np.float32)}, {}, "qwen2")
        control_vector.write(vector, folder / "remove.gguf")
        chosen = recipe.load(None, ["measure.baselines=[]"])
        with contextlib.suppress(KeyboardInterrupt), open_run(chosen, folder, counted) as one:
            one.stages[stage].work(one, "key")
        assert stage in counted.steps
    assert opened == ["", ""]


@pytest.mark.parametrize("override", ["effect=induce", "model=@folder"])
def test_an_impossible_baseline_is_an_error_before_any_work(override: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    chosen = recipe.load(None, ["measure.baselines=['ablation']", override.replace("@", f"{tmp_path}/")])
    with pytest.raises(InputError, match=r"measure\.baselines: ablation"):
        run(chosen, tmp_path / "out")
    assert not (tmp_path / "out" / "recipe.toml").exists()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("mistyped", ["model=@none.gguf", "prompts.sensitive=['@none.jsonl']"])
def test_a_mistyped_file_leaves_the_folder_unchanged(mistyped: str, fresh: bool, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    values = [f"model={tmp_path / 'model.gguf'}", mistyped.replace("@", f"{tmp_path}/")]
    out = tmp_path / "out"
    out.mkdir()
    for name in ("answers.jsonl", "answers.jsonl.part", "state.json", "recipe.toml"):
        (out / name).write_text("hours of work")
    with pytest.raises(InputError, match=r"none\.(gguf|jsonl)"):
        run(recipe.load(None, values), out, fresh=fresh)
    assert {path.read_text() for path in out.iterdir() if path.name != ".lock"} == {"hours of work"}
    assert len(list(out.glob("[!.]*"))) == 4


@pytest.mark.parametrize("fresh", [False, True])
def test_a_judge_that_cannot_be_used_leaves_the_folder_unchanged(fresh: bool, tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "model.gguf", PLAIN_TEMPLATE)
    out = tmp_path / "out"
    out.mkdir()
    kept = {
        "answers.jsonl": "hours of work",
        "recipe.toml": "seed = 1",
        "state.json": '{"answer": {"key": "a"}}',
    }
    for name, text in kept.items():
        (out / name).write_text(text)
    values = [f"model={tmp_path / 'model.gguf'}", f"judge={tmp_path / 'none.gguf'}"]
    with pytest.raises(InputError, match=r"none\.gguf"):
        run(recipe.load(None, values), out, fresh=fresh)
    assert {path.name: path.read_text() for path in out.iterdir() if path.name != ".lock"} == kept


@pytest.mark.parametrize("fresh", [False, True])
def test_comments_of_a_recipe_are_not_overwritten(fresh: bool, tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "model.gguf", PLAIN_TEMPLATE)
    out = tmp_path / "out"
    out.mkdir()
    kept = {"answers.jsonl": "hours of work", "recipe.toml": "seed = 7\n# Why seven: …\n"}
    for name, text in kept.items():
        (out / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"recipe\.toml has comments"):
        run(recipe.load(None, [f"model={tmp_path / 'model.gguf'}"]), out, fresh=fresh, until="answer")
    assert {path.name: path.read_text("utf-8") for path in out.iterdir() if path.name != ".lock"} == kept


def test_measured_answers_count_for_the_same_weights_and_whatever_changes_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[list[str]] = []

    def measured(*arguments: Any, **_: object) -> measuring.Measured:
        log, finished = arguments[6], len(logged) % 2
        logged.append(list(log.rows))
        log.append({"id": f"vector:{len(logged)}"})
        return measuring.Measured([], {}, [], JudgeRecord(name="any")) if finished else kill()

    model = SimpleNamespace(path=tmp_path / "tiny.gguf", architecture="qwen2", n_layer=3, n_embd=8)
    monkeypatch.setattr(measuring, "measure", measured)
    monkeypatch.setattr(Run, "model", model)
    monkeypatch.setattr(Run, "model_hash", "")
    monkeypatch.setattr(Run, "key", lambda run, stage: stage)
    folder = RunFolder(tmp_path)
    write_json(folder / "effect_check.json", {"vector": {}})

    def measure(strength: float, *changes: str) -> list[str]:
        """Select and write a file; return the rows that the killed measurement and the next begin with."""
        trial = Trial(0, Candidate("vector", "contrast-wrmd", 1.0, 1, 2, strength), "short", 0.0, 1.0)
        tuned = {"trials": [trial.to_row()], "selected": {"vector": 0}, "rank_correlation": None}
        write_json(folder / "tune.json", tuned)
        content = SteeringVector({1: np.full(8, strength, np.float32)}, {"note": str(changes)}, "qwen2")
        control_vector.write(content, tmp_path / "remove.gguf")
        logged.clear()
        values = ["measure.baselines=[]", "judge=keywords", "prompts.validation=4", *changes]
        with open_run(recipe.load(None, values), folder) as one:
            with pytest.raises(KeyboardInterrupt):
                one.stages["measure"].work(one, str(changes))
            one.stages["measure"].work(one, str(changes))
            folder.mark_done("measure", str(changes), 0.0)
        assert logged[1] == list(dict.fromkeys([*logged[0], "vector:1"]))
        return logged[0]

    assert measure(2.0) == []
    first = ["vector:1", "vector:2"]
    assert measure(2.0) == first
    harmless = ["tune.finalists=9", "tune.budget=9", "tune.min_top1=0.1", "answers.check=false"]
    assert measure(2.0, *harmless, "measure.baselines=['md']") == first  # which this folder cannot have
    for change in ("answers.test_tokens=9", "prompts.validation=5", "tune.full_prompts=9"):
        assert measure(2.0, change) == [], change
    assert measure(3.0) == []


def test_reading_activations_of_another_recipe_changes_nothing(tmp_path: Path) -> None:
    """A benchmark on a finished run must not delete its activations."""
    write_tiny_qwen3(tmp_path / "plain.gguf", PLAIN_TEMPLATE, liked=LIKED, seed=2)
    out = tmp_path / "out"
    folder = RunFolder(out)
    store = ActivationStore(out / "activations", "another key")
    store.begin()
    store.append("00000", ["a"], {"activations": np.ones((1, 2, 4), np.float32)})
    folder.mark_done("capture", "another key", 1.0)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    chosen = recipe.load(None, [*SMALL, f"model={tmp_path / 'plain.gguf'}"])
    with open_run(chosen, folder) as one:
        scores = [{"id": p.id, "confidence": 1.0, "category": None} for p in one.prompts["fit"]]
        write_rows(folder / "judgements.jsonl", scores)
        answers = [{**p.to_row(), **Answer([1], "No.", True, False).to_row()} for p in one.prompts["fit"]]
        write_rows(folder / "answers.jsonl", answers)
        with pytest.raises(DamagedStoreError, match="another recipe or model"):
            samples(one)
    assert before.items() <= {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}.items()
