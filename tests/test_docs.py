"""What the documents tell people to type is what the program takes: commands, recipes, links, Python."""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from fixtures import binaries
from fixtures.endpoints import Reply, Server, entry, said, without_proxy_or_key
from fixtures.tiny_gguf import write_tiny_qwen2
from markdown_it import MarkdownIt

from rs_gguf.activations.capture import captured
from rs_gguf.activations.store import ActivationStore
from rs_gguf.cli.eval import parse_scales
from rs_gguf.cli.main import main
from rs_gguf.estimators.estimator import WeightedRidgeMeanDifference
from rs_gguf.models import catalogue
from rs_gguf.models import resolve as models
from rs_gguf.pipeline import recipe
from rs_gguf.prompts import grid as prompts
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.files import sha256
from rs_gguf.steering import lora_file as lora
from rs_gguf.steering import vector_file as control_vector
from rs_gguf.steering.formats import glp
from rs_gguf.steering.formats.glp import Projection
from rs_gguf.steering.lora import LoraAdapter
from rs_gguf.steering.vector import SteeringVector

ROOT = Path(__file__).parents[1]
VECTORS = "vectors/README.md"  # a page of the site, too
DOCUMENTS = sorted(
    [*(ROOT / name for name in ("README.md", "CHANGELOG.md", VECTORS)), *(ROOT / "docs").rglob("*.md")]
)

_WIDTH, _ARCHITECTURE = 32, "qwen2"  # of the tiny model
_ROW = json.dumps({"prompt": "What is a republic?", "answer": "A state without a monarch."}) + "\n"


@dataclass(frozen=True)
class Block:
    """A fenced block, `where` it begins, in which language, and its text."""

    where: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    for path in DOCUMENTS:
        for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
            if token.type == "fence" and token.map:
                where = f"{path.relative_to(ROOT)}:{token.map[0] + 1}"
                yield Block(where, token.info.split(" ")[0], token.content)


@dataclass(frozen=True)
class Command:
    """A simple command of a block of shell lines: the program, its arguments, and where the block begins."""

    where: str
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where} {shlex.join([self.program, *self.arguments])}"


def commands() -> Iterator[Command]:
    """Every simple command of every block of shell lines, as the shell would split it."""
    for block in blocks():
        if block.language not in ("sh", "bash", "shell", "console"):
            continue
        text = block.text.replace("\\\n", " ")
        inner = re.findall(r"\$\(([^)]*)\)", text)
        for part in [re.sub(r"\$\([^)]*\)", "model.gguf", text), *inner]:
            for words in simple_commands(part):
                while re.match(r"[A-Z_]+=", words[0]):  # of the environment
                    words = words[1:]
                yield Command(block.where, words[0], tuple(words[1:]))


def simple_commands(text: str) -> list[list[str]]:
    """The simple commands of a text: cut at line ends, pipes and separators; no redirections, no comments."""
    lexer = shlex.shlex(re.sub(r"(?m)(^|\s)# .*", r"\1", text), posix=True, punctuation_chars="|;&<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = (
        " \t",
        True,
        "",
    )  # a # in a word is no comment
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if set(word) <= set("|;&\n"):
            found.append([])
        elif set(word) <= set("<>"):
            skip = True
        elif skip:
            skip = False
        else:
            found[-1].append(word)
    return [words for words in found if words]


ALL = list(commands())
OURS = [command for command in ALL if command.program == "rs-export"]


def parse(arguments: list[str]) -> click.Context:
    """The context of the command that the arguments call; click's own error where they do not fit."""
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *arguments = arguments
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    context = command.make_context(name, arguments)
    if name == "eval":  # click knows no alternatives
        assert bool(context.params["files"]) != bool(context.params["suites"])
    return context


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("RS_GGUF_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("command", OURS, ids=str)
def test_every_command_is_one_that_the_program_takes(command: Command) -> None:
    with parse(list(command.arguments)) as context:
        # These are read when a command starts; a recipe file of one's own is not there to be read.
        recipe.load(None, context.params.get("overrides", ()))
        if scales := context.params.get("scales"):
            parse_scales(scales)


def test_the_check_of_commands_can_fail() -> None:
    for wrong in (["run", "--fit"], ["runn"], ["eval", "--model", "m.gguf"], ["check"]):
        with pytest.raises((click.UsageError, AssertionError)):
            parse(wrong)
    assert len(OURS) > 20
    assert simple_commands("K=1 a 'b\nc' | d#e --f < g > h  # i") == [["K=1", "a", "b\nc"], ["d#e", "--f"]]
    assert simple_commands("a\n\n# b\nc; d") == [["a"], ["c"], ["d"]]


def inline_code() -> Iterator[tuple[str, str]]:
    for path in DOCUMENTS:
        for token in MarkdownIt().enable("table").parse(path.read_text(encoding="utf-8")):
            for child in token.children or ():
                if child.type == "code_inline":
                    yield str(path.relative_to(ROOT)), " ".join(child.content.split())


def test_options_and_keys_in_running_text_exist() -> None:
    values = recipe.Recipe().model_dump()
    sections = {name: inside.keys() for name, inside in values.items() if isinstance(inside, dict)}
    for where, code in inline_code():
        section, _, key = code.partition("=")[0].partition(".")
        if section in sections and re.fullmatch(r"(?!jsonl?$)\w+", key):
            assert key in sections[section], f"{where}: {code}"
        if code.startswith("rs-export "):
            command: click.Command = main
            words = code.split()[1:]
            while isinstance(command, click.Group) and words and not words[0].startswith("-"):
                name = words.pop(0).rstrip(",")
                assert name in command.commands or name.isupper() or name == "…", f"{where}: {code}"
                command = command.commands.get(name, click.Command(name))
            options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            for word in re.findall(r"(?<!\S)--[\w-]+", " ".join(words)):
                assert word in options, f"{where}: {code}"


# ---- for real ----------------------------------------------------------------------------------------

# Programs that no test starts, and why. All others of the documents are run below.
LEFT_OUT = {
    "make": "installs everything and runs this very suite",
    "python3": "makes the virtual environment that pip installs into",
    ".": "activates it",
    "pip": "fetches and compiles packages for minutes",
    "torchrun": "shares a whole run between processes, as a test on the real model does",
    "vllm": "needs GPUs, and is marked as untested",
    "lm_eval": "is installed by `make capability`, and takes most tasks from a hub",
    "inspect": "is installed by `make capability`, and takes most tasks from a hub",
    "llama-cli": "waits for a person who types",
    "python": "starts text-generation-webui, which is marked as untested",
    "koboldcpp": "is marked as untested",
    "ollama": "is marked as untested",
    "lms": "is marked as untested",
}
SERVER = "llama-server"
RUN = ("rs-export", "cat", "grep", "curl", SERVER, "llama-completion")

# What a run costs is cut to the least that a recipe may ask for.
_SMALL = (
    "prompts.fit=8", "prompts.gate_only=8", "prompts.tune=8", "prompts.validation=4",
    "answers.check=false",  # random weights answer no question
    "answers.fit_tokens=8", "answers.tokens=8",
    "answers.test_tokens=8", "fit.estimators=['md']", "fit.ridges=[1.0]", "fit.gate_ridges=[1.0]",
    "tune.logprob_trials=1", "tune.finalists=1", "tune.full_prompts=2",
    "measure.baselines=['system-prompt']",
)  # fmt: skip
_PROMPT_FILE = re.compile(r"[\w./-]+\.(?:jsonl|csv|txt)")
_OUTPUTS = ("--output", "--json", "--out")


def test_every_program_is_run_or_has_a_reason() -> None:
    programs = {command.program for command in ALL}
    assert programs <= {*RUN, *LEFT_OUT}
    assert set(LEFT_OUT) <= programs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and, under every name that a document gives one, a file made for it."""
    folder = tmp_path_factory.mktemp("docs")
    write_tiny_qwen2(folder / "model.gguf", n_embd=_WIDTH).config.save_pretrained(folder)
    for command in ALL:
        if command.program not in (*LEFT_OUT, "curl"):
            for option, word in itertools.pairwise(("", *command.arguments)):
                _make(folder, option, word)
    return folder


def _make(folder: Path, option: str, word: str) -> None:
    """The files that an argument names, unless the command is to write them."""
    names_model = word.startswith("model=")
    word = word.removeprefix("model=") if option == "--set" else re.sub(r":[\d.-]+$", "", word)
    path = folder / word
    if "://" in word or option in _OUTPUTS or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if names_model and not path.suffix:
        path.mkdir()
        shutil.copy(folder / "config.json", path)
    direction = np.linspace(-1, 1, _WIDTH, dtype=np.float32)
    if option in ("--model", "-m", "--set") and path.suffix == ".gguf":
        path.write_bytes((folder / "model.gguf").read_bytes())
    elif path.name.startswith(("glp", "ablation")):
        unit = SteeringVector({1: direction / np.linalg.norm(direction)}, {}, _ARCHITECTURE)
        projection = folder / "glp.gguf"
        glp.write(Projection(unit, 1.0, "residual_stream_post_layer"), projection)
        lora.write(glp.to_adapter(projection, folder / "model.gguf")[0], folder / "ablation-adapter.gguf")
    elif path.suffix == ".gguf" and "adapter" in path.name:
        row = direction / np.float32(8)
        factors = (row[np.newaxis], row[:, np.newaxis])
        lora.write(LoraAdapter({"blk.1.attn_output.weight": factors}, _ARCHITECTURE), path)
    elif path.suffix == ".gguf":
        control_vector.write(SteeringVector({1: direction}, architecture=_ARCHITECTURE), path)
    elif path.suffix == ".toml":
        path.touch()  # a recipe of defaults
    for name in _PROMPT_FILE.findall(word):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(_rows(name), encoding="utf-8")


def _rows(name: str) -> str:
    if name.endswith(("answers.jsonl", "judgements.jsonl")):
        return _ROW
    if name.endswith("judge_pairs.jsonl"):
        pairs = resources.files("rs_gguf") / "data" / "judge_pairs.jsonl"
        lines = pairs.read_text(encoding="utf-8").splitlines()
        return "\n".join([line for line in lines if json.loads(line)["split"] == "test"][:40])
    # Enough for each split, which a prompt's hash draws.
    texts = [f"What is republic number {k} of {name}?" for k in range(60)]
    if name.endswith(".jsonl"):
        return "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    return "\n".join(["prompt", *texts] if name.endswith(".csv") else texts) + "\n"


@pytest.fixture
def desk(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as the place to work in, the tiny model in it also being two of the catalogue."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("XDG_CACHE_HOME", str(files / "cache"))
    models_here = files / "cache" / "models"
    monkeypatch.setattr(catalogue, "cache_folder", lambda: models_here)  # not all systems heed the variable
    without_proxy_or_key(monkeypatch)
    model = files / "model.gguf"
    for name in (models.DEFAULT, "qwen2.5-coder-1.5b"):
        pinned = replace(models.CATALOGUE[name], size=model.stat().st_size, sha256=sha256(model))
        monkeypatch.setitem(models.CATALOGUE, name, pinned)
        pinned.path.parent.mkdir(parents=True, exist_ok=True)
        pinned.path.write_bytes(model.read_bytes())
    return files


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    """The address of a judge by which harm is refused, everyday requests are not, the rest by chance."""
    of_kind = {kind: [p.prompt for p in prompts.grid([kind])] for kind in ("harmful", "benign")}

    def judge_answers(body: dict[str, Any]) -> Reply:
        text = body["messages"][-1]["content"]
        harmful, benign = (any(prompt in text for prompt in of_kind[kind]) for kind in ("harmful", "benign"))
        refused = harmful or (not benign and zlib.crc32(text.encode()) % 2 == 0)
        top = {"refusal": math.log(0.9 if refused else 0.1), "answer": math.log(0.1 if refused else 0.9)}
        return said("refusal", [entry("refusal", top["refusal"], top)])

    server = Server(judge_answers, ["judge"])
    yield server.url
    server.stop()


def runnable(arguments: Sequence[str], judge: str) -> list[str]:
    """The command with the tests' judge in place of a document's, and what it costs cut down."""
    takes = {option for parameter in parse(list(arguments)).command.params for option in parameter.opts}
    words = [re.sub(r"https?://\S+/v1(#\S+)?$|votes:\S+$", judge, word) for word in arguments]
    words = ["3s" if word == "2h" else word for word in words]  # of search
    if "--set" in takes:
        words += [word for value in (*_SMALL, f"judge={judge}") for word in ("--set", value)]
    if "--judge" in takes and words[0] == "eval":
        words += ["--judge", judge, "--tokens", "8"]
    if "--judge" in takes and "--judge" not in words:
        words += ["--judge", judge]
    return words


# A running server, the hub and a measured folder are not here; other tests have them, or a stand-in.
# A page is served until it is stopped.
HERE = [
    command
    for command in OURS
    if not {"http://localhost:8080", "--suite", "remeasure", "owner/name", "try"} & set(command.arguments)
]


@pytest.mark.slow
@pytest.mark.parametrize("command", list({c.arguments: c for c in HERE}.values()), ids=str)
def test_commands_run(command: Command, desk: Path, judge: str) -> None:
    arguments = runnable(command.arguments, judge)
    result = CliRunner().invoke(main, arguments, input=_ROW)
    if arguments[0] == "scan":  # tests of scan have a model that can answer
        assert "the model cannot answer" in result.stderr
        return
    # A run says by 1 that no file passed the gate, as may well be with random weights.
    assert result.exit_code in ((0, 1) if arguments[0] == "run" else (0,)), result.output
    for option, word in itertools.pairwise(arguments):
        if option in _OUTPUTS:
            assert (desk / word).exists()
    if arguments[0] == "run":
        assert "Report: " in result.stdout
    if "--output" not in arguments and arguments[0] not in STAGES:
        assert result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in ALL if c.program in ("cat", "grep")], ids=str)
def test_small_tools_find_what_they_are_given(command: Command, desk: Path) -> None:
    done = subprocess.run([command.program, *command.arguments], capture_output=True, check=False)
    assert done.stdout
    assert not done.stderr


def server_options(command: Command) -> list[str]:
    """The options of a llama-server's line but its port, which the tests' server chooses."""
    words = list(command.arguments)
    if "--port" in words:
        del words[words.index("--port") : words.index("--port") + 2]
    return words


# Of one model. A server of several runs in tests/real/test_binaries.py.
STARTS = [c for c in ALL if c.program == SERVER and "--models-preset" not in c.arguments]


@pytest.mark.real  # the programs take minutes to build, once
@pytest.mark.parametrize("command", STARTS, ids=str)
def test_llama_server_takes_the_options(command: Command, desk: Path, tmp_path: Path) -> None:
    _make(desk, "-m", command.arguments[command.arguments.index("-m") + 1])
    with binaries.Server(tmp_path / "log", *server_options(command)) as server:
        body = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
        assert server.post("/v1/chat/completions", body)["choices"]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    "command",
    [c for c in OURS if "http://localhost:8080" in c.arguments and c.arguments[0] != "try"],
    ids=str,
)
def test_commands_of_a_running_server_run(command: Command, desk: Path, judge: str, tmp_path: Path) -> None:
    (start,) = (c for c in ALL if c.program == SERVER and c.where == command.where)
    with binaries.Server(tmp_path / "log", *server_options(start)) as server:
        given = [word.replace("localhost:8080", server.address) for word in command.arguments]
        result = CliRunner().invoke(main, runnable(given, judge))
    assert result.exit_code == 0, result.output


@pytest.mark.real
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", [c for c in ALL if c.program == "curl"], ids=str)
def test_curl_is_answered(command: Command, desk: Path, tmp_path: Path) -> None:
    starts = [c for c in ALL if c.program == SERVER and c.where == command.where]
    options = server_options(starts[0]) if starts else ["-m", "model.gguf"]
    with binaries.Server(tmp_path / "log", *options) as server:
        words = [word.replace("localhost:8080", server.address) for word in command.arguments]
        done = subprocess.run(["curl", "--silent", *words], capture_output=True, check=True)
    assert json.loads(done.stdout)["choices"]


@pytest.mark.real
@pytest.mark.parametrize("command", [c for c in ALL if c.program == "llama-completion"], ids=str)
def test_llama_completion_takes_the_options(command: Command, desk: Path) -> None:
    _, log = binaries.completion(*command.arguments, "-n", "4", "--single-turn")
    assert not any("error" in line.lower() for line in log)


PYTHON = [block for block in blocks() if block.language in ("python", "py")]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_every_python_block_compiles(block: Block) -> None:
    ast.parse(block.text, block.where)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [b for b in PYTHON if b.where.startswith("docs/howto/front-ends.md")],
    ids=lambda block: block.where,
)
def test_the_files_work_in_llama_cpp_python_as_it_is_written(
    block: Block, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A random model may say anything, but says something.
    exec(compile(block.text, block.where, "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.slow
def test_several_processes_find_what_one_does(files: Path, tmp_path: Path) -> None:
    """What they capture is what one does (`test_capture`)."""
    (block,) = (b for b in PYTHON if b.where.startswith("docs/scaling.md"))
    rng = np.random.default_rng(0)
    tokens = np.where(np.arange(12) < rng.integers(5, 12, (70, 1)), rng.integers(30, 250, (70, 12)), -1)
    confidence = np.linspace(-1, 1, len(tokens))
    np.savez(tmp_path / "prompts.npz", prompts=tokens, confidence=confidence)
    shutil.copy(files / "model.gguf", tmp_path)
    (tmp_path / "fit.py").write_text(block.text, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "fit.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, _ = captured(ActivationStore(tmp_path / "activations", "prompts.npz"), len(tokens), inputs=True)
    one = WeightedRidgeMeanDifference(ridge=1.0).fit(rows, confidence)
    np.testing.assert_allclose(np.load(tmp_path / "directions.npy"), one.directions_, atol=1e-12)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"


def links(document: Path) -> list[str]:
    tokens = MarkdownIt().enable("table").parse(document.read_text(encoding="utf-8"))
    inline = [child for token in tokens for child in token.children or ()]
    found = [child.attrGet("href") or child.attrGet("src") for child in inline]
    return [str(target) for target in found if target]


def anchors(document: Path) -> set[str]:
    """The anchors of the headings, as GitHub and MkDocs both make them."""
    tokens = MarkdownIt().parse(document.read_text(encoding="utf-8"))
    headings = [b.content for a, b in itertools.pairwise(tokens) if a.type == "heading_open"]
    plain = [re.sub(r"[`*]", "", heading).lower() for heading in headings]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip()) for heading in plain}


def test_the_site_has_every_page_and_loads_nothing() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    site = yaml.safe_load(text)
    inside = {
        str(path.relative_to(ROOT / "docs")) for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")
    }
    assert pages(site["nav"]) == {*inside, VECTORS}
    assert site["strict"] is True
    assert site["theme"]["font"] is False
    assert "://" not in text


def pages(nav: object) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ()
    return set().union(*map(pages, parts))
