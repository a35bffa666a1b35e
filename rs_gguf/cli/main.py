"""`rs-export`: parse, call one function, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_gguf.cli import eval as cli_eval
from rs_gguf.cli import files as cli_vectors
from rs_gguf.cli import judge as cli_judge
from rs_gguf.cli import plan as cli_plan
from rs_gguf.errors import RsGgufError, escape_control_chars
from rs_gguf.records.artefacts import STAGES, StageInfo
from rs_gguf.version import __version__

if TYPE_CHECKING:
    from rs_gguf.cli.terminal import TerminalProgress


class _Group(click.Group):
    """Prints our errors as one message, turns them into exit codes, and lists the stages of a run apart."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if name not in STAGES] + list(STAGES)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        limit = formatter.width - 6 - width
        named = [
            (f"{name:<{width}}", self.commands[name].get_short_help_str(limit))
            for name in self.list_commands(ctx)
        ]
        everyday = len(named) - len(STAGES)
        for title, rows in (
            ("Commands", named[:everyday]),
            ("Stages of `run`, one by one", named[everyday:]),
        ):
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RsGgufError as error:
            # A message may hold names and texts from files and servers.
            click.echo("\n".join(map(escape_control_chars, f"Error: {error}".split("\n"))), err=True)
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            raise  # click ends in silence
        except OSError as error:
            where = escape_control_chars(str(error.filename or "the output"))
            click.echo(f"Error: {where}: {error.strerror or error}.", err=True)
            ctx.exit(2)
        except MemoryError:
            click.echo("Error: not enough memory. Use a smaller model or smaller prompt sets.", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rs-export")
def main() -> None:
    """Refusal Steering for llama.cpp: control vectors and gated adapters (LoRA), fitted and measured."""
    # The name of a file need not be UTF-8. What cannot be written is spelt out, as on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (  # the help lists the last one first
        click.option("--fresh", is_flag=True,
                     help="Start over: forget what the stages of an earlier run left in the folder."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                     help="Override a recipe value, for example tune.logprob_trials=8. Repeatable."),
        click.option("--out", type=click.Path(path_type=Path), default=Path("out/run"), show_default=True,
                     help="The run folder."),
        click.argument("recipe", required=False, type=click.Path(path_type=Path)),
    ):  # fmt: skip
        command = decorate(command)
    return command


_budget = click.option(
    "--budget",
    metavar="TIME",
    help="Time for the search, such as 90m or 2h, in place of its numbers of trials. What was measured in "
    "this folder is not measured again; 0 takes the best of it, and answers in full with that. The folder "
    "keeps the budget until `--budget none`, or until tune.logprob_trials or tune.finalists is set.",
)


_harmful_answers = click.option(
    "--harmful-answers",
    is_flag=True,
    help="Show the answers to harmful prompts in report.html, folded. Do not publish such a page.",
)


def _progress() -> TerminalProgress:
    from rich.console import Console

    from rs_gguf.cli.terminal import TerminalProgress

    return TerminalProgress(Console(stderr=True))


def _run(
    recipe: Path | None,
    out: Path,
    overrides: tuple[str, ...],
    fresh: bool,
    until: str,
    budget: str | None = None,
) -> dict[str, Any]:
    from rs_gguf.pipeline import recipe as recipes
    from rs_gguf.pipeline.run import run

    if budget is not None:
        overrides = (*overrides, f"tune.budget={budget}")
    kept = out / "recipe.toml"
    if recipe is None and kept.is_file():
        recipe = kept  # the default one would begin another run in this folder
    chosen = recipes.load(recipe, overrides)
    try:
        with contextlib.closing(_progress()) as progress:
            return run(chosen, out, fresh=fresh, progress=progress, until=until)
    except KeyboardInterrupt:
        once = "; without --fresh, once a stage has begun" if fresh else ""
        click.echo(f"Interrupted. It goes on where it was: give the command again{once}.", err=True)
        sys.exit(130)


@main.command("run")
@_run_options
@_budget
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json instead of the table.")
def run_command(
    recipe: Path | None,
    out: Path,
    overrides: tuple[str, ...],
    fresh: bool,
    budget: str | None,
    as_json: bool,
) -> None:
    """Run the whole pipeline; resume by itself.

    Without RECIPE: that of the run folder, in a new one the embedded default.
    Exit code 1 when no file passes the safety gate; the files are there all the same.
    """
    metrics = _run(recipe, out, overrides, fresh, "report", budget)
    if not metrics:  # one of several processes, which rank 0 speaks for
        return
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
    else:
        _print_metrics(metrics, out)
    if not any(file["acceptance"]["verdict"] == "passed" for file in metrics["files"].values()):
        sys.exit(1)


def _add_stage(info: StageInfo) -> None:
    name = info.name
    before = "" if name == "answer" else "Stages before it are done first if they are not yet. "
    help_text = f"{info.summary} {before}Without RECIPE: that of the run folder, in a new one the default."

    @main.command(name, help=help_text)
    @_run_options
    def stage(
        recipe: Path | None,
        out: Path,
        overrides: tuple[str, ...],
        fresh: bool,
        budget: str | None = None,
        harmful_answers: bool = False,
    ) -> None:
        metrics = _run(recipe, out, overrides, fresh, name, budget)
        if name == "score":
            _print_counts(out)
        if metrics and harmful_answers:
            from rs_gguf.report.page import write_report

            write_report(out, harmful_answers=True)

    if name == "tune":
        _budget(stage)
    if name == "report":
        _harmful_answers(stage)


for _info in STAGES.values():
    _add_stage(_info)


for _command in (
    cli_plan.plan, cli_eval.evaluate, cli_judge.judge,
    cli_vectors.check, cli_vectors.inspect, cli_vectors.convert, cli_vectors.combine,
):  # fmt: skip
    main.add_command(_command)


def _print_counts(out: Path) -> None:
    """How many were refused, by kind: hours before a fit may find too few of a class."""
    from rich.console import Console
    from rich.table import Table

    from rs_gguf.pipeline.folder import RunFolder
    from rs_gguf.pipeline.stages.answers import COUNTED, counts

    table = Table("prompts", *COUNTED, title="To fit and tune by", title_justify="left")
    for kind, found in counts(RunFolder(out)).items():
        table.add_row(kind, *map(str, found.values()))
    Console().print(table)


def _print_metrics(metrics: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from rs_gguf.cli.summary import print_results

    print_results(Console(), metrics, out)


@main.group()
def models() -> None:
    """Known small models, pinned by SHA-256."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def models_list(as_json: bool) -> None:
    """List the catalogue."""
    from rs_gguf.models.resolve import CATALOGUE

    rows: list[dict[str, Any]] = [
        {
            "name": m.name,
            "size": m.size,
            "licence": m.licence,
            "downloaded": m.path.is_file(),
            "summary": m.summary,
        }
        for m in CATALOGUE.values()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = "downloaded" if row["downloaded"] else "not downloaded"
        click.echo(
            f"{row['name']:<20} {row['size'] / 1e6:>6.0f} MB  {row['licence']:<11} {state:<14} {row['summary']}"
        )


@models.command("pull")
@click.argument("name")
def models_pull(name: str) -> None:
    """Fetch a model, verify it and print its path."""
    from rs_gguf.models.resolve import pull

    progress = _progress()
    try:
        click.echo(pull(name, progress=progress.download))
    finally:
        progress.close()


@models.command("path")
@click.argument("name")
def models_path(name: str) -> None:
    """Print where a model is, or exit with 2 if it is not downloaded."""
    from rs_gguf.models.resolve import path_of

    click.echo(path_of(name))
