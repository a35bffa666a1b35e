"""What people look at after a run: `report.html`, one self-contained page, and `card.md`, a model card.

A measured run folder goes in (`report.results`). All its text is untrusted, model answers above all. It is
made printable when read and escaped by the template engine when written. The page's content policy lets only
the page's own script run.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import jinja2

from rs_gguf.errors import InputError
from rs_gguf.evaluation import acceptance
from rs_gguf.evaluation.allowance import Allowance
from rs_gguf.models import resolve as models
from rs_gguf.records.artefacts import STAGES
from rs_gguf.records.conversation import KINDS
from rs_gguf.records.files import write_text
from rs_gguf.records.rows import Row
from rs_gguf.report import agreement, answers, breakdowns, geometry, plots, recommendation, scale_sweep
from rs_gguf.report.front_ends import FrontEnd, front_ends
from rs_gguf.report.hub_figures import hub_figures
from rs_gguf.report.recommendation import ReportedFile
from rs_gguf.report.results import Results, load
from rs_gguf.report.side_effects import agreement_line, side_effects
from rs_gguf.report.text import file_name, html_environment, markdown_environment
from rs_gguf.steering.file import llama_options
from rs_gguf.version import __version__


def write_report(run_folder: Path, *, harmful_answers: bool = False) -> Path:
    """Write `report.html` into a measured run folder and return its path.

    harmful_answers: show the answers to harmful prompts, folded. Without it a page can be published.

    Raises:
        InputError: a result file is missing or not what the stages write.
    """
    folder = Path(run_folder)
    run = load(folder)

    def context() -> Row:
        common = _common(run)
        files: list[ReportedFile] = common["files"]
        vector = run.record.files.get("vector")
        charts = plots.layer_charts(run.fit, vector) if vector else []
        curves = scale_sweep.measured(run.sweeps, run.rows, files)
        drawn = {chart["key"] for chart in curves}
        tune = plots.shown(run.tune)
        auroc = plots.own_line(charts, "auroc")
        return {
            **common,
            "harmful_answers": harmful_answers,
            "examples": answers.examples(
                run.rows, common["ordered"][0], run.record.effect, harmful=harmful_answers
            ),
            "rule": acceptance,
            "limits_in_force": _limits_in_force(run),
            "trials": tune["trials"],
            "tried": len(run.tune["trials"]),
            "selected": set(tune["selected"].values()),
            "plot": plots.trade_off(tune, files, run.record.effect) if tune["trials"] else None,
            "curves": curves,
            "curve_options": scale_sweep.options(run.recipe, run.record.test_tokens),
            "strengths": [c for c in scale_sweep.searched(tune, files) if c["file"].key not in drawn],
            "charts": charts,
            "vector": vector,
            "samples": run.fit.get("samples", {}),
            "cosines": geometry.cosine_map(folder, vector) if vector else None,
            "scatter": geometry.scatter(folder, vector, auroc, run.fitted) if vector else None,
            "judge": agreement.of_judge(run.record.judge.name, folder),
            "unjudged": answers.unjudged(run.rows, files),
            "breakdowns": breakdowns.breakdowns(run.rows, files),
            "answers": answers.side_by_side(run.rows, files, harmful=harmful_answers),
        }

    template = html_environment().get_template("report.html.jinja")
    return _render(folder / "report.html", template, context)


def write_card(run_folder: Path) -> Path:
    """Write `card.md`, a Hugging Face model card, into a measured run folder and return its path.

    Raises:
        InputError: a result file is missing or not what the stages write.
    """
    run = load(Path(run_folder))

    def context() -> Row:
        sha256, common = run.record.model.sha256, _common(run)
        source = models.public_source(str(run.recipe.get("model", models.DEFAULT)), sha256)
        return {
            **common,
            "base_model": source[0] if source else None,
            "figures": list(hub_figures(common["files"])),
            "examples": answers.examples(run.rows, common["ordered"][0], run.record.effect, harmful=False),
            "known": models.with_hash(sha256),
            "languages": answers.languages(run.rows),
        }

    template = markdown_environment().get_template("card.md.jinja")
    return _render(Path(run_folder) / "card.md", template, context)


def _render(path: Path, template: jinja2.Template, context: Callable[[], Row]) -> Path:
    try:
        text = template.render(context())
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"cannot make {path}: metrics.json, test_answers.jsonl, tune.json or fit.json has another shape "
            f"than this version writes ({error}). Run `rs-export run` on the folder again."
        ) from error
    write_text(path, text)
    return path


def _given(prompts: Row) -> Row:
    """Return what the recipe says of prompts, its files by their names."""
    return prompts | {kind: list(map(file_name, prompts[kind])) for kind in KINDS if prompts.get(kind)}


def _limits_in_force(run: Results) -> acceptance.SafetyRule:
    """Return the limits that decided; the recipe's hold where they are stricter than the defaults."""
    names = ("min_retention", "max_benign_drift", "min_top1")
    limits = {name: value for name, value in run.recipe.get("tune", {}).items() if name in names}
    return acceptance.SafetyRule(run.record.effect, **limits).under(Allowance.REPORTED)


def _front_ends(file: ReportedFile) -> list[FrontEnd]:
    """Return the recipes for a file by its name: a card is read where no run folder is."""
    record, off = file.record, file.record.llama_cpp.reasoning_off
    name, is_vector = shlex.quote(record.file), file.is_vector
    options = llama_options(name, record.layers, is_vector=is_vector, reasoning_off=off)
    return front_ends(record.file, options, is_vector=is_vector, reasoning_off=off)


def _common(run: Results) -> Row:
    effect = run.record.effect
    files = recommendation.reported_files(run.record, run.sealed)
    best = recommendation.recommended_file(files, effect)
    return {
        "m": run.record,
        "sealed": run.sealed,
        "sealed_agreement": agreement_line(run.sealed.judge) if run.sealed else "",
        "files": files,
        "best": best,
        "verdict": recommendation.overall_verdict(files),
        "ordered": recommendation.by_merit(files, effect),
        "baselines": run.record.baselines,
        "headline": recommendation.headline(files, effect),
        "sentences": recommendation.sentences(files, effect),
        "trials": run.tune["trials"],
        "recipe": run.recipe,
        "recipe_text": run.recipe_text,
        "given": _given(run.recipe.get("prompts", {})),
        "front_ends": {file.key: _front_ends(file) for file in files},
        "side_effects": side_effects,
        "agreement": agreement_line(run.record.judge),
        "limits": run.recipe.get("tune", {}),
        "temperature": run.recipe.get("answers", {}).get("temperature"),
        "stages": STAGES,
        "version": __version__,
    }
