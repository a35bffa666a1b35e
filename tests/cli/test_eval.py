"""`rs-export eval` on a tiny model, against a stand-in for llama-server, and once on the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fixtures import binaries
from fixtures.endpoints import Reply, Server, said, without_proxy_or_key
from fixtures.tiny_gguf import write_tiny_qwen2
from fixtures.tiny_qwen3 import write_tiny_qwen3

from rs_gguf.cli.eval import parse_scales
from rs_gguf.cli.main import main
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Steering, read_last
from rs_gguf.engines.generation import Asking, Sampling
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.errors import InputError
from rs_gguf.evaluation import capability, comparison, sandbox
from rs_gguf.evaluation.paired import drift_of
from rs_gguf.judges import cache
from rs_gguf.judges.local import KeywordJudge
from rs_gguf.prompts import grid as prompts
from rs_gguf.records import rows
from rs_gguf.records.conversation import Answer, Prompt
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

pytestmark = pytest.mark.slow

LAYERS, WIDTH = 4, 32
TOKENS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a vector, an adapter, and prompts in two files."""
    folder = tmp_path_factory.mktemp("eval")
    write_tiny_qwen2(folder / "tiny.gguf", n_layer=LAYERS, n_embd=WIDTH)
    rng = np.random.default_rng(0)
    directions = {layer: rng.standard_normal(WIDTH).astype(np.float32) for layer in (1, 2, 3)}
    control_vector.write(SteeringVector(directions, {}, "qwen2"), folder / "v.gguf")
    control_vector.write(SteeringVector({2: directions[2]}, {}, "qwen2"), folder / "v2.gguf")
    factors = {
        "blk.1.ffn_down.weight": (
            rng.standard_normal((2, 2 * WIDTH)).astype(np.float32),
            rng.standard_normal((WIDTH, 2)).astype(np.float32) / np.float32(4),
        )
    }
    lora.write(LoraAdapter(factors, "qwen2"), folder / "a.gguf")
    (folder / "plain.txt").write_text("the rain\nthe mountain in the rain\non and on\n")
    (folder / "columns.csv").write_text(
        "prompt,language,category\nthe rain,en,weather\nder Regen,de,weather\nthe thing,en,things\n"
    )
    return folder


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_TEXTS", 4)


@pytest.fixture(autouse=True)
def no_judgements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Verdicts are this run's, and none that an earlier one has left in the user's cache."""
    monkeypatch.setattr(cache, "default_path", lambda: tmp_path / "judgements.sqlite3")


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["eval", *arguments])
    return result.exit_code, result.stdout, result.stderr


def evaluate(folder: Path, *arguments: str, prompts: str = "plain.txt") -> dict[str, Any]:
    """What a command writes as JSON; file names are those of `folder`."""
    out = folder / "out.json"
    named = [a.replace("@", f"{folder}/") for a in arguments]
    code, _, stderr = invoke(
        *("--model", str(folder / "tiny.gguf"), "--prompts", str(folder / prompts), "--judge", "keywords"),
        *("--tokens", str(TOKENS), "--json", str(out), *named),
    )
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def steered(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "_TEXTS", 4)
        return evaluate(folder, "--control-vector", "@v.gguf")


def answers(found: dict[str, Any], side: str) -> list[str]:
    return [row[f"answer_{side}"] for row in found["rows"]]


# ---- what comes out --------------------------------------------------------------------------------------


def test_both_sides_are_there_with_intervals(steered: dict[str, Any]) -> None:
    figures = steered["sets"]["plain"]
    assert figures["n"] == 3
    for side in ("unsteered", "steered"):
        low, high = figures[f"ci95_{side}"]
        assert 0 <= low <= figures[f"refusal_{side}"] <= high <= 1
    assert figures["drift"] > 0
    assert 0 <= figures["top1_agreement"] < 1
    assert (
        figures["perplexity_steered"] > figures["perplexity_unsteered"]
    )  # greedy answers were the likeliest
    text = steered["benign_text"]
    assert text["n"] == 4
    assert text["drift"] > 0
    assert text["perplexity_unsteered"] > 1
    speed = steered["tokens_per_second"]
    assert speed["change"] == pytest.approx(speed["steered"] / speed["baseline"] - 1)
    assert steered["judge"] == "keywords"
    assert "capability" not in steered


def test_rows_are_what_the_model_says(folder: Path, steered: dict[str, Any]) -> None:
    """Answers, and drift, by another way: straight from the engine."""
    asked = [Prompt(row["prompt"], "sensitive") for row in steered["rows"]]
    vector = control_vector.read(folder / "v.gguf")
    with LlamaModel(folder / "tiny.gguf") as model:
        tokens = chat_tokens(model, asked)
        plain = dict(model.generate(tokens, max_tokens=TOKENS))
        with model.steered(Steering(vector.directions)):
            moved = dict(model.generate(tokens, max_tokens=TOKENS))
        quiet = [i for i in plain if plain[i].tokens]
        pairs = [(tokens[i], plain[i].tokens) for i in sorted(quiet)]
        before = model.token_logprobs(pairs)
        with model.steered(Steering(vector.directions)):
            expected = drift_of(before, model.token_logprobs(pairs))
    assert answers(steered, "baseline") == [plain[i].text.strip() for i in range(3)]
    assert answers(steered, "steered") == [moved[i].text.strip() for i in range(3)]
    assert steered["sets"]["plain"]["drift"] == pytest.approx(expected.nats, rel=1e-3)
    for i, row in enumerate(steered["rows"]):
        assert row["set"] == "plain"
        assert not {"kind", "split", "tokens_baseline"} & row.keys()
        assert ("truncated" in row["flags_unsteered"]) is not plain[i].finished
        assert ("truncated" in row["flags_steered"]) is not moved[i].finished


def test_vectors_of_two_models_are_told(folder: Path) -> None:
    control_vector.write(SteeringVector({2: np.ones(8, np.float32)}), folder / "other.gguf")
    given = ["--model", folder / "tiny.gguf", "--prompts", folder / "plain.txt", "--judge", "keywords"]
    vectors = ["--control-vector", folder / "v.gguf", "--control-vector", folder / "other.gguf"]
    result = CliRunner().invoke(main, ["eval", *map(str, given + vectors)])
    assert result.exit_code == 2
    assert "32 and 8 wide" in result.stderr


def test_groups_are_those_of_the_file(folder: Path) -> None:
    found = evaluate(folder, "--control-vector", "@v.gguf", prompts="columns.csv")["sets"]["columns"]
    assert {field: {v: f["n"] for v, f in groups.items()} for field, groups in found["by"].items()} == {
        "language": {"de": 1, "en": 2},
        "topic": {"things": 1, "weather": 2},
    }


def test_files_of_the_same_name_stay_apart(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "plain.txt").write_text("the other thing\n")
    found = evaluate(folder, "--prompts", str(other / "plain.txt"))
    assert {name: f["n"] for name, f in found["sets"].items()} == {
        str(folder / "plain.txt"): 3, str(other / "plain.txt"): 1,
    }  # fmt: skip


def test_the_tables_tell_every_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rs_gguf.cli.tables._LEAST_PROMPTS", 1)
    common = ["--model", str(folder / "tiny.gguf"), "--prompts", str(folder / "columns.csv")]
    common += ["--control-vector", str(folder / "v.gguf"), "--judge", "keywords", "--tokens", "4"]
    code, stdout, _ = invoke(*common)
    assert code == 0
    for words in ("columns: 3 prompts", "refused by language", "weather", "loop", "tokens a second", "p = "):
        assert words in stdout
    assert "Judge: keywords." in stdout
    code, stdout, _ = invoke(*common, "--scales", "0,0.5,...,1.5")
    assert code == 0
    first = [line.split()[0] for line in stdout.splitlines() if line.strip()]
    assert [word for word in first if word in ("0", "0.5", "1", "1.5")] == ["0", "0.5", "1", "1.5"] * 2


def test_answers_are_drawn_as_asked_on_both_sides(folder: Path) -> None:
    warm = ("--control-vector", "@v.gguf", "--temperature", "2")
    first, again, other = (evaluate(folder, *warm, "--seed", seed) for seed in ("7", "7", "8"))
    assert (first["temperature"], first["seed"]) == (2.0, 7)
    drawn: dict[str, Any] = {"max_tokens": TOKENS, "sampling": Sampling(temperature=2.0, seed=7)}
    with LlamaModel(folder / "tiny.gguf") as model:
        tokens = chat_tokens(model, [Prompt(row["prompt"], "sensitive") for row in first["rows"]])
        plain = dict(model.generate(tokens, **drawn))
        with model.steered(Steering(control_vector.read(folder / "v.gguf").directions)):
            moved = dict(model.generate(tokens, **drawn))
    for side, expected in (("baseline", plain), ("steered", moved)):
        assert answers(first, side) == answers(again, side) == [expected[i].text.strip() for i in range(3)]
        assert answers(first, side) != answers(other, side)


class Timed:
    """Says each prompt itself, in 2 seconds unsteered and else in 3; notes whose drift is asked for."""

    def __init__(self) -> None:
        self.moved: list[list[str]] = []

    def check(self) -> None: ...

    def answers(
        self, prompts: Sequence[Prompt], factor: float, *_: object
    ) -> tuple[list[Answer], int, float]:
        return [Answer([1], p.prompt, True, False) for p in prompts], 30, 3.0 if factor else 2.0

    def answer_logprobs(self, asked: Sequence[Prompt], *_: object) -> None:
        self.moved.append([p.prompt for p in asked])

    def text_logprobs(self, *_: object) -> None: ...


def test_speeds_are_tokens_a_second_and_drift_is_that_of_answers_that_are_no_refusals() -> None:
    respondent, said = Timed(), ["Paris it is.", "I'm sorry, but I can't."]
    asked = {"set": [Prompt(text, "benign") for text in said]}
    (found,) = comparison.compare(respondent, KeywordJudge(), asked, Asking(None, 8))
    assert found["tokens_per_second"] == {"baseline": 15, "steered": 10, "change": pytest.approx(-1 / 3)}
    assert found["sets"]["set"]["refused_baseline"] == 1
    assert respondent.moved == [said[:1]] * 2


# ---- the steering ----------------------------------------------------------------------------------------


def test_doses_share_one_model_and_one_baseline(
    folder: Path, steered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = LlamaModel.__init__

    def counted(self: LlamaModel, *arguments: Any, **named: Any) -> None:
        loaded.append(arguments)
        original(self, *arguments, **named)

    monkeypatch.setattr(LlamaModel, "__init__", counted)
    found = evaluate(folder, "--control-vector", "@v.gguf:2", "--scales", "0,0.25,0.5")
    assert len(loaded) == 1
    factors = found["factors"]
    assert [factor["scale"] for factor in factors] == [0, 0.25, 0.5]
    drifts = [factor["sets"]["plain"]["drift"] for factor in factors]
    assert drifts[0] == 0 < drifts[1] < drifts[2]
    assert answers(factors[0], "steered") == answers(factors[0], "baseline")
    for factor in factors:
        assert answers(factor, "baseline") == answers(steered, "baseline")
    # Twice the file's scale times one half.
    assert answers(factors[2], "steered") == answers(steered, "steered")
    assert drifts[2] == pytest.approx(steered["sets"]["plain"]["drift"], rel=1e-3)


@pytest.mark.parametrize("arguments", [
    (),
    ("--control-vector", "@v.gguf:0"),
    ("--control-vector", "@v.gguf", "--control-vector", "@v.gguf:-1"),
    ("--lora", "@a.gguf:0"),
])  # fmt: skip
def test_no_steering_changes_nothing(folder: Path, arguments: tuple[str, ...]) -> None:
    found = evaluate(folder, *arguments)
    assert answers(found, "steered") == answers(found, "baseline")
    assert found["sets"]["plain"]["drift"] == pytest.approx(0, abs=1e-6)
    assert found["sets"]["plain"]["mcnemar_p"] == 1


def test_the_range_cuts_the_vector(folder: Path) -> None:
    cut = evaluate(folder, "--control-vector", "@v.gguf", "--layer-range", "2", "2")
    alone = evaluate(folder, "--control-vector", "@v2.gguf")
    assert answers(cut, "steered") == answers(alone, "steered") != answers(cut, "baseline")


def test_an_adapter_is_applied_at_its_scale(folder: Path) -> None:
    found = evaluate(folder, "--lora", "@a.gguf:0.5")
    texts = found["rows"]
    with LlamaModel(folder / "tiny.gguf") as model:
        tokens = chat_tokens(model, [Prompt(row["prompt"], "benign") for row in texts])
        with model.steered(Steering(adapters=[(folder / "a.gguf", 0.5)])):
            expected = dict(model.generate(tokens, max_tokens=TOKENS))
    assert answers(found, "steered") == [expected[i].text.strip() for i in range(3)]
    assert found["sets"]["plain"]["drift"] > 0
    whole = evaluate(folder, "--lora", "@a.gguf", "--scales", "0.5")
    assert answers(whole["factors"][0], "steered") == answers(found, "steered")
    assert found["adapters"] == [f"{folder}/a.gguf:0.5"]


def test_the_system_prompt_is_on_both_sides(folder: Path, steered: dict[str, Any]) -> None:
    found = evaluate(folder, "--control-vector", "@v.gguf", "--system-prompt", "on and on in the rain")
    for side in ("unsteered", "steered"):
        assert answers(found, side) != answers(steered, side)


# ---- capability ------------------------------------------------------------------------------------------


def test_capability_is_paired_and_without_a_sandbox_says_what_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = capability.tasks()
    monkeypatch.setattr(
        capability, "tasks", lambda kinds=capability.SKILLS: [t for t in every if t.kind in kinds][::24]
    )
    monkeypatch.setattr(sandbox, "unavailable", lambda: "no filter here")
    out = folder / "capability.json"
    code, stdout, stderr = invoke(
        *(
            "--model",
            str(folder / "tiny.gguf"),
            "--prompts",
            str(folder / "plain.txt"),
            "--judge",
            "keywords",
        ),
        *("--tokens", "4", "--lora", str(folder / "a.gguf"), "--capability", "--json", str(out)),
    )
    assert code == 0, stderr
    assert "left out: no filter here" in stderr
    assert "all tasks" in stdout
    found = json.loads(out.read_text())["capability"]
    assert list(found) == ["arithmetic", "facts", "format", "all"]
    assert found["all"]["n"] == sum(found[kind]["n"] for kind in ("arithmetic", "facts", "format"))
    assert found["arithmetic"]["accuracy_unsteered"] == 0  # random weights


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--control-vector", "@none.gguf"], "none.gguf"),
        (["--control-vector", "@v.gguf:nan"], "finite"),
        (["--control-vector", "@a.gguf"], "a.gguf"),
        (["--lora", "@none.gguf"], "none.gguf"),
        (["--lora", "@v.gguf"], "no LoRA adapter"),
        (["--lora", "@plain.txt"], "plain.txt"),
        (["--control-vector", "@v.gguf", "--layer-range", "9", "12"], "no vector has a direction"),
        (["--control-vector", "@wide.gguf"], "a vector that was fitted on this model"),
        (["--scales", "0,1"], "neither is given"),
        (["--control-vector", "@v.gguf", "--scales", "0,x"], "'x' is no finite number"),
        (["--temperature", "nan"], "--temperature nan: a finite number"),
        (["--prompts", "@none.csv"], "prompt file not found"),
        (["--model", "http://127.0.0.1:9", "--control-vector", "@v.gguf"], "running server keeps"),
        (["--model", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--judge", "./none.gguf"], "none.gguf"),
        (["--json", "@"], "cannot write"),
        (["--json", "@plain.txt/out.json"], "cannot write"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(folder: Path, arguments: list[str], said: str) -> None:
    wide = SteeringVector({1: np.ones(2 * WIDTH, np.float32)}, {}, "qwen2")
    control_vector.write(wide, folder / "wide.gguf")
    arguments = [a.replace("@", f"{folder}/") for a in arguments]
    common = [
        "--model",
        str(folder / "tiny.gguf"),
        "--prompts",
        str(folder / "plain.txt"),
        "--judge",
        "keywords",
    ]
    code, stdout, stderr = invoke(*common, *arguments)
    assert code == 2, stderr
    assert said in stderr
    assert stderr.count("Error:") == 1
    assert "Traceback" not in stderr
    assert stdout == ""


def test_a_system_prompt_that_the_model_would_not_read_is_told_before_the_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_qwen3(folder / "deaf.gguf", "{{ messages[-1].content }}", n_layer=2)
    monkeypatch.setattr(LlamaModel, "generate", lambda *_, **__: pytest.fail("answered for nothing"))
    code, stdout, stderr = invoke(
        *("--model", str(folder / "deaf.gguf"), "--prompts", str(folder / "plain.txt")),
        *("--judge", "keywords", "--system-prompt", "Be."),
    )
    assert (code, stdout) == (2, "")
    assert "drops the system prompt" in stderr


def test_tables_are_told_before_a_file_that_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        raise InputError("cannot write: No space left")

    monkeypatch.setattr(rows, "write_json", full)
    code, stdout, stderr = invoke(
        *(
            "--model",
            str(folder / "tiny.gguf"),
            "--prompts",
            str(folder / "plain.txt"),
            "--judge",
            "keywords",
        ),
        *("--tokens", "4", "--json", str(folder / "full.json")),
    )
    assert code == 2
    assert "cannot write" in stderr
    assert "plain: 3 prompts" in stdout
    assert "Judge: keywords." in stdout


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("1", [1]),
        ("0, 0.25 ,…,1", [0, 0.25, 0.5, 0.75, 1]),
        ("0,0.1,...,0.3,1", [0, 0.1, 0.2, 0.3, 1]),
        ("1,0,...,-2", [1, 0, -1, -2]),
        ("1,1", [1]),
    ],
)
def test_scales(text: str, factors: list[float]) -> None:
    assert parse_scales(text) == factors


@pytest.mark.parametrize(
    "text", ["", "a", "nan", "0,...,1", "0,1,...", "0,0.3,...,1", "0,0,...,1", "0,1e-9,...,1"]
)
def test_bad_scales(text: str) -> None:
    with pytest.raises(InputError, match="--scales"):
        parse_scales(text)


# ---- a running server ------------------------------------------------------------------------------------


def refuses_below(body: dict[str, Any]) -> Reply:
    """As llama-server where the scale of adapter 1 decides whether it refuses."""
    scales = {entry["id"]: entry["scale"] for entry in body.get("lora", [])}
    return said("Paris it is." if scales.get(1, 0) > 0.4 else "I'm sorry, but I can't.")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    without_proxy_or_key(monkeypatch)
    started = Server(refuses_below, ["m"])
    started.adapters = [
        {"id": 0, "path": "/m/style.gguf", "scale": 0.75},
        {"id": 1, "path": "/m/remove.gguf", "scale": 1.0},
    ]
    yield started
    started.stop()


@pytest.mark.parametrize("path", ["", "/v1", "/v1/#m"])
def test_a_server_is_steered_by_each_requests_scales(server: Server, folder: Path, path: str) -> None:
    found = evaluate(
        folder,
        "--model",
        server.url.removesuffix("/v1") + path,
        "--lora",
        "remove.gguf:0.5",
        "--scales",
        "0.5,1",
        "--system-prompt",
        "Be.",
    )
    weak, full = (factor["sets"]["plain"] for factor in found["factors"])
    assert (weak["refused_baseline"], weak["refused_steered"]) == (3, 3)
    assert (full["refused_baseline"], full["refused_steered"]) == (3, 0)
    assert full["mcnemar_p"] == 0.25
    assert full["drift"] is None is found["factors"][1]["benign_text"]["drift"]
    assert found["factors"][1]["tokens_per_second"]["steered"] > 0
    scales = {tuple((entry["id"], entry["scale"]) for entry in body["lora"]) for body in server.asked}
    # The other adapter keeps what the server was started with, unsteered is said and not left out.
    assert scales == {((0, 0.75), (1, 0.0)), ((0, 0.75), (1, 0.25)), ((0, 0.75), (1, 0.5))}
    assert all(body["messages"][0] == {"role": "system", "content": "Be."} for body in server.asked)
    assert {body["max_tokens"] for body in server.asked[1:]} == {TOKENS}


def test_a_server_draws_answers_and_solves_tasks_greedily(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = capability.tasks(["facts"])[:3]
    monkeypatch.setattr(capability, "runnable", lambda _: (tasks, ""))
    evaluate(
        folder,
        "--model",
        server.url,
        "--lora",
        "remove.gguf",
        "--capability",
        "--temperature",
        "0.8",
        "--seed",
        "3",
    )
    drawn: dict[str, set[tuple[float, int]]] = {"asked": set(), "tasks": set()}
    for body in server.asked[1:]:  # the first reads the weights
        kind = "tasks" if body["messages"][-1]["content"] in {task.prompt for task in tasks} else "asked"
        drawn[kind].add((body["temperature"], body["seed"]))
    assert drawn == {"asked": {(0.8, 3)}, "tasks": {(0.0, 0)}}


def test_an_adapter_that_the_server_lacks_is_told(server: Server, folder: Path) -> None:
    code, _, stderr = invoke(
        *("--model", server.url, "--prompts", str(folder / "plain.txt"), "--judge", "keywords"),
        *("--lora", "other.gguf"),
    )
    assert code == 2
    assert "0 adapters named other.gguf" in stderr
    assert "/m/style.gguf" in stderr


@pytest.mark.real
def test_a_real_llama_server_answers_as_this_process_does(folder: Path, tmp_path: Path) -> None:
    """Three times the same prompts: its cache of one scale must not serve another one."""
    options = ["--model", str(folder / "tiny.gguf"), "--ctx-size", "2048", "--parallel", "2"]
    options += ["--lora-scaled", f"{folder / 'a.gguf'}:0"]
    arguments = ["--lora", "@a.gguf:0.5", "--scales", "1,2"]
    here = evaluate(folder, *arguments)
    with binaries.Server(tmp_path / "log", *options) as running:
        there = evaluate(folder, *arguments, "--model", f"http://{running.address}")
    for mine, its in zip(here["factors"], there["factors"], strict=True):
        for side in ("unsteered", "steered"):
            # The server keeps back a character that is not whole yet.
            assert [a.rstrip("\N{REPLACEMENT CHARACTER}") for a in answers(its, side)] == [
                a.rstrip("\N{REPLACEMENT CHARACTER}") for a in answers(mine, side)
            ]
            assert answers(its, "steered") != answers(its, "baseline")


# ---- the real model --------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_harm_direction_makes_the_real_model_refuse(real_model: Path, tmp_path: Path) -> None:
    grid = prompts.grid(["harmful", "benign"])
    layers = range(10, 16)
    with LlamaModel(real_model) as model:
        means = {}
        for kind in ("harmful", "benign"):
            pool = [p for p in grid if (p.kind, p.split, p.language) == (kind, "fit", "en")]
            fit = prompts.stratified(pool, 40, seed=0)
            means[kind] = read_last(model, chat_tokens(model, fit), layers)["l_out"].mean(axis=0)
        moves = dict(zip(layers, means["harmful"] - means["benign"], strict=True))
        control_vector.write(SteeringVector(moves, {}, model.architecture), tmp_path / "induce.gguf")
    asked = [
        "Name three rivers in Europe.",
        "What does a glazier do?",
        "How do I boil an egg?",
        "What is 12 times 12?",
    ]
    (tmp_path / "asked.txt").write_text("\n".join(asked))
    code, _, stderr = invoke(
        *("--model", str(real_model), "--prompts", str(tmp_path / "asked.txt"), "--tokens", "16"),
        *("--control-vector", str(tmp_path / "induce.gguf"), "--scales", "0.05,1"),
        *("--json", str(tmp_path / "out.json")),
    )
    assert code == 0, stderr
    weak, full = json.loads((tmp_path / "out.json").read_text())["factors"]
    # Measured: 4 of 4 steered, in so many words, from 0.8 of the difference to 1.4.
    assert weak["sets"]["asked"]["refused_baseline"] <= 1
    assert full["sets"]["asked"]["refused_steered"] == 4
    assert weak["benign_text"]["drift"] < full["benign_text"]["drift"]
    assert weak["benign_text"]["perplexity_steered"] < full["benign_text"]["perplexity_steered"]
