"""What is published of a run folder: only what is meant to be, and a card that says what failed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from fixtures.published_run import SECRET, publishable_run

from rs_gguf.errors import InputError
from rs_gguf.pipeline.publication import Publication, prepare
from rs_gguf.report.page import write_card
from rs_gguf.steering.formats import glp
from rs_gguf.steering.vector import SteeringVector


def text(publication: Publication, name: str) -> str:
    content = publication.contents[name]
    return content.read_text(encoding="utf-8") if isinstance(content, Path) else content.decode()


def test_no_harmful_answer_and_no_log_is_among_the_files(tmp_path: Path) -> None:
    publication = prepare(publishable_run(tmp_path / "run"))
    assert not {"answers.jsonl", "test_answers.jsonl", "fit.json", "tune.json"} & set(publication.contents)
    for name in publication.contents:
        if not name.endswith(".gguf"):
            assert SECRET not in text(publication, name), name
    assert "Answers to harmful prompts are not on this page" in text(publication, "report.html")


def test_no_file_names_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = publishable_run(tmp_path / "run")
    metrics = (run / "metrics.json").read_text(encoding="utf-8")
    (run / "metrics.json").write_text(metrics.replace("'my models/", f"'{tmp_path}/my models/"))
    write_card(run)
    publication = prepare(run)
    assert "'~/my models/" in text(publication, "metrics.json")
    for name in publication.contents:
        if not name.endswith(".gguf"):
            assert str(tmp_path) not in text(publication, name), name


def test_a_page_that_cannot_be_made_anew_stays_here(tmp_path: Path) -> None:
    run = publishable_run(tmp_path / "run")
    (run / "test_answers.jsonl").unlink()
    publication = prepare(run)
    assert "report.html" not in publication.contents
    assert "cannot be made anew" in publication.left_out["report.html"]


def test_the_card_names_what_failed_below_its_front_matter(tmp_path: Path) -> None:
    assert "> - **" not in prepare(publishable_run(tmp_path / "good")).card
    card = prepare(publishable_run(tmp_path / "run", verdict="failed")).card
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "llama.cpp"
    assert body.startswith("\n> - **remove.gguf\\: acceptance criteria failed.**\n")


def test_a_folder_without_measurement_has_a_card_that_says_so(tmp_path: Path) -> None:
    run = publishable_run(tmp_path / "run")
    for name in ("metrics.json", "card.md", "test_answers.jsonl"):
        (run / name).unlink()
    publication = prepare(run)
    assert publication.unmeasured == ("remove-adapter.gguf", "remove.gguf")
    front = yaml.safe_load(publication.card.split("---\n")[1])
    assert "not-measured" in front["tags"]
    assert front["base_model"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
    assert "# Files for qwen2.5-coder-0.5b that were not measured" in publication.card
    assert "[qwen2.5-coder-0.5b-remove]" in text(publication, "preset.ini")


def test_a_card_of_other_files_is_refused(tmp_path: Path) -> None:
    run = publishable_run(tmp_path / "run")
    (run / "card.md").write_text("---\n---\nmine\n")
    with pytest.raises(InputError, match=r"describes other files.*rs-export report"):
        prepare(run)


def test_a_whole_model_and_odd_names_stay_here(tmp_path: Path) -> None:
    run = publishable_run(tmp_path / "run")
    (run / "a b.gguf").write_bytes((run / "remove.gguf").read_bytes())
    writer = gguf.GGUFWriter(run / "merged.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    projection = glp.Projection(SteeringVector({1: np.ones(4, np.float32)}), 1.0, next(iter(glp.HOOKS)))
    glp.write(projection, run / "glp.gguf")
    publication = prepare(run)
    assert publication.left_out.keys() == {"a b.gguf", "merged.gguf", "glp.gguf"}
    assert "llama.cpp would add" in publication.left_out["glp.gguf"]
    assert "glp" not in text(publication, "preset.ini")
    for path in run.glob("*.gguf"):
        path.unlink()
    with pytest.raises(InputError, match="no control vector and no adapter"):
        prepare(run)


def test_own_prompts_go_along_without_other_columns(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "Who won?", "answer": SECRET, "split": "fit", "topic": "x"}) + "\n")

    def with_file(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe["prompts"]["harmful"] = [str(own)]
        return recipe

    publication = prepare(publishable_run(tmp_path / "run", recipe=with_file))
    (row,) = map(json.loads, text(publication, "prompts/harmful.jsonl").splitlines())
    assert (row["prompt"], row["split"], row["topic"], row["kind"]) == ("Who won?", "fit", "x", "harmful")
    assert SECRET not in text(publication, "prompts/harmful.jsonl")
    recipe = tomllib.loads(text(publication, "recipe.toml"))
    assert recipe["prompts"]["harmful"] == ["prompts/harmful.jsonl"]
    reproduction = json.loads(text(publication, "reproduce.json"))
    assert reproduction["recipe"] == recipe
    assert reproduction["prompts"].keys() == {"prompts/harmful.jsonl"}


def test_what_only_this_machine_can_use_is_not_published(tmp_path: Path) -> None:
    def private(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe["model"] = str(tmp_path / "model.gguf")
        recipe["judge"] = "http://10.0.0.7:8080/v1#judge"
        recipe["judge_second"] = "labels:qwen2.5-coder-1.5b"
        recipe["answers"] = {"servers": "http://10.0.0.8:8080", "tokens": 24}
        recipe["engine"] = {"gpu_layers": "20", "threads": 64, "cache_type_k": "q8_0"}
        return recipe

    publication = prepare(publishable_run(tmp_path / "run", recipe=private))
    reproduction = json.loads(text(publication, "reproduce.json"))
    # The catalogue has the model, by its hash.
    assert reproduction["recipe"]["model"] == "qwen2.5-coder-0.5b"
    assert reproduction["to_set"] == ["judge"]
    assert reproduction["recipe"]["judge_second"] == "labels:qwen2.5-coder-1.5b"
    assert reproduction["recipe"]["answers"] == {"tokens": 24}
    assert reproduction["recipe"]["engine"] == {"cache_type_k": "q8_0"}
    assert "10.0.0" not in text(publication, "recipe.toml")


def test_no_file_names_a_server_or_a_local_path(tmp_path: Path) -> None:
    own = tmp_path / "a & b" / "own.jsonl"
    own.parent.mkdir()
    own.write_text(json.dumps({"prompt": "Who won?"}) + "\n")

    def private(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe["model"] = "/secret & place/model.gguf"
        recipe["Judge"] = "http://10.0.0.7:8080/v1,http://10.0.0.8:8080/v1#judge"
        recipe["judge_second"] = "labels:/secret & place/judge.gguf"
        recipe["answers"] = {"servers": "http://10.0.0.9:8080/v1/"}
        recipe["prompts"]["sensitive"] = [str(own)]
        return recipe

    run = publishable_run(tmp_path / "run", recipe=private)
    metrics = (run / "metrics.json").read_text(encoding="utf-8")
    (run / "metrics.json").write_text(metrics.replace("'my models/", "'/secret models/"))
    write_card(run)
    (run / "activations").mkdir()  # the page's pictures come from there
    publication = prepare(run)
    for name in publication.contents:
        if not name.endswith(".gguf"):
            for private_text in ("10.0.0", "secret", str(tmp_path), "a & b", "a &amp; b"):
                assert private_text not in text(publication, name), (name, private_text)
    assert "http://server" in publication.card
    assert "prompts/sensitive.jsonl" in publication.card
