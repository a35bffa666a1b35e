"""What the documents tell people to type is what the program takes: commands, recipes, links, Python."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt
from tiny_gguf import write_tiny_qwen2

from rs_gguf import control_vector, lora, recipe
from rs_gguf.cli import main
from rs_gguf.cli_eval import parse_scales
from rs_gguf.steering import SteeringVector

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

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


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `rs-export …` in a block of shell lines, as the shell would split it."""
    for block in blocks():
        if block.language not in ("sh", "bash", "shell", "console"):
            continue
        text = block.text.replace("\\\n", " ")
        inner = re.findall(r"\$\((rs-export[^)]*)\)", text)
        for line in [*re.sub(r"\$\(rs-export[^)]*\)", "file", text).splitlines(), *inner]:
            for words in simple_commands(line):
                if "rs-export" in words:
                    yield block.where, words[words.index("rs-export") + 1 :]


def simple_commands(line: str) -> list[list[str]]:
    """The simple commands of a line: cut at pipes and separators, redirections and comments left out."""
    lexer = shlex.shlex(re.sub(r"(^|\s)# .*", "", line), posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split, lexer.commenters = True, ""  # a # inside a word is no comment
    try:
        words = list(lexer)
    except ValueError:  # a quoted text over several lines, which is some other program's
        assert "rs-export" not in line, line
        return []
    found: list[list[str]] = [[]]
    skip = False
    for word in words:
        if set(word) <= set("|;&"):
            found.append([])
        elif set(word) <= set("<>"):
            skip = True
        elif skip:
            skip = False
        else:
            found[-1].append(word)
    return found


COMMANDS = list(commands())


def parse(arguments: list[str]) -> click.Context:
    """The context of the command that the arguments call; click's own error where they do not fit."""
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *arguments = arguments
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    return command.make_context(name, arguments)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("RS_GGUF_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(("where", "arguments"), COMMANDS, ids=lambda value: str(value))
def test_every_command_is_one_that_the_program_takes(where: str, arguments: list[str]) -> None:
    with parse(arguments) as context:
        # These are read when a command starts; a recipe file of one's own is not there to be read.
        recipe.load(None, context.params.get("overrides", ()))
        if scales := context.params.get("scales"):
            parse_scales(scales)


def test_the_check_of_commands_can_fail() -> None:
    for wrong in (["run", "--fit"], ["runn"], ["eval", "--model", "m.gguf"], ["check"]):
        with pytest.raises((click.UsageError, AssertionError)):
            parse(wrong)
    assert len(COMMANDS) > 20
    assert simple_commands("K=1 a 'b c' | d#e --f < g > h  # i") == [["K=1", "a", "b c"], ["d#e", "--f"]]


def inline_code() -> Iterator[tuple[str, str]]:
    for path in DOCUMENTS:
        for token in MarkdownIt().enable("table").parse(path.read_text(encoding="utf-8")):
            for child in token.children or ():
                if child.type == "code_inline":
                    yield str(path.relative_to(ROOT)), " ".join(child.content.split())


def test_options_and_keys_in_running_text_exist() -> None:
    values = recipe.Recipe().model_dump()
    keys = {f"{s}.{key}" for s, inside in values.items() if isinstance(inside, dict) for key in inside}
    for where, code in inline_code():
        if re.fullmatch(r"(prompts|answers|fit|tune)\.(?!jsonl?$)\w+", code):
            assert code in keys, f"{where}: {code}"
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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and, under every name that a document gives one, a file made for it."""
    folder = tmp_path_factory.mktemp("docs")
    write_tiny_qwen2(folder / "model.gguf", n_embd=_WIDTH)
    direction = np.linspace(-1, 1, _WIDTH, dtype=np.float32)
    factors = (direction[np.newaxis] / 8, direction[:, np.newaxis] / 8)
    for option, word in sorted({pair for _, words in COMMANDS for pair in itertools.pairwise(words)}):
        path = folder / re.sub(r":[\d.-]+$", "", word)
        if path.suffix not in (".gguf", ".jsonl", ".csv", ".txt") or "://" in word or option == "--set":
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if option == "--model":
            path.write_bytes((folder / "model.gguf").read_bytes())
        elif path.suffix == ".jsonl":
            path.write_text(_ROW, encoding="utf-8")
        elif path.suffix != ".gguf":
            path.write_text("prompt\nWhat is a republic?\n", encoding="utf-8")
        elif "adapter" in path.name:
            lora.write(lora.LoraAdapter({"blk.1.attn_output.weight": factors}, _ARCHITECTURE), path)
        else:
            control_vector.write(SteeringVector({1: direction}, architecture=_ARCHITECTURE), path)
    return folder


def cheap(arguments: list[str]) -> list[str] | None:
    """The arguments of a command that needs no real model, server or network, or None.

    What is asked of a judge is asked of the keywords, which are given last and so win.
    """
    name, *rest = arguments
    model = rest[rest.index("--model") + 1] if "--model" in rest else ""
    if model and not (model.endswith(".gguf") and "://" not in model):
        return None
    if name == "eval":
        return [*arguments, "--judge", "keywords", "--tokens", "4"]
    if name == "judge" and "--fit-probe" not in rest:
        return [*arguments, "--judge", "keywords"]
    if name in ("inspect", "combine", "check") or arguments == ["models", "list"]:
        return arguments
    return None


CHEAP = list(dict.fromkeys(tuple(found) for _, c in COMMANDS if (found := cheap(c))))


@pytest.mark.parametrize("arguments", CHEAP, ids=" ".join)
def test_cheap_commands_run(arguments: tuple[str, ...], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    result = CliRunner().invoke(main, arguments, input=_ROW)
    assert result.exit_code == 0, result.output
    assert result.stdout or "--output" in arguments


PYTHON = [block for block in blocks() if block.language in ("python", "py")]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_every_python_block_compiles(block: Block) -> None:
    ast.parse(block.text, block.where)


@pytest.mark.parametrize(
    "block", [b for b in PYTHON if b.where.startswith("docs/howto/use.md")], ids=lambda block: block.where
)
def test_the_files_work_in_llama_cpp_python_as_it_is_written(
    block: Block, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    # A random model may say anything, but says something.
    exec(compile(block.text, block.where, "exec"), {})
    assert capsys.readouterr().out


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
    assert pages(site["nav"]) == {
        str(path.relative_to(ROOT / "docs")) for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")
    }
    assert site["strict"] is True
    assert site["theme"]["font"] is False
    assert "://" not in text


def pages(nav: object) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ()
    return set().union(*map(pages, parts))
