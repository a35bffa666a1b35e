"""Define the `rs-export judge` command.

In: JSON lines with prompt and answer. Out: the same rows with the judgements, in order, each as soon as it is
ready.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_gguf.cli.engine_options import EngineOptions, engine_options
from rs_gguf.errors import InputError, escape_control_chars
from rs_gguf.judges import FORMS

if TYPE_CHECKING:
    from rs_gguf.judges.judge import Judge

_ENCODING = "utf-8-sig"  # files from Windows may begin with a byte-order mark
_BATCH = 128  # rows that a judge gets together, so that it reads the text that they share once


@click.command("judge")
@click.option(
    "--input",
    "source",
    default="-",
    metavar="F.jsonl",
    help="File of rows with prompt and answer; - is stdin.",
)
@click.option(
    "--output", "target", default="-", metavar="G.jsonl", help="File for the judged rows; - is stdout."
)
@click.option(
    "--judge", "spec", metavar="J",
    help=f"{', '.join(FORMS[:-1])} or {FORMS[-1]}; by default the embedded judge.",
)  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Do not read or write the cache of judgements.")
@click.option("--concurrency", default=8, show_default=True, type=click.IntRange(1),
              help="Concurrent requests to an endpoint.")  # fmt: skip
@click.option("--per-minute", type=click.FloatRange(0, min_open=True), metavar="N",
              help="Maximum requests to an endpoint per minute.")  # fmt: skip
@click.option("--price", nargs=2, type=click.FloatRange(0), default=(0.0, 0.0), metavar="IN OUT",
              help="Prices of a million prompt and answer tokens; prints the cost.")  # fmt: skip
@click.option("--show-rubric", is_flag=True, help="Print the rubric and exit.")
@click.option("--agreement", is_flag=True, help="Print the agreement with the labelled answers and exit.")
@click.option("--pairs", "sample", type=click.IntRange(20), metavar="N",
              help="With --agreement: use only N of the test pairs, evenly spaced.")  # fmt: skip
@engine_options
def judge(
    source: str, target: str, spec: str | None, no_cache: bool, concurrency: int, per_minute: float | None,
    price: tuple[float, float], show_rubric: bool, agreement: bool, sample: int | None,
    engine: EngineOptions,
) -> None:  # fmt: skip
    """Judge answers: refusal, answer, failure or unclear.

    Adds confidence (−1 … 1), verdict, mode and category to each row, in order.

    The key of an endpoint is read from RS_GGUF_API_KEY. Judgements are cached by judge, prompt and answer.
    """
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.evaluation import judge_validation
    from rs_gguf.judges import calibration
    from rs_gguf.judges import pairs as labelled
    from rs_gguf.judges import registry as judges
    from rs_gguf.judges.rubric import rubric
    from rs_gguf.records.files import write_atomic

    if show_rubric:
        click.echo(json.dumps(rubric(), indent=2))
        return
    if sample is not None and not agreement:
        raise InputError("--pairs selects labelled test pairs and is accepted only with --agreement.")
    options = judges.EndpointOptions(concurrency=concurrency, per_minute=per_minute, price=price)
    settings = engine.settings()
    rows: Iterator[dict[str, Any]] = iter(()) if agreement else _rows(source)
    progress = TerminalProgress()
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        judge_model = stack.enter_context(
            judges.open_judge_spec(
                spec, engine=settings, cached=not no_cache, options=options, progress=progress.download
            )
        )
        click.echo(f"Judge: {escape_control_chars(judge_model.name)}", err=True)
        if agreement:
            pairs = labelled.held_out_pairs()
            count = min(sample or len(pairs), len(pairs))
            pairs = [pairs[k * len(pairs) // count] for k in range(count)]
            answers = judge_validation.labelled_answers()
            if sample is not None:
                answers = answers[:: max(1, len(answers) // sample)]
            figures = {
                "labels": labelled.label_agreement(),
                **calibration.agreement(judge_model, pairs),
                "outcomes": judge_validation.outcome_agreement(judge_model, answers),
            }
            click.echo(json.dumps(figures, indent=2))
            return
        counts: Counter[str] = Counter()
        judged = _lines(rows, judge_model, counts)
        if target == "-":
            for line in judged:
                click.echo(line, nl=False)
        else:
            write_atomic(Path(target), lambda file: file.writelines(judged))
        _print_summary(counts, judge_model)


def _lines(rows: Iterator[Mapping[str, Any]], judge_model: Judge, counts: Counter[str]) -> Iterator[bytes]:
    """Yield judged rows as JSON lines, each as soon as it and all rows before it are judged.

    Count the verdicts in `counts`.
    """
    from rs_gguf.records.conversation import Judgement

    while batch := list(itertools.islice(rows, _BATCH)):
        pairs = [(row["prompt"], _to_judge(row)) for row in batch]
        ready: dict[int, Judgement] = {}
        next_row = 0
        for i, judgement in judge_model.judge(pairs):
            ready[i] = judgement
            while next_row in ready:
                current = ready.pop(next_row)
                counts["unjudged" if current.confidence is None else current.verdict] += 1
                judged = {
                    **batch[next_row],
                    "confidence": current.confidence,
                    "verdict": current.verdict,
                    "mode": current.mode,
                    "category": current.category,
                }
                # JSON can hold half of a surrogate pair, but UTF-8 cannot; the escape keeps it as it came.
                yield (json.dumps(judged, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
                next_row += 1


def _to_judge(row: Mapping[str, Any]) -> str | None:
    """Return the answer without its thinking trace; None if it was truncated within the trace.

    A row may state this with `finished`. A row without `finished` counts as truncated if it is only a trace.
    """
    from rs_gguf.prompts.trace import final_answer

    if not row["answer"] and row.get("finished") is False:
        return None
    return final_answer(row["answer"], finished=row.get("finished") is True)


def _print_summary(counts: Counter[str], judge_model: Judge) -> None:
    verdicts = [f"{counts[name]} {name}" for name in ("refusal", "answer", "failure", "unclear", "unjudged")]
    click.echo(f"{counts.total()} rows: {', '.join(verdicts)}", err=True)
    usage = judge_model.usage
    if usage is not None:
        click.echo(
            f"{usage.requests} requests, {usage.retries} retries, {usage.prompt_tokens} prompt + "
            f"{usage.completion_tokens} answer tokens" + (f", cost {usage.cost:.4f}" if usage.cost else ""),
            err=True,
        )


def _rows(source: str) -> Iterator[dict[str, Any]]:
    """Return the rows of a file or of stdin ("-").

    A file is checked completely before a model is loaded. Rows of stdin are read as they arrive. Raise
    `InputError` if there is no row.
    """
    if source == "-":
        rows = _parsed(click.open_file("-", encoding=_ENCODING), source)
    else:
        try:
            with Path(source).open(encoding=_ENCODING) as lines:
                rows = iter(list(_parsed(lines, source)))
        except OSError as error:
            raise InputError(
                f"cannot read {source} ({error}). Check the path and its permissions."
            ) from error
    first = next(rows, None)
    if first is None:
        raise InputError(
            f"{source} holds no rows to judge; give JSON objects with prompt and answer, one per line."
        )
    return itertools.chain([first], rows)


def _parsed(lines: Iterable[str], source: str) -> Iterator[dict[str, Any]]:
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(line, f"{source}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {source} ({error}). Give a file in UTF-8.") from error


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row["prompt"], str) or not isinstance(row["answer"], str):
            raise TypeError("prompt and answer must be text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{where}: not a JSON object with the texts prompt and answer ({error}). Correct the line."
        ) from error
    return dict(row)
