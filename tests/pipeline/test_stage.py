"""Test every stage: its files, its place in the table, and the key of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from fixtures.endpoints import Server, without_proxy_or_key
from fixtures.tiny_qwen3 import write_tiny_qwen3
from fixtures.tiny_run import LIKED, PLAIN_TEMPLATE, SMALL, Judge

from rs_gguf.models import resolve as models
from rs_gguf.pipeline import recipe
from rs_gguf.pipeline.costs import Costs
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.run import open_run, run
from rs_gguf.pipeline.stage import Run, Silent, Stage
from rs_gguf.pipeline.stages import IN_ORDER, answers
from rs_gguf.records.artefacts import RESULTS, STAGES, StageInfo

pytestmark = pytest.mark.slow

BY_NAME = pytest.mark.parametrize("stage", IN_ORDER, ids=lambda stage: stage.info.name)


# ---- the protocol ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Return the names that each stage of a tiny run added to the run folder; folders end with a slash."""
    folder = tmp_path_factory.mktemp("stages")
    judge = Judge()
    server = Server(judge, ["judge"])
    with pytest.MonkeyPatch.context() as patch:
        without_proxy_or_key(patch)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_tiny_qwen3(folder / "plain.gguf", PLAIN_TEMPLATE, liked=LIKED, seed=2)
        values = [
            *SMALL,
            "prompts.fit=8",
            "prompts.tune=4",
            "answers.fit_tokens=8",
            "answers.tokens=8",
            "answers.test_tokens=8",
        ]
        values += ["tune.logprob_trials=1", "tune.full_prompts=0", "measure.baselines=['ablation']"]
        values += [f"model={folder / 'plain.gguf'}", f"judge={server.url}"]
        chosen = recipe.load(None, values)
        added: dict[str, set[str]] = {}
        before = {".lock", "recipe.toml", "state.json"}
        for name in STAGES:
            run(chosen, folder / "out", until=name)
            after = {path.name + "/" * path.is_dir() for path in (folder / "out").iterdir()}
            added[name], before = after - before, before | after
    server.stop()
    return added


def test_the_stages_are_those_of_the_table_in_its_order() -> None:
    assert [stage.info for stage in IN_ORDER] == list(STAGES.values())
    shared = [stage.shared for stage in IN_ORDER]
    # Rank 0 releases the other ranks once, after the last shared stage.
    assert [info.info.name for info, is_shared in zip(IN_ORDER, shared, strict=True) if is_shared] == [
        "capture", "fit",
    ]  # fmt: skip


@BY_NAME
def test_a_stage_writes_the_files_that_it_declares(stage: Stage, left: dict[str, set[str]]) -> None:
    names, patterns = left[stage.info.name], stage.info.artefacts
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)} == set()
    unused = {pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)}
    assert unused <= {"activations-refit/"}  # only a killed refit leaves it


@BY_NAME
def test_after_a_stage_is_forgotten_only_results_are_left(stage: Stage, tmp_path: Path) -> None:
    folder, kept = RunFolder(tmp_path), []
    for pattern in stage.info.artefacts:
        path = tmp_path / pattern.replace("*", "any").rstrip("/")
        if pattern.endswith("/"):
            path.mkdir()
            (path / "file").touch()
        else:
            path.touch()
            path.with_name(f"{path.name}.part").touch()
        if pattern in RESULTS:
            kept += [path, path.with_name(f"{path.name}.part")]
    folder.mark_done(stage.info.name, "key", 1.0)
    folder.forget_all()
    assert sorted(tmp_path.iterdir()) == sorted(kept)


class Fake(Stage):
    """A stage that notes its key."""

    def __init__(self, name: str, ran: list[str]) -> None:
        self.info, self._ran = StageInfo(name, "", "", ()), ran
        self.recipe = "a"

    def inputs(self, run: Run) -> list[Any]:
        return [self.recipe]

    def cost(self, costs: Costs) -> None:
        return None

    def work(self, run: Run, key: str) -> None:
        self._ran.append(f"{self.info.name} of {self.recipe}")
        if self.recipe == "b":
            raise KeyboardInterrupt


def test_files_of_later_stages_are_not_valid_once_a_stage_begins_again(tmp_path: Path) -> None:
    ran: list[str] = []
    stages = [Fake(name, ran) for name in ("tune", "write", "measure")]
    one = Run(recipe.load(), RunFolder(tmp_path), Silent(), stages=stages)
    for name in one.stages:
        one.do(name)
    stages[0].recipe = "b"
    with pytest.raises(KeyboardInterrupt):
        one.do("tune")  # tune.json may belong to b now
    stages[0].recipe = "a"
    ran.clear()
    for name in one.stages:
        one.do(name)
    assert ran == [f"{name} of a" for name in one.stages]


# ---- keys --------------------------------------------------------------------------------------------


def keys(folder: Path, *values: str, stages: Sequence[str] = ("answer", "score")) -> list[str]:
    with open_run(recipe.load(None, list(values)), RunFolder(folder)) as one:
        return [one.key(stage) for stage in stages]


def test_the_keys_of_answers_and_scores_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders with hours of answers stay valid, except with a new version."""
    monkeypatch.setattr(answers, "__version__", "0.1.0")
    monkeypatch.setattr(answers, "shipped_version", lambda: "logprob")
    (tmp_path / "model.gguf").write_text("model")
    (tmp_path / "answers.jsonl").write_text("{}\n")
    values = [f"model={tmp_path / 'model.gguf'}", "judge=keywords"]
    for kind in ("sensitive", "harmful", "benign"):
        path = tmp_path / f"{kind}.jsonl"
        rows = [
            f'{{"prompt": "{kind} {split}", "split": "{split}"}}' for split in ("fit", "tune", "validation")
        ]
        path.write_text("\n".join(rows))
        values.append(f"prompts.{kind}=['{path}']")
    assert keys(tmp_path, *values) == ["563e5058ca05e0ce", "cb700e89092a8da2"]


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one.gguf", "other.gguf")):
        write_tiny_qwen3(folder / name, PLAIN_TEMPLATE, n_layer=1, seed=seed)
    return folder


@pytest.mark.parametrize(
    ("changed", "stage"),
    [
        ("model=@other.gguf", "answer"),
        ("seed=1", "answer"),
        ("answers.fit_tokens=40", "answer"),
        ("answers.tokens=40", "answer"),
        ("answers.temperature=1.0", "answer"),
        ("prompts.system=Be kind.", "answer"),
        ("engine.cache_type_k=q8_0", "answer"),
        ("engine.flash_attn=off", "answer"),
        ("prompts.fit=24", "answer"),
        ("prompts.tune=24", "answer"),
        ("prompts.gate_only=8", "capture"),
        ("effect=induce", "fit"),
        ("fit.ridges=[1.0]", "fit"),
        ("fit.gate_ridges=[1.0]", "fit"),
        ("fit.estimators=['md']", "fit"),
        ("tune.logprob_trials=9", "tune"),
        ("tune.min_retention=0.5", "tune"),
        ("answers.test_tokens=32", "tune"),
        ("answers.test_tokens=32", "measure"),
        ("tune.min_top1=0.8", "measure"),
        ("measure.baselines=[]", "measure"),
        ("prompts.validation=5", "measure"),
    ],
)
def test_each_choice_changes_keys_from_the_first_stage_that_depends_on_it(
    changed: str, stage: str, two_models: Path, tmp_path: Path
) -> None:
    # With all prompts, a seed changes no sample; without full prompts, the search ignores test_tokens.
    alike = {"answer": ["prompts.fit=9999", "prompts.tune=9999"], "measure": ["tune.full_prompts=0"]}
    before = [f"model={two_models / 'one.gguf'}", "judge=keywords", *alike.get(stage, [])]
    after = [*before, changed.replace("@", f"{two_models}/")]
    one, other = (keys(tmp_path, *values, stages=tuple(STAGES)) for values in (before, after))
    assert next(name for name, a, b in zip(STAGES, one, other, strict=True) if a != b) == stage


def test_a_limit_that_the_search_does_not_use_is_no_input_of_it(tmp_path: Path) -> None:
    found = []
    for limit in (0.9, 0.8):
        with open_run(recipe.load(None, [f"tune.min_top1={limit}"]), RunFolder(tmp_path)) as one:
            found.append([one.stages[stage].inputs(one) for stage in ("tune", "measure")])
    (tune, measure), (other_tune, other_measure) = found
    assert tune == other_tune
    assert measure != other_measure


def test_settings_that_change_no_result_change_no_key(two_models: Path, tmp_path: Path) -> None:
    values = [f"model={two_models / 'one.gguf'}", "judge=keywords"]
    sizes = ["threads=2", "ctx_size=512", "batch_size=64", "flash_attn=auto"]
    gpus = ["gpu_layers=2", "split_mode=row", "tensor_split=3,1", "main_gpu=1"]
    others = [*values, *(f"engine.{value}" for value in (*sizes, *gpus))]
    one, other = (keys(tmp_path, *both, stages=tuple(STAGES)) for both in (values, others))
    assert one == other


@pytest.mark.parametrize("how", ["", "labels:", "votes:"])
def test_the_key_of_judgements_depends_on_answers_and_judge(how: str, tmp_path: Path) -> None:
    for name in ("model.gguf", "judge.gguf", "answers.jsonl"):
        (tmp_path / name).write_text("one")
    values = [f"model={tmp_path / 'model.gguf'}", f"judge={how}{tmp_path / 'judge.gguf'}"]
    answered, scored = keys(tmp_path, *values)
    assert keys(tmp_path, *values) == [answered, scored]
    for name in ("judge.gguf", "answers.jsonl"):
        (tmp_path / name).write_text("another")
        again = keys(tmp_path, *values)
        assert again[0] == answered
        assert again[1] != scored
        (tmp_path / name).write_text("one")


def test_a_key_reads_no_file_of_later_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def fingerprint(path: Path) -> str:
        read.append(path.name)
        return path.name

    monkeypatch.setattr(models, "fingerprint", fingerprint)
    for name in ("model.gguf", "judge.gguf"):
        (tmp_path / name).write_text("")
    values = [f"model={tmp_path / 'model.gguf'}", f"judge={tmp_path / 'judge.gguf'}"]
    with open_run(recipe.load(None, values), RunFolder(tmp_path)) as one:
        one.key("answer")
        assert read == ["model.gguf"]
        one.key("score")
    assert read == ["model.gguf", "judge.gguf"]
