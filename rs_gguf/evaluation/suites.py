"""Public suites of prompts, for evaluation only: where each is, what its rows mean, and its licence.

The name of a suite goes in, and local copies of its files or nothing; prompts by set come out. No benchmark
text is part of this package: `load` fetches the files from the Hugging Face hub (docs/eval.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rs_gguf.errors import InputError
from rs_gguf.models.sources import hub_download
from rs_gguf.prompts.grid import stratified
from rs_gguf.prompts.user_files import columns_of, prompt_text, unique
from rs_gguf.records.conversation import Kind, Prompt
from rs_gguf.records.files import from_home

_MAX_BYTES = 64 << 20  # of a suite's file; the largest has 24 MB
_CONTEXTS = ("input", "contextstring")  # columns that complete a prompt, where a suite has them


@dataclass(frozen=True)
class Suite:
    """A public suite of prompts.

    dataset: id on the hub. files: path in the dataset → kind of its prompts; None where `kinds` has it by
    how the category begins. prompt, category: columns; "" stands for no category. sample: number of prompts,
    always the same ones; None for all. inspected: the suite has guided the design of this project, so its
    figures are not independent.
    """

    dataset: str
    files: Mapping[str, Kind | None]
    licence: str
    prompt: str = "prompt"
    category: str = ""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    sample: int | None = None
    inspected: bool = False


_PARQUET = "data/train-00000-of-00001.parquet"
SUITES: Mapping[str, Suite] = {
    "ccp-sensitive": Suite(
        "MultiverseComputingCAI/llm-refusal-evaluation",
        {"data/ccp_sensitive_sampled-00000-of-00001.parquet": "sensitive"},
        "not stated",
        category="subject",
        inspected=True,
    ),
    "deccp": Suite(
        "augmxnt/deccp",
        {"data/censored-00000-of-00001.parquet": "sensitive"},
        "Apache-2.0",
        prompt="text",
        inspected=True,
    ),
    "jailbreakbench": Suite(
        "JailbreakBench/JBB-Behaviors",
        {"data/harmful-behaviors.csv": "harmful", "data/benign-behaviors.csv": "benign"},
        "MIT",
        prompt="goal",
        category="category",
        inspected=True,
    ),
    "harmbench": Suite(
        "walledai/HarmBench",
        {"standard/train-00000-of-00001.parquet": "harmful"},
        "MIT",
        category="category",
    ),
    "strongreject": Suite("walledai/StrongREJECT", {_PARQUET: "harmful"}, "MIT", category="category"),
    "or-bench-toxic": Suite(
        "bench-llm/or-bench", {"or-bench-toxic.csv": "harmful"}, "CC-BY-4.0", category="category"
    ),
    "do-not-answer": Suite(
        "LibrAI/do-not-answer",
        {"data/train-00000-of-00001-6ba0076b818accff.parquet": "harmful"},
        "Apache-2.0 by its tag, CC-BY-NC-SA-4.0 by its text",
        prompt="question",
        category="risk_area",
    ),
    "xstest": Suite(
        "natolambert/xstest-v2-copy",
        {"data/prompts-00000-of-00001.parquet": None},
        "CC-BY-4.0",
        category="type",
        kinds={"contrast_": "harmful", "": "benign"},
    ),
    "or-bench-hard": Suite(
        "bench-llm/or-bench", {"or-bench-hard-1k.csv": "benign"}, "CC-BY-4.0", category="category"
    ),
    "alpaca": Suite(
        "tatsu-lab/alpaca",
        {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": "benign"},
        "CC-BY-NC-4.0",
        prompt="instruction",
        sample=250,
    ),
}
"""Suites by name: sensitive ones, harmful ones, mixed and benign ones."""


def load(
    name: str,
    copies: Sequence[Path] = (),
    *,
    fetch: Callable[[str, str], Path] = lambda dataset, file: hub_download(dataset, file, None, dataset=True),
) -> dict[str, list[Prompt]]:
    """Return the prompts of a suite by the name of their set: one set for each kind.

    copies: local copies of the suite's files, in the order of `Suite.files`; without them the hub is asked.
    fetch: returns the local path of a file of a dataset.

    Raises:
        InputError: there is no such suite, a file cannot be read or fetched, or it has other columns.
    """
    suite = SUITES.get(name)
    if suite is None:
        raise InputError(f"no suite {name!r}; {', '.join(SUITES)} are accepted.")
    if copies and len(copies) != len(suite.files):
        raise InputError(
            f"--suite-file: {name} has {len(suite.files)} files, and {len(copies)} are given. Give a copy of "
            f"each, in this order: {', '.join(suite.files)}."
        )
    paths = [from_home(path) for path in copies] or [fetch(suite.dataset, file) for file in suite.files]
    sets: dict[Kind, list[Prompt]] = defaultdict(list)
    for path, kind in zip(paths, suite.files.values(), strict=True):
        for prompt in _prompts(suite, path, kind):
            sets[prompt.kind].append(prompt)
    if not sets:
        raise InputError(f"{', '.join(map(str, paths))}: no prompts. Give a copy of the suite's files.")
    return {
        name if len(sets) == 1 else f"{name}, {kind}": _sample(suite, unique(rows))
        for kind, rows in sets.items()
    }


def _prompts(suite: Suite, path: Path, kind: Kind | None) -> list[Prompt]:
    prompts = []
    for line, columns in columns_of(path, _MAX_BYTES):
        where = f"{path}:{line}"
        needed = [column for column in (suite.prompt, suite.category) if column]
        if missing := [column for column in needed if column not in columns]:
            raise InputError(
                f"{where}: no column {', '.join(missing)}, which {suite.dataset} is expected to have. The "
                "dataset may have changed: give such a file with --prompts, and its kinds in a column `kind`."
            )
        used = {name: columns[name] for name in (suite.prompt, *_CONTEXTS) if name in columns}
        topic = str(columns.get(suite.category) or "")
        by_topic = (value for start, value in suite.kinds.items() if topic.startswith(start))
        row_kind = next(by_topic) if kind is None else kind
        prompts.append(Prompt(prompt_text(used, where), row_kind, topic=topic))
    return prompts


def _sample(suite: Suite, prompts: list[Prompt]) -> list[Prompt]:
    return prompts if suite.sample is None else stratified(prompts, suite.sample, seed=0)
