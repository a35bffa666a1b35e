"""The cache: no pair is judged twice, no judgement is lost, and several processes may share the file."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from rs_gguf.errors import InputError
from rs_gguf.judges import cache
from rs_gguf.judges.cache import CachedJudge
from rs_gguf.judges.judge import Pair
from rs_gguf.records.conversation import Judgement


class Counting:
    """A judge that grades by the answer's length and records the pairs that it gets."""

    name, usage = "counting", None

    def __init__(self, identity: str = "one") -> None:
        self.identity, self.pairs = identity, list[Pair]()

    def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
        for i in reversed(range(len(pairs))):
            self.pairs.append(pairs[i])
            answer = pairs[i][1]
            confidence = None if answer is None else len(answer) / 100
            yield i, Judgement(confidence, "counted", "direct" if confidence else None)


PAIRS: list[Pair] = [("p", "a"), ("p", "bb"), ("q", "a"), ("p", "a"), ("pa", "")]


def test_a_judged_pair_is_not_judged_again(tmp_path: Path) -> None:
    first, again = Counting(), Counting()
    path = tmp_path / "deep" / "cache.sqlite3"
    judgements = dict(CachedJudge(first, path).judge(PAIRS))
    assert dict(CachedJudge(again, path).judge(PAIRS)) == judgements
    assert judgements == {i: dict(Counting().judge(PAIRS))[i] for i in range(len(PAIRS))}
    assert len(first.pairs) == 4  # the repeated pair was judged once
    assert again.pairs == []
    more = dict(CachedJudge(again, path).judge([*PAIRS, ("new", "ccc")]))
    assert again.pairs == [("new", "ccc")]
    assert more[5].confidence == 0.03


def test_another_judge_prompt_or_answer_is_another_entry(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    list(CachedJudge(Counting(), path).judge([("p", "ab")]))
    other = Counting("two")
    list(CachedJudge(other, path).judge([("p", "ab")]))
    assert len(other.pairs) == 1
    quantised, again = Counting(), Counting()
    list(CachedJudge(quantised, path, variant="--cache-type-k q8_0").judge([("p", "ab")]))
    list(CachedJudge(again, path, variant="").judge([("p", "ab")]))
    assert (len(quantised.pairs), len(again.pairs)) == (1, 0)
    same = Counting()
    # The boundary between prompt and answer matters.
    list(CachedJudge(same, path).judge([("pa", "b"), ("p", "ab "), ("P", "ab")]))
    assert len(same.pairs) == 3


def test_a_failed_judgement_is_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        judge = Counting()
        [(_, judgement)] = CachedJudge(judge, tmp_path / "cache").judge([("p", None)])
        assert (judgement.confidence, len(judge.pairs)) == (None, 1)


def _die_in_the_middle(path: Path, pairs: list[Pair]) -> None:
    for count, _ in enumerate(CachedJudge(Counting(), path).judge(pairs), start=1):
        if count == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_loses_no_finished_judgement(tmp_path: Path) -> None:
    pairs: list[Pair] = [("p", "a" * k) for k in range(1, 11)]
    process = multiprocessing.get_context("spawn").Process(
        target=_die_in_the_middle, args=(tmp_path / "cache", pairs)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    rest = Counting()
    assert len(dict(CachedJudge(rest, tmp_path / "cache").judge(pairs))) == 10
    assert len(rest.pairs) == 4


def test_leaving_the_loop_early_keeps_finished_judgements(tmp_path: Path) -> None:
    pairs: list[Pair] = [("p", "a" * k) for k in range(1, 6)]
    judgements = CachedJudge(Counting(), tmp_path / "cache").judge(pairs)
    next(judgements), next(judgements)
    judgements.close()  # type: ignore[attr-defined]
    rest = Counting()
    list(CachedJudge(rest, tmp_path / "cache").judge(pairs))
    assert len(rest.pairs) == 3


def _fill(path: Path, start: int) -> None:
    pairs: list[Pair] = [("p", "a" * k) for k in range(start, start + 60)]
    judgements = dict(CachedJudge(Counting(), path).judge(pairs))
    assert all(judgements[i].confidence == (start + i) / 100 for i in range(60))


@pytest.mark.slow
def test_processes_share_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    path = tmp_path / "cache"
    workers = [context.Process(target=_fill, args=(path, start)) for start in (1, 21, 41)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    after = Counting()
    list(CachedJudge(after, path).judge([("p", "a" * k) for k in range(1, 101)]))
    assert after.pairs == []


def test_a_new_file_that_another_process_has_locked_is_used_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: other.execute("COMMIT"))
    monkeypatch.setattr(cache, "time", clock)
    monkeypatch.setattr(cache, "_WAIT", 0.0)  # SQLite does not wait if two processes change the file at once
    assert len(dict(CachedJudge(Counting(), path).judge(PAIRS))) == len(PAIRS)
    other.close()


@pytest.mark.parametrize("confidence", [math.nan, math.inf])
def test_a_confidence_that_is_not_finite_is_none_and_not_kept(tmp_path: Path, confidence: float) -> None:
    class Broken(Counting):
        def judge(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Judgement]]:
            yield 0, Judgement(confidence, "made")

    [(_, judgement)] = CachedJudge(Broken(), tmp_path / "cache").judge([("p", "a")])
    assert (judgement.confidence, judgement.verdict) == (None, "unclear")
    assert str(confidence) in judgement.mode


def test_it_keeps_no_text(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    list(CachedJudge(Counting(), path).judge([("my secret prompt", "my secret answer")]))
    assert all(b"secret" not in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize("spoil", ["text", "other table", "folder"])
def test_a_file_that_is_not_a_cache_is_an_error(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "cache"
    if spoil == "text":
        path.write_text("this is not a database " * 100)
    elif spoil == "folder":
        path.mkdir()
    else:
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE judgements (other TEXT)")
        database.close()
    with pytest.raises(InputError, match="Delete the file"):
        list(CachedJudge(Counting(), path).judge(PAIRS))


def test_name_and_identity_equal_the_judges(tmp_path: Path) -> None:
    cached = CachedJudge(Counting("i"), tmp_path / "cache")
    assert (cached.name, cached.identity, cached.usage) == ("counting", "i", None)
