"""Define the command group `rs-export`, with `run` and the stages.

Each command parses its options, calls one function and prints the result. Heavy imports wait until a command
needs them.
"""

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
from rs_gguf.cli import files as cli_files
from rs_gguf.cli import judge as cli_judge
from rs_gguf.cli import merge as cli_merge
from rs_gguf.cli import models as cli_models
from rs_gguf.cli import plan as cli_plan
from rs_gguf.cli import push as cli_push
from rs_gguf.cli import remeasure as cli_remeasure
from rs_gguf.cli import scan as cli_scan
from rs_gguf.cli import try_page as cli_try
from rs_gguf.cli.engine_options import EngineOptions, engine_options
from rs_gguf.cli.extras import missing_extra
from rs_gguf.errors import InputError, RsGgufError, escape_control_chars
from rs_gguf.records.artefacts import LAST, STAGES, StageInfo
from rs_gguf.version import __version__

if TYPE_CHECKING:
    from rs_gguf.pipeline.reproduce import Reproduction


class _Group(click.Group):
    """The command group: prints an error as one message, sets the exit code, lists the stages separately."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if name not in STAGES] + list(STAGES)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        limit = formatter.width - 6 - width
        named = [
            (f"{name:<{width}}", self.commands[name].get_short_help_str(limit))
            for name in self.list_commands(ctx)
        ]
        n_commands = len(named) - len(STAGES)
        for title, rows in (
            ("Commands", named[:n_commands]),
            ("Stages of `run`", named[n_commands:]),
        ):
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RsGgufError as error:
            # A message may quote names and texts from files and servers.
            click.echo("\n".join(map(escape_control_chars, f"Error: {error}".split("\n"))), err=True)
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            click.echo(f"Error: {missing_extra(error)}", err=True)
            ctx.exit(2)
        except BrokenPipeError:
            raise  # click then exits without a message
        except OSError as error:
            where = escape_control_chars(str(error.filename or "the output"))
            click.echo(f"Error: {where}: {error.strerror or error}.", err=True)
            ctx.exit(2)
        except MemoryError:
            click.echo("Error: not enough memory. Use a smaller model or fewer prompts.", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rs-export")
def main() -> None:
    """Refusal Steering for llama.cpp: control vectors and gated adapters (LoRA), fitted and measured."""
    # File names need not be UTF-8. Escape characters that stdout cannot write, as stderr does.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in (  # the help lists them in reverse order
        click.option("--fresh", is_flag=True,
                     help="Start over: discard earlier results in the folder."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                     help="Override a recipe value, for example tune.logprob_trials=8. Repeatable."),
        click.option("--out", type=click.Path(path_type=Path), default=Path("out/run"), show_default=True,
                     help="Run folder."),
        click.argument("recipe", required=False, type=click.Path(path_type=Path)),
    ):  # fmt: skip
        command = decorate(command)
    return command


_budget = click.option(
    "--budget",
    metavar="TIME",
    help="Time for the search, such as 90m or 2h, in place of the numbers of trials. Earlier trials count; 0 "
    "runs no new ones. The folder keeps the budget until `--budget none`, or until tune.logprob_trials or "
    "tune.finalists is set.",
)


_harmful_answers = click.option(
    "--harmful-answers",
    is_flag=True,
    help="Show the answers to harmful prompts in report.html, folded. Do not publish such a page.",
)


_second_judge = click.option(
    "--second-judge",
    metavar="J",
    help="Second judge of the validation answers, a local model (judge_second).",
)


def _fetch(repository: str, recipe: Path | None, out: Path, overrides: tuple[str, ...]) -> Reproduction:
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.pipeline.reproduce import fetch

    if recipe is not None:
        raise InputError("give either RECIPE or --from: the repository has a recipe of its own.")
    with contextlib.closing(TerminalProgress()) as progress:
        return fetch(repository, out, overrides, progress.download)


def _with_options(
    overrides: tuple[str, ...], budget: str | None, second_judge: str | None, engine: EngineOptions
) -> tuple[str, ...]:
    """Return the overrides with the ones of `--budget`, `--second-judge` and the engine's options."""
    options = {"tune.budget": budget, "judge_second": second_judge}
    given = (f"{key}={value}" for key, value in options.items() if value is not None)
    return (*overrides, *given, *engine.overrides())


def _run(
    recipe: Path | None,
    out: Path,
    overrides: tuple[str, ...],
    fresh: bool,
    until: str,
    *,
    repeat: bool = True,
) -> dict[str, Any]:
    from rs_gguf.cli.terminal import TerminalProgress
    from rs_gguf.pipeline import recipe as recipes
    from rs_gguf.pipeline.run import run

    stored = out / "recipe.toml"
    if recipe is None and stored.is_file():
        recipe = stored  # the default recipe would start a different run in this folder
    settings = recipes.load(recipe, overrides)
    try:
        with contextlib.closing(TerminalProgress()) as progress:
            return run(settings, out, fresh=fresh, repeat=repeat, progress=progress, until=until)
    except KeyboardInterrupt:
        note = ", without --fresh if a stage has begun" if fresh else ""
        click.echo(f"Interrupted. To continue, give the command again{note}.", err=True)
        sys.exit(130)


@main.command("run")
@_run_options
@_budget
@_second_judge
@click.option(
    "--from",
    "repository",
    metavar="OWNER/NAME",
    help="Repeat a run published with `rs-export push`, in --out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json instead of the table.")
@engine_options
def run_command(
    recipe: Path | None,
    out: Path,
    overrides: tuple[str, ...],
    fresh: bool,
    budget: str | None,
    second_judge: str | None,
    repository: str | None,
    as_json: bool,
    engine: EngineOptions,
) -> None:
    """Run the whole pipeline; resume an interrupted run.

    Without RECIPE, uses the recipe of the run folder, or the embedded default in a new folder.
    Exit code 1 if no file meets the acceptance criteria; the files are written nevertheless.
    """
    overrides = _with_options(overrides, budget, second_judge, engine)
    published = _fetch(repository, recipe, out, overrides) if repository is not None else None
    metrics = _run(recipe, out, overrides, fresh, LAST)
    if not metrics:  # one of several processes; only rank 0 prints
        return
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
    else:
        _print_metrics(metrics, out)
    for line in published.differences(out) if published else ():
        click.echo(line, err=True)
    if not _any_passed(metrics, out):
        sys.exit(1)


def _add_stage(info: StageInfo) -> None:
    name = info.name
    before = "" if name == "answer" else "Runs earlier stages first if needed. "
    if name == LAST:
        before = "Runs missing stages first, but repeats none. "
    help_text = (
        f"{info.summary} {before}Without RECIPE, uses the recipe of the run folder, or the default in a new "
        "folder."
    )

    @main.command(name, help=help_text)
    @_run_options
    @engine_options
    def stage(
        recipe: Path | None,
        out: Path,
        overrides: tuple[str, ...],
        fresh: bool,
        engine: EngineOptions,
        budget: str | None = None,
        second_judge: str | None = None,
        harmful_answers: bool = False,
    ) -> None:
        overrides = _with_options(overrides, budget, second_judge, engine)
        # A report takes seconds. After an update of the program, earlier stages might take hours again.
        metrics = _run(recipe, out, overrides, fresh, name, repeat=name != LAST)
        if name == "score":
            from rs_gguf.cli.summary import print_counts

            print_counts(out)
        if metrics and harmful_answers:
            from rs_gguf.report.page import write_report

            write_report(out, harmful_answers=True)

    if name == "tune":
        _budget(stage)
    if name == "measure":
        _second_judge(stage)
    if name == "report":
        _harmful_answers(stage)


for _info in STAGES.values():
    _add_stage(_info)


for _command in (
    cli_scan.scan, cli_plan.plan, cli_eval.evaluate, cli_remeasure.remeasure, cli_judge.judge,
    cli_try.try_page, cli_files.check, cli_files.inspect, cli_files.convert, cli_files.combine,
    cli_merge.merge, cli_push.push, cli_models.models,
):  # fmt: skip
    main.add_command(_command)


def _any_passed(metrics: dict[str, Any], out: Path) -> bool:
    from rs_gguf.records.metrics import RunRecord
    from rs_gguf.report.recommendation import files_in

    record = RunRecord.of(metrics, out / "metrics.json")
    return any(file.passed for file in files_in(out, record))


def _print_metrics(metrics: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from rs_gguf.cli.summary import print_results

    print_results(Console(), metrics, out)
