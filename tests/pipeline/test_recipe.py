"""Test the recipe: order of sources, errors for typos, and a dump that loads as the same recipe."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import optuna
import pytest

from rs_gguf.engines.settings import EngineSettings
from rs_gguf.errors import InputError
from rs_gguf.estimators import ESTIMATORS
from rs_gguf.models import resolve as models
from rs_gguf.pipeline.recipe import Recipe, dump, load


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("RS_GGUF_"):
            monkeypatch.delenv(name)


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_a_whole_recipe() -> None:
    recipe = load()
    assert recipe.model == models.DEFAULT
    assert recipe.seed == 0
    assert recipe.prompts.sensitive == []
    assert recipe == Recipe()


def test_options_win_over_the_environment_over_the_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(tmp_path, "seed = 1\n[tune]\ntrials = 2\nfinalists = 2\nmin_retention = 0.5\n")
    assert (load(path).seed, load(path).tune.logprob_trials) == (1, 2)
    monkeypatch.setenv("RS_GGUF_TUNE__LOGPROB_TRIALS", "5")
    monkeypatch.setenv("rs_gguf_tune__finalists", "6")  # pydantic-settings ignores case
    recipe = load(path, ["tune.logprob_trials=7"])
    assert recipe.tune.logprob_trials == 7
    assert recipe.tune.finalists == 6
    assert recipe.tune.min_retention == 0.5
    assert recipe.tune.max_benign_drift == Recipe().tune.max_benign_drift
    assert load(path).tune.logprob_trials == 5


def test_nothing_is_read_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_file(tmp_path, "seed = 9\n")
    (tmp_path / ".env").write_text("RS_GGUF_SEED=9\n")
    monkeypatch.chdir(tmp_path)
    assert load().seed == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sead = 1", "sead"),
        ("[tune]\ntrails = 1", "tune.trails"),
        ("[tunes]\ntrials = 1", "tunes"),
    ],
)
def test_a_typo_in_the_file_is_an_error(tmp_path: Path, text: str, named: str) -> None:
    path = recipe_file(tmp_path, text)
    with pytest.raises(InputError, match=rf"recipe\.toml is not valid: {named}: Extra inputs"):
        load(path)


def test_a_typo_in_an_option_is_an_error() -> None:
    with pytest.raises(InputError, match=r"tune\.trails: Extra inputs .*given: 8"):
        load(None, ["tune.trails=8"])


@pytest.mark.parametrize(
    "name", ["RS_GGUF_TUNE__TRAILS", "RS_GGUF_TUNE_TRIALS", "RS_GGUF_SEAD", "rs_gguf_sead"]
)
def test_a_typo_in_the_environment_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "8")
    with pytest.raises(InputError, match=r"(?i)trails|tune_trials|sead"):
        load()


def test_variables_of_the_kernel_do_not_belong_to_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_GGUF_KERNEL", "scalar")
    assert load() == Recipe()


def test_all_faults_come_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe_file(tmp_path, "seed = -1\nsead = 1\n[fit]\nridges = [1.0, -1.0]\n")
    monkeypatch.setenv("RS_GGUF_ANSWERS__PARALLEL", "many")
    with pytest.raises(InputError) as error:
        load(path, ["tune.min_retention=1.5"])
    message = str(error.value)
    for fault in ("seed: ", "sead: ", "fit.ridges.1: ", "answers.parallel: ", "tune.min_retention: "):
        assert fault in message
    for given in ("-1", "-1.0", "'many'", "1.5"):
        assert f"given: {given}" in message


@pytest.mark.parametrize(
    "override", ["fit.ridges=[0.0]", "fit.ridges=[nan]", "fit.ridges=[inf]", "fit.ridges=[]",
                 "answers.temperature=inf", "tune.max_benign_drift=0", "prompts.fit=1", "tune.budget=-1",
                 "tune.budget=2 days", "tune.budget=inf", "measure.baselines=['steering']",
                 "seed=4294967296", "answers.parallel=256", "engine.threads=513", "engine.cache_type_k=f8",
                 "engine.flash_attn=maybe", "engine.gpu_layers=most", "engine.ctx_size=0"],
)  # fmt: skip
def test_values_that_cannot_work_are_errors(override: str) -> None:
    with pytest.raises(InputError, match=override.split("=")[0].replace(".", r"\.")):
        load(None, [override])


def test_a_file_that_is_missing_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="recipe not found"):
        load(tmp_path / "absent.toml")
    with pytest.raises(InputError, match="recipe not found"):
        load(tmp_path)
    with pytest.raises(InputError, match="not valid TOML"):
        load(recipe_file(tmp_path, "seed = = 1"))
    (tmp_path / "latin.toml").write_bytes('model = "Müller"'.encode("latin-1"))
    with pytest.raises(InputError, match="not valid TOML"):
        load(tmp_path / "latin.toml")


def test_a_variable_of_a_section_that_is_not_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_GGUF_FIT", "{oops")
    with pytest.raises(InputError, match="fit"):
        load()


@pytest.mark.parametrize(
    ("override", "get"),
    [
        ("tune.logprob_trials=8", lambda r: r.tune.logprob_trials == 8),
        (" tune.logprob_trials = 8 ", lambda r: r.tune.logprob_trials == 8),
        ("model=out/my model.gguf", lambda r: r.model == "out/my model.gguf"),
        ('model="12"', lambda r: r.model == "12"),
        ("model=a=b.gguf", lambda r: r.model == "a=b.gguf"),
        ("prompts.system=Answer, in one word.", lambda r: r.prompts.system == "Answer, in one word."),
        ("prompts.system=", lambda r: r.prompts.system == ""),
        ('prompts.system="two\\nlines"', lambda r: r.prompts.system == "two\nlines"),
        ('prompts.benign=["a.csv", "b.txt"]', lambda r: r.prompts.benign == [Path("a.csv"), Path("b.txt")]),
        ('fit.estimators=["wrmd"]', lambda r: r.fit.estimators == ["wrmd"]),
        ("fit={ridges = [2]}", lambda r: r.fit.ridges == [2.0]),
        ("engine.gpu_layers=20", lambda r: r.engine.gpu_layers == "20"),
        ("engine.tensor_split=3,1", lambda r: r.engine.shares == [3.0, 1.0]),
        ("engine.tensor_split=", lambda r: r.engine.shares == []),
    ],
)  # fmt: skip
def test_set_takes_toml_values_and_plain_text(override: str, get: object) -> None:
    assert callable(get)
    assert get(load(None, [override]))


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1.5 h", 5400), ("45s", 45), ("0", 0), ('"600"', 600)],
)
def test_a_budget_is_a_time(given: str, seconds: float, tmp_path: Path) -> None:
    recipe = load(None, [f"tune.budget={given}"])
    assert recipe.tune.budget == seconds
    dump(recipe, tmp_path / "recipe.toml")
    assert load(tmp_path / "recipe.toml") == recipe
    assert load().tune.budget is None


def test_engine_settings_are_a_table_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe_file(tmp_path, '[engine]\ngpu_layers = 20\nthreads = 2\ncache_type_v = "q8_0"\n')
    monkeypatch.setenv("RS_GGUF_ENGINE__THREADS", "3")
    monkeypatch.setenv("RS_GGUF_ENGINE__GPU_LAYERS", "all")
    recipe = load(path, ["engine.tensor_split=3,1"])
    expected = EngineSettings(gpu_layers="all", threads=3, cache_type_v="q8_0", tensor_split="3,1")
    assert recipe.engine == expected
    dump(recipe, tmp_path / "resolved.toml")
    assert load(tmp_path / "resolved.toml") == recipe
    with pytest.raises(InputError, match="engine: a cache_type_v of q8_0 needs flash attention"):
        load(path, ["engine.flash_attn=off"])


@pytest.mark.parametrize(
    ("overrides", "budget"),
    [
        (["tune.budget=none"], None),
        (["tune.budget="], None),
        (["tune.logprob_trials=60"], None),  # with a budget, it would have no effect
        (["tune.finalists=6"], None),
        (["tune.logprob_trials=60", "tune.budget=1h"], 3600),
        (["tune.full_prompts=32"], 7200),
    ],
)
def test_a_kept_budget_ends(overrides: list[str], budget: float | None, tmp_path: Path) -> None:
    dump(load(None, ["tune.budget=2h"]), tmp_path / "recipe.toml")
    assert load(tmp_path / "recipe.toml", overrides).tune.budget == budget


@pytest.mark.parametrize(
    "override",
    ["model=a\udcff.gguf", "prompts.benign=['a\udcff.csv']", 'prompts.system="\ud83d"', "judge=\udcff"],
)
def test_text_that_is_not_utf_8_is_refused(override: str) -> None:
    """Python represents bytes of an argument that are not UTF-8 as halves of surrogate pairs."""
    with pytest.raises(InputError, match=r"^recipe: .*[\udcff\ud83d].* is not UTF-8"):
        load(None, [override])


def test_variables_that_are_not_utf_8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RS_GGUF_MODEL", "a\udcff.gguf")
    with pytest.raises(InputError, match="is not UTF-8"):
        load()


def test_every_generator_accepts_the_largest_seed() -> None:
    seed = load(None, ["seed=4294967294"]).seed
    optuna.samplers.TPESampler(seed=seed)
    np.random.default_rng((seed, 0))


def test_the_last_of_two_overrides_wins() -> None:
    assert load(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["tune.logprob_trials", "", "=3", " = 3"])
def test_set_without_a_key_or_a_value(override: str) -> None:
    with pytest.raises(InputError, match=r"expected KEY=VALUE, for example tune\.logprob_trials=8"):
        load(None, [override])


def test_set_of_a_value_and_of_a_part_of_it() -> None:
    with pytest.raises(InputError, match="tune was set to a value, so it has no logprob_trials"):
        load(None, ["tune=3", "tune.logprob_trials=8"])


def test_a_dump_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load(
        None,
        [
            "seed=3",
            'model=folder/"quoted" 模型.gguf',
            "judge=judge.gguf",
            'prompts.system="line\\nbreak and \\"quotes\\""',
            'prompts.harmful=["harm.csv"]',
            "fit.ridges=[1e-3, 0.1]",
            "answers.temperature=0.6",
        ],
    )
    dump(recipe, tmp_path / "out" / "recipe.toml")
    again = load(tmp_path / "out" / "recipe.toml")
    assert again == recipe
    assert again != load()
    dump(again, tmp_path / "again.toml")
    assert (tmp_path / "again.toml").read_bytes() == (tmp_path / "out" / "recipe.toml").read_bytes()


def test_a_dump_spells_out_every_default(tmp_path: Path) -> None:
    dump(load(), tmp_path / "recipe.toml")
    text = (tmp_path / "recipe.toml").read_text(encoding="utf-8")
    optional = {"judge", "judge_second", "system", "budget", "servers"}  # None is left out: TOML has no null
    for name in Recipe.model_fields:
        section = getattr(Recipe(), name)
        keys = type(section).model_fields if hasattr(type(section), "model_fields") else [name]
        assert all(f"{key} = " in text for key in keys if key not in optional)


def test_by_default_every_estimator_and_the_papers_own_baselines_are_tried() -> None:
    assert set(load().estimators) == set(ESTIMATORS)
    assert (
        {"rmd", "wrmd", "wrmd-uncentred"} <= set(load(None, ["effect=induce"]).estimators) <= set(ESTIMATORS)
    )
    assert load().tune.logprob_trials >= len(load().estimators)
    assert load().measure.baselines == ["system-prompt", "rmd", "wrmd"]


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load(None, ["seed=4"])
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 5
    with pytest.raises(ValueError, match="frozen"):
        recipe.tune.logprob_trials = 5


@pytest.mark.parametrize("judge", [[], ["judge=labels:other.gguf"]])
def test_the_second_judge_is_another_one(judge: list[str]) -> None:
    first = judge[0].removeprefix("judge=") if judge else "qwen2.5-coder-0.5b"
    with pytest.raises(InputError, match=f"{first} is the first judge already; name another model"):
        load(overrides=[*judge, f"judge_second={first}"])
    assert load(overrides=[*judge, "judge_second=qwen2.5-coder-1.5b"]).judge_second
