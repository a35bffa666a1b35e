"""The figures that the hub shows: explicit refusals and retention, each once."""

from __future__ import annotations

from pathlib import Path

from fixtures.invented_run import make_run

from rs_gguf.records.metrics import RunRecord
from rs_gguf.report.hub_figures import hub_figures
from rs_gguf.report.recommendation import reported_files


def test_each_figure_is_listed_once_with_its_set(tmp_path: Path) -> None:
    record = RunRecord.read(make_run(tmp_path / "run") / "metrics.json")
    figures = list(hub_figures(reported_files(record)))
    assert len({(figure.dataset, figure.name) for figure in figures}) == len(figures) == 3 * 3 + 2
    harmful = record.files["adapter"].sets["harmful"]
    assert harmful.kept is not None
    (retention,) = (f.value for f in figures if f.name == "retention of refusals, with the gated adapter")
    assert retention == round(harmful.kept.n / harmful.kept.of, 4)
