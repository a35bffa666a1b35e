"""Public suites: the table, local copies of invented rows, and a small hub on the loopback interface."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow
import pytest
from fixtures.hub import Hub
from pyarrow import parquet

from rs_gguf.errors import InputError
from rs_gguf.evaluation.suites import SUITES, Suite, load
from rs_gguf.records.conversation import KINDS


def write(path: Path, columns: Mapping[str, list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(dict(columns)), path)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([name.capitalize() for name in columns])
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def invented(suite: Suite, folder: Path, n: int = 3) -> list[Path]:
    """Copies of a suite's files with invented prompts, in two categories."""
    starts = list(suite.kinds) or [""]
    paths = []
    for number, name in enumerate(suite.files):
        columns = {suite.prompt: [f"an invented prompt {number}, {row}" for row in range(n)]}
        if suite.category:
            columns[suite.category] = [f"{starts[row % len(starts)]}group {row % 2}" for row in range(n)]
        paths.append(write(folder / name, columns))
    return paths


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_reads_a_local_copy(name: str, tmp_path: Path) -> None:
    suite = SUITES[name]
    sets = load(name, invented(suite, tmp_path))
    kinds = [*suite.files.values()] if None not in suite.files.values() else [*suite.kinds.values()]
    assert {prompt.kind for prompts in sets.values() for prompt in prompts} == set(kinds) <= set(KINDS)
    assert sum(map(len, sets.values())) == 3 * len(suite.files)
    for set_name, prompts in sets.items():
        (kind,) = {prompt.kind for prompt in prompts}
        assert set_name == (name if len(sets) == 1 else f"{name}, {kind}")
        assert all("invented prompt" in prompt.prompt for prompt in prompts)
        assert all(bool(prompt.topic) is bool(suite.category) for prompt in prompts)
    assert suite.licence
    assert suite.dataset.count("/") == 1


def test_which_suites_have_guided_the_design() -> None:
    assert {name for name, suite in SUITES.items() if suite.inspected} == {
        "ccp-sensitive",
        "deccp",
        "jailbreakbench",
    }
    assert {kind for suite in SUITES.values() for kind in suite.files.values() if kind} == set(KINDS)


def test_contrast_prompts_are_harmful(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.csv", {"prompt": ["one", "two", "three"], "type": ["puns", "contrast_puns", "names"]}
    )
    found = {name: [p.prompt for p in prompts] for name, prompts in load("xstest", [path]).items()}
    assert found == {"xstest, benign": ["one", "three"], "xstest, harmful": ["two"]}


def test_a_sample_is_always_the_same_and_takes_the_input_along(tmp_path: Path) -> None:
    rows = [f"do this, {row}" for row in range(400)]
    path = write(tmp_path / "a.parquet", {"instruction": rows, "input": ["with that"] * 400})
    first, again = (load("alpaca", [path])["alpaca"] for _ in range(2))
    assert first == again
    assert len(first) == 250
    assert first[0].prompt.endswith("\n\nwith that")


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("no-such-suite", {"prompt": ["a"]}, r"no suite 'no-such-suite'; ccp-sensitive, "),
        ("deccp", {"prompt": ["a"]}, r"no column text, which augmxnt/deccp"),
        ("harmbench", {"prompt": ["a"]}, r"no column category"),
        ("jailbreakbench", {"goal": ["a"], "category": ["b"]}, r"2 files, and 1 are given.*harm.*benign"),
        ("deccp", {"text": []}, r"no prompts"),
    ],
)  # fmt: skip
def test_a_copy_that_does_not_fit_is_named(
    name: str, columns: dict[str, list[str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load(name, [write(tmp_path / "copy.csv", columns)])


# ---- the hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    suite = SUITES["jailbreakbench"]
    copies = invented(suite, tmp_path / "origin")
    paths = [f"/datasets/{suite.dataset}/resolve/main/{file}" for file in suite.files]
    hub = Hub({path: copy.read_bytes() for path, copy in zip(paths, copies, strict=True)})
    yield hub
    hub.stop()


def fetched(name: str, hub: Hub, home: Path) -> subprocess.CompletedProcess[str]:
    """Load a suite in a process of its own: huggingface_hub reads the hub's address when it is imported."""
    code = (
        "from rs_gguf.evaluation.suites import load\n"
        f"for name, prompts in load({name!r}).items(): print(name, len(prompts))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env=hub.environment(home), capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_files_of_a_suite_come_from_the_hub_once(hub: Hub, tmp_path: Path) -> None:
    result = fetched("jailbreakbench", hub, tmp_path / "home")
    assert result.stdout.splitlines() == ["jailbreakbench, harmful 3", "jailbreakbench, benign 3"], (
        result.stderr
    )
    gets = [asked for asked in hub.asked if asked.startswith("GET /datasets")]
    assert len(gets) == 2
    assert fetched("jailbreakbench", hub, tmp_path / "home").returncode == 0
    assert [asked for asked in hub.asked if asked.startswith("GET /datasets")] == gets


@pytest.mark.slow
def test_a_dataset_that_the_hub_does_not_have_is_named(hub: Hub, tmp_path: Path) -> None:
    result = fetched("deccp", hub, tmp_path / "home")
    assert result.returncode != 0
    assert "cannot find the dataset augmxnt/deccp/data/censored-00000-of-00001.parquet" in result.stderr
