"""A scan asks prompts that a run fits on, says what is advisable, and shows no answer to a harmful prompt."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from fixtures.endpoints import Server, without_proxy_or_key
from fixtures.tiny_qwen3 import write_tiny_qwen3
from fixtures.tiny_run import LIKED, PLAIN_TEMPLATE, Judge

from rs_gguf.errors import InputError
from rs_gguf.models import resolve as models
from rs_gguf.pipeline import scan as scanning
from rs_gguf.pipeline.scan import advise, published, sample, scan
from rs_gguf.records.conversation import KINDS, Kind
from rs_gguf.records.metrics import Outcomes
from rs_gguf.records.scan import Advice, PublishedFile, ScanRecord

FILE = PublishedFile(
    path="vectors/a/a.gguf", word="gated adapter", effect="remove", verdict="passed",
    command="llama-server -m MODEL.gguf --lora vectors/a/a.gguf", model_sha256="",
)  # fmt: skip


def test_the_prompts_are_spread_and_never_held_out() -> None:
    prompts = sample()
    assert prompts == sample()
    assert Counter(prompt.kind for prompt in prompts) == dict.fromkeys(KINDS, 20)
    assert {prompt.split for prompt in prompts} == {"fit", "tune"}
    for kind in KINDS:
        assert len({prompt.subject for prompt in prompts if prompt.kind == kind}) >= 15


def outcomes(refuses: int = 0, *, fails: int = 0, unjudged: int = 0) -> Outcomes:
    complies = 20 - refuses - fails - unjudged
    return Outcomes(complies=complies, refuses=refuses, explicit=refuses // 2, fails=fails, unjudged=unjudged)


@pytest.mark.parametrize(
    ("sensitive", "harmful", "benign", "verdict", "advice", "says"),
    [
        (outcomes(8), outcomes(15), outcomes(), None, "run", "refuses 8 of 20 sensitive prompts, 4 of them"),
        (outcomes(8), outcomes(15), outcomes(), "passed", "file", "vectors/a/a.gguf"),
        (outcomes(8), outcomes(15), outcomes(), "failed", "run", "refuses 8 of 20"),
        (outcomes(1), outcomes(15), outcomes(), None, "nothing to remove", "refuses 1 of 20"),
        (outcomes(2), outcomes(15), outcomes(), None, "run", "refuses 2 of 20"),
        (outcomes(8), outcomes(0), outcomes(), None, "not possible", "none of 20 harmful ones"),
        (outcomes(8), outcomes(9), outcomes(fails=11), None, "not possible", "benign prompts fail: 11 of 20"),
        (outcomes(8), outcomes(9), outcomes(fails=10), None, "run", "refuses 8 of 20"),
        (outcomes(unjudged=20), outcomes(), outcomes(), None, "unclear", "more than 1024 --tokens"),
    ],
)
def test_what_is_advised(
    sensitive: Outcomes, harmful: Outcomes, benign: Outcomes, verdict: str | None, advice: str, says: str
) -> None:
    found: dict[Kind, Outcomes] = {"sensitive": sensitive, "harmful": harmful, "benign": benign}
    induces = FILE.model_copy(update={"effect": "induce"})
    files = [induces, FILE.model_copy(update={"verdict": verdict})] if verdict else [induces]
    assert advice in get_args(Advice)
    given, reason = advise(found, files)
    assert given == advice
    assert says in reason


def test_published_files_are_named_with_their_command() -> None:
    for file in published():
        assert file.command.startswith("llama-server -m MODEL.gguf --")
        assert file.path in file.command


@pytest.mark.slow
def test_a_scan_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxy_or_key(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "my model.gguf"
    write_tiny_qwen3(path, PLAIN_TEMPLATE, liked=LIKED, seed=2)
    judging = Judge()
    server = Server(judging, ["judge"])
    with pytest.raises(InputError, match="the model cannot answer"):
        scan(str(path), server.url)
    assert judging.judged == []  # not even the judge was tried

    own = FILE.model_copy(update={"model_sha256": models.fingerprint(path)})
    monkeypatch.setattr(scanning, "check_can_answer", lambda _: None)
    monkeypatch.setattr(scanning, "published", lambda: [FILE, own])
    record = scan(str(path), server.url, tokens=8)
    server.stop()
    assert record.model.name == "my model"
    assert record.tokens == 8
    assert [(kind, one.n) for kind, one in record.sets.items()] == [(kind, 20) for kind in KINDS]
    harmful, benign = (record.sets[kind].outcomes for kind in ("harmful", "benign"))
    assert harmful.complies == benign.refuses == 0
    assert harmful.refuses > 0
    assert benign.complies > 0
    assert {example.kind for example in record.examples} <= {"sensitive", "benign"}
    assert max(Counter(example.outcome for example in record.examples).values()) <= 2
    (file,) = record.files
    assert file.command == f"llama-server -m '{path}' --lora vectors/a/a.gguf"
    assert record.advice == "file"
    assert record.run is not None
    assert record.run.seconds > 0
    assert ScanRecord.model_validate_json(record.model_dump_json()) == record
