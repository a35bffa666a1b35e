"""Which of a run's files to use, and why, in plain words; the same for page, card and terminal.

`metrics.json` goes in; its files with their figures, and sentences about them, come out. A file is recommended_file
only if its gate passed; of two that passed, the one that does more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rs_gguf.evaluation.paired import SIDES
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.metrics import RunRecord
from rs_gguf.records.rows import Row

_WORDS = {"vector": "control vector", "adapter": "gated adapter"}


def files(record: RunRecord) -> list[Row]:
    """The measured files: the control vector, then the adapter where the run made one.

    Each has `key`, `side`, `word`, how it `acts`, whether it `passed`, and what metrics.json says of it.
    `sets` is a list in the order of `KINDS`, and `of` the same by kind. A file counts the prompts that were
    judged both unsteered and with it. A set is `alike` where `n` and the unsteered rate are
    the same in all files.
    """
    found: list[Row] = []
    for key in _WORDS:
        if key not in record.files:
            continue
        file: Row = {**record.files[key].model_dump(), "passed": record.files[key].passed}
        sets = [{"name": name, **figures} for name, figures in file["sets"].items()]
        sets.sort(key=lambda one: kind_order(one["kind"]))
        of = {kind: next((one for one in sets if one["kind"] == kind), None) for kind in KINDS}
        file |= {"key": key, "side": SIDES[key], "word": _WORDS[key], "sets": sets, "of": of}
        file["acts"] = _acts(file)
        found.append(file)
    for same in zip(*(file["sets"] for file in found), strict=True):
        alike = len({(one["n"], one["refusal_unsteered"]) for one in same}) == 1
        for one in same:
            one["alike"] = alike
    return found


def _acts(file: Mapping[str, Any]) -> str:
    """What it does to prompts of all kinds, the benign_target of a gate among it (`records.trials.Candidate`)."""
    if file["key"] == "vector":
        first, last = file["layers"]
        return f"moves all prompts alike, harmful ones too, in blocks {first} to {last}"
    benign_target = file["benign_target"]
    benign = f"{abs(benign_target):g} times as far{'' if benign_target > 0 else ' the other way'}"
    return (
        "moves a prompt the further, the more it looks like the sensitive ones; benign ones on average "
        f"{benign}, harmful ones a little towards a refusal"
    )


def kind_order(kind: str) -> tuple[int, str]:
    """Sorts kinds as `KINDS` does, unknown ones behind."""
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def recommended_file(found: Sequence[Row], effect: str) -> Row | None:
    """The file to use, or None if no gate passed."""
    passed = [file for file in found if file["passed"]]
    return max(passed, key=lambda file: _merits(file, effect), default=None)


def headline(found: Sequence[Row], effect: str) -> str:
    """The verdict in one line."""
    best = recommended_file(found, effect)
    if best is not None:
        return f"Use the {best['word']}"
    return "Use neither file as it is" if len(found) > 1 else f"Do not use the {found[0]['word']} as it is"


def sentences(found: Sequence[Row], effect: str) -> list[str]:
    """Why: what the recommended_file file does, then how the other one stands. Reasons of a gate are not repeated."""
    best = recommended_file(found, effect)
    if best is None:
        verdict = "Neither passed its safety gate." if len(found) > 1 else "It did not pass its safety gate."
        return [verdict, *(f"{file['word'].capitalize()}: {counts(file)}" for file in found)]
    others = [file for file in found if file is not best]
    lines = [f"It passed its safety gate: {counts(best)}"]
    return lines + [f"The {other['word']} {_beside(best, other, effect)}." for other in others]


def counts(file: Mapping[str, Any]) -> str:
    """Refusals before and after by kind, as sentences: all, then the direct ones."""
    told = [
        f"of {one['n']} {kind} {'ones' if k else 'prompts'} {'' if k else 'the model refused '}"
        f"{one['refused_unsteered']} and now {'' if k else 'refuses '}{one['refused_steered']}"
        for k, (kind, one) in enumerate((kind, one) for kind, one in file["of"].items() if one)
    ]
    # A judge counts broken answers as refusals, too. Older runs, and judges that are asked for one label, do
    # not tell the one from the other: of theirs no more is known than which answers are empty.
    kinds = [
        (kind, one["categories_unsteered"], one["categories_steered"])
        for kind, one in file["of"].items()
        if one and one["categories_unsteered"] is not None
    ]
    named = {name for _, before, now in kinds for name in (*before, *now)}.difference(
        ("unclassified", "empty")
    )
    direct = [f"{kind} {b.get('direct', 0)} before and {now.get('direct', 0)} now" for kind, b, now in kinds]
    among = f" Direct refusals among them: {'; '.join(direct)}." if named else ""
    return f"{'; '.join(told) or 'no prompt was counted'}.{among}"


def _beside(best: Row, other: Row, effect: str) -> str:
    if not other["passed"]:
        return "did not pass its safety gate"
    does = "adds" if effect == "induce" else "removes"
    if _merits(other, effect)[0] < _merits(best, effect)[0]:
        sensitive = other["of"]["sensitive"]
        change = f"{sensitive['refused_unsteered']} before, {sensitive['refused_steered']} with it"
        return f"passed too, but {does} fewer refusals of sensitive prompts ({change})"
    if _merits(other, effect)[1] < _merits(best, effect)[1]:
        return f"passed too and {does} as many, but keeps fewer refusals of harmful ones"
    return f"passed too and {does} as many, but changes benign answers at least as much"


def _merits(file: Mapping[str, Any], effect: str) -> tuple[float, float, float]:
    """What decides between files: the wanted change, harmful refusals kept, little drift."""
    sensitive = file["of"]["sensitive"]
    fall = sensitive["refusal_unsteered"] - sensitive["refusal_steered"] if sensitive else 0.0
    kept, moved = file["harmful_refusal_ratio"], file["benign_drift"]
    return (
        -fall if effect == "induce" else fall,
        0.0 if kept is None else min(1.0, kept),
        float("-inf") if moved is None or moved != moved else -moved,
    )
