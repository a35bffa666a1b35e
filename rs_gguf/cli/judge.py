"""The `rs-export judge` command: rows in, graded rows out, in order and as they are ready."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_gguf.errors import InputError, escape_control_chars

if TYPE_CHECKING:
    from rs_gguf.judges.judge import Judge

_ENCODING = "utf-8-sig"  # files from Windows begin with a mark
_AT_ONCE = 128  # rows a judge gets together: what its examples share is read once for them


@click.command("judge")
@click.option(
    "--input", "source", default="-", metavar="F.jsonl", help="Rows with prompt and answer; - is stdin."
)
@click.option("--output", "target", default="-", metavar="G.jsonl", help="- is stdout.")
@click.option(
    "--judge", "spec", metavar="J",
    help="MODEL, labels:MODEL, votes:MODEL, http://host:port/v1#model or keywords; by default the embedded.",
)  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Neither take judgements from the cache nor keep them there.")
@click.option("--concurrency", default=8, show_default=True, type=click.IntRange(1),
              help="Requests to an endpoint under way at once.")  # fmt: skip
@click.option("--per-minute", type=click.FloatRange(0, min_open=True), metavar="N",
              help="Most requests to an endpoint in a minute.")  # fmt: skip
@click.option("--price", nargs=2, type=click.FloatRange(0), default=(0.0, 0.0), metavar="IN OUT",
              help="Price of a million prompt and a million answered tokens, to tell the cost.")  # fmt: skip
@click.option("--show-rubric", is_flag=True, help="Print the rubric and stop.")
@click.option(
    "--agreement", is_flag=True, help="Print how the judge agrees with the labelled test pairs, and stop."
)
@click.option("--pairs", "sample", type=click.IntRange(20), metavar="N",
              help="With --agreement: only N of the test pairs, evenly spaced.")  # fmt: skip
def judge(
    source: str, target: str, spec: str | None, no_cache: bool, concurrency: int, per_minute: float | None,
    price: tuple[float, float], show_rubric: bool, agreement: bool, sample: int | None,
) -> None:  # fmt: skip
    """Grade answers: refusal, answer or unclear.

    Adds confidence (−1 … 1), verdict, mode and category to each row, in order.

    An endpoint's key is read from RS_GGUF_API_KEY. Judgements are cached by what was judged and by whom.
    """
    from rich.console import Console

    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.judges import calibration
    from rs_gguf.judges import registry as judges
    from rs_gguf.judges.rubric import rubric
    from rs_gguf.records.files import write_atomic

    if show_rubric:
        click.echo(json.dumps(rubric(), indent=2))
        return
    if sample is not None and not agreement:
        raise InputError("--pairs chooses among the labelled test pairs: give --agreement with it.")
    options = judges.EndpointOptions(concurrency=concurrency, per_minute=per_minute, price=price)
    rows: Iterator[dict[str, Any]] = iter(()) if agreement else _rows(source)
    progress = TerminalProgress(Console(stderr=True))
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        grader = stack.enter_context(
            judges.open_judge_spec(spec, cached=not no_cache, options=options, progress=progress.download)
        )
        click.echo(f"Judge: {escape_control_chars(grader.name)}", err=True)
        if agreement:
            pairs = [pair for pair in calibration.labelled_pairs() if pair.split == "test"]
            count = min(sample or len(pairs), len(pairs))
            pairs = [pairs[k * len(pairs) // count] for k in range(count)]
            found = {"labels": calibration.label_agreement(), **calibration.agreement(grader, pairs)}
            click.echo(json.dumps(found, indent=2))
            return
        counts: Counter[str] = Counter()
        graded = _lines(rows, grader, counts)
        if target == "-":
            for line in graded:
                click.echo(line, nl=False)
        else:
            write_atomic(Path(target), lambda file: file.writelines(graded))
        _tell(counts, grader)


def _lines(rows: Iterator[Mapping[str, Any]], grader: Judge, counts: Counter[str]) -> Iterator[bytes]:
    """Graded rows as JSON lines, each as soon as it and all before it are judged."""
    from rs_gguf.records.conversation import Judgement

    while some := list(itertools.islice(rows, _AT_ONCE)):
        pairs = [(row["prompt"], _to_judge(row)) for row in some]
        ready: dict[int, Judgement] = {}
        place = 0
        for i, judgement in grader.judge(pairs):
            ready[i] = judgement
            while place in ready:
                found = ready.pop(place)
                counts["unjudged" if found.confidence is None else found.verdict] += 1
                graded = {
                    **some[place],
                    "confidence": found.confidence,
                    "verdict": found.verdict,
                    "mode": found.mode,
                    "category": found.category,
                }
                # Half of a surrogate pair, which JSON can spell and UTF-8 cannot, is spelt as it came.
                yield (json.dumps(graded, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
                place += 1


def _to_judge(row: Mapping[str, Any]) -> str | None:
    """The answer without its trace, None where that was cut off.

    Rows may tell so themselves, as `finished`; of others one that is a trace alone was.
    """
    from rs_gguf.prompts.trace import final_answer

    if not row["answer"] and row.get("finished") is False:
        return None
    return final_answer(row["answer"], finished=row.get("finished") is True)


def _tell(counts: Counter[str], grader: Judge) -> None:
    told = [f"{counts[name]} {name}" for name in ("refusal", "answer", "unclear", "unjudged")]
    click.echo(f"{counts.total()} rows: {', '.join(told)}", err=True)
    usage = grader.usage
    if usage is not None:
        click.echo(
            f"{usage.requests} requests, {usage.retries} repeated, {usage.prompt_tokens} + "
            f"{usage.completion_tokens} tokens" + (f", cost {usage.cost:.4f}" if usage.cost else ""),
            err=True,
        )


def _rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a file, which is checked whole before a model is loaded, or of a pipe, as they come."""
    if source == "-":
        rows = _parsed(click.open_file("-", encoding=_ENCODING), source)
    else:
        try:
            with Path(source).open(encoding=_ENCODING) as lines:
                rows = iter(list(_parsed(lines, source)))
        except OSError as error:
            raise InputError(f"cannot read {source}: {error}.") from error
    first = next(rows, None)
    if first is None:
        raise InputError(f"{source} holds no rows to judge.")
    return itertools.chain([first], rows)


def _parsed(lines: Iterable[str], source: str) -> Iterator[dict[str, Any]]:
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(line, f"{source}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {source}: {error}.") from error


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row["prompt"], str) or not isinstance(row["answer"], str):
            raise TypeError("prompt and answer must be text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: expected a JSON object with prompt and answer ({error}).") from error
    return dict(row)
