"""The prompts of `rs-export eval`: users' files or public suites, and the contexts that they are asked in.

Options go in; prompts by set, and what is known of the sets, come out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_gguf.errors import InputError

if TYPE_CHECKING:
    from rs_gguf.engines.engine import Engine
    from rs_gguf.prompts.contexts import Context
    from rs_gguf.records.conversation import Prompt


@dataclass(frozen=True)
class PromptSets:
    """Prompts by the name of their set; the sets whose prompts have their own kind; facts of the suites."""

    sets: dict[str, list[Prompt]]
    known: list[str]
    suites: list[dict[str, Any]] = field(default_factory=list)


def prompt_sets(files: Sequence[Path], suites: Sequence[str], copies: Sequence[Path]) -> PromptSets:
    """Return the prompts of the files or of the suites.

    copies: local copies of the files of the suite, if there is one suite.

    Raises:
        InputError: both files and suites are given, or neither, or one of them cannot be used.
    """
    if bool(files) == bool(suites):
        raise InputError("give prompts either with --prompts or with --suite, one or more of them.")
    if copies and len(suites) != 1:
        raise InputError("--suite-file is a copy of the files of one suite; give exactly one --suite.")
    if not suites:
        return _of_files(files)
    from rs_gguf.evaluation.suites import SUITES, load

    sets: dict[str, list[Prompt]] = {}
    for name in suites:
        sets |= load(name, copies)
    facts = [
        {
            "name": name,
            "dataset": SUITES[name].dataset,
            "files": list(map(str, copies)) or list(SUITES[name].files),
            "licence": SUITES[name].licence,
            "inspected": SUITES[name].inspected,
        }
        for name in suites
    ]
    return PromptSets(sets, list(sets), facts)


def _of_files(files: Sequence[Path]) -> PromptSets:
    """Name the prompts of each file by its stem, or by its path if several files have the same stem."""
    from rs_gguf.prompts.user_files import load_own_kinds

    stems = Counter(path.stem for path in files)
    loaded = {path.stem if stems[path.stem] == 1 else str(path): load_own_kinds(path) for path in files}
    sets = {name: prompts for name, (prompts, _) in loaded.items()}
    return PromptSets(sets, [name for name, (_, known) in loaded.items() if known])


def shown_contexts(contexts: Sequence[Context], loaded: Engine | None) -> list[Context]:
    """Return the contexts that the model's chat template shows, and name the others on stderr.

    A server does not tell which messages its template shows, so there all are returned.
    """
    from rs_gguf.prompts.template import ChatFormat

    if loaded is None:
        return list(contexts)
    chat = ChatFormat.of(loaded)
    for context in contexts:
        if not context.suits(chat):
            click.echo(
                f"The model's chat template does not show the context {context.name}: left out.", err=True
            )
    return [context for context in contexts if context.suits(chat)]
