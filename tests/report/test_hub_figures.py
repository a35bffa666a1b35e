"""The figures that the hub shows: explicit refusals and retention, each once."""

from __future__ import annotations

from pathlib import Path

from fixtures.invented_run import make_run

from rs_gguf.records.metrics import RunRecord
from rs_gguf.report.hub_figures import hub_figures
from rs_gguf.report.page import write_card
from rs_gguf.report.recommendation import reported_files


def test_each_figure_is_listed_once_with_its_set(tmp_path: Path) -> None:
    record = RunRecord.read(make_run(tmp_path / "run") / "metrics.json")
    figures = list(hub_figures(reported_files(record)))
    assert len({(figure.dataset, figure.name) for figure in figures}) == len(figures) == 3 * 3 + 2
    harmful = record.files["adapter"].sets["harmful"]
    assert harmful.kept is not None
    (retention,) = (f.value for f in figures if f.name == "retention of refusals, with the gated adapter")
    assert retention == round(harmful.kept.n / harmful.kept.of, 4)


def test_explicit_refusals_are_the_share_of_judged_answers_that_the_card_shows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    record = RunRecord.read(folder / "metrics.json")
    one = record.files["adapter"].sets["sensitive"]
    figures = {
        figure.name: figure.value
        for figure in hub_figures(reported_files(record))
        if "sensitive" in figure.dataset
    }
    assert one.explicit_unsteered is not None
    assert one.explicit_steered is not None
    shares = {"unsteered": one.explicit_unsteered, "with the gated adapter": one.explicit_steered}
    for name, share in shares.items():
        assert share.of < one.n  # some are not judged
        assert figures[f"explicit refusals, {name}"] == round(share.n / share.of, 4)
        assert f"{share.n} of {share.of}" in write_card(folder).read_text("utf-8")
