"""`rs-export judge`: rows come out in order while others still arrive; names and counts go to stderr."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fixtures.children import rs_export
from fixtures.endpoints import Reply, Server, entry, said, without_proxy_or_key

from rs_gguf.cli.judge import _BATCH
from rs_gguf.cli.main import main
from rs_gguf.judges.pairs import held_out_pairs, label_agreement


def invoke(*arguments: str, rows: list[Any] | None = None) -> tuple[int, str, str]:
    stdin = None if rows is None else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    result = CliRunner().invoke(main, ["judge", "--judge", "keywords", *arguments], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def test_rows_come_out_while_the_pipe_is_still_open() -> None:
    with rs_export("judge", "--judge", "keywords") as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        for k in range(_BATCH):
            process.stdin.write(
                json.dumps({"prompt": "p", "answer": f"Sorry {k}" if k % 3 else "", "k": k}) + "\n"
            )
        process.stdin.flush()
        judged = [json.loads(process.stdout.readline()) for _ in range(_BATCH)]
        process.stdin.write('{"prompt": "p", "answer": "Yes.", "k": "last"}\n')
        process.stdin.close()
        rest = [json.loads(line) for line in process.stdout]
        log = process.stderr.read()
    assert process.returncode == 0
    empty = len(range(0, _BATCH, 3))
    # Rows that a rule decides are ready early, but wait for the rows before them.
    assert [row["k"] for row in judged] == list(range(_BATCH))
    assert [(row["k"], row["verdict"]) for row in rest] == [("last", "answer")]
    assert log.splitlines() == [
        "Judge: keywords",
        f"{_BATCH + 1} rows: {_BATCH - empty} refusal, 1 answer, {empty} failure, 0 unclear, 0 unjudged",
    ]


def test_ctrl_c_waits_for_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxy_or_key(monkeypatch)
    hangs, released = threading.Event(), threading.Event()

    def behave(body: dict[str, Any]) -> Reply:
        if "slow" in body["messages"][0]["content"]:
            hangs.set()
            released.wait(300)
        return said("answer", [entry("answer", -0.1, {"answer": -0.1})])

    with contextlib.ExitStack() as stack:
        server = Server(behave, ["judge"])
        stack.callback(server.stop)
        options = ["--judge", server.url, "--no-cache", "--concurrency", "1"]
        process = stack.enter_context(rs_export("judge", *options))
        stack.callback(released.set)  # release the endpoint first, or a waiting process would never end
        assert process.stdin
        assert process.stdout
        for answer in ("fast", "slow", "never sent"):
            process.stdin.write(json.dumps({"prompt": "p", "answer": answer}) + "\n")
        process.stdin.close()
        assert json.loads(process.stdout.readline())["verdict"] == "answer"
        assert hangs.wait(100)
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130
        assert not released.is_set()
        assert len(server.asked) == 3  # a trial request and two rows


def test_thinking_traces_are_not_judged() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "answer": "<think>Sorry, I cannot.</think>\n\nParis."},
        {"prompt": "p", "answer": "<think>Let me see."},
        {"prompt": "p", "answer": "<think>Easy.</think>Sorry, no."},
        {"prompt": "p", "answer": "", "finished": False},  # a run's row, truncated within its trace
        {"prompt": "p", "answer": "", "finished": True},
        {
            "prompt": "p",
            "answer": "<think>Hm.</think>",
            "finished": True,
        },  # an empty answer from another tool
    ]
    code, stdout, stderr = invoke(rows=rows)
    judged = [json.loads(line) for line in stdout.splitlines()]
    assert code == 0
    assert [row["verdict"] for row in judged] == [
        "answer",
        "unclear",
        "refusal",
        "unclear",
        "failure",  # empty answers
        "failure",
    ]
    assert [row["confidence"] for row in judged] == [-1.0, None, 1.0, None, 1.0, 1.0]
    assert "2 unjudged" in stderr
    assert [row["answer"] for row in judged] == [row["answer"] for row in rows]


def test_a_file_in_and_a_file_out(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out" / "judged.jsonl"
    rows = [{"prompt": "你好", "answer": f"line\u2028{k}", "own": [k]} for k in range(300)]
    source.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    code, stdout, _ = invoke("--input", str(source), "--output", str(target))
    assert (code, stdout) == (0, "")
    judged = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
    assert [{key: row[key] for key in rows[0]} for row in judged] == rows
    assert {row["mode"] for row in judged} == {"keywords"}
    assert all(set(row) == {*rows[0], "confidence", "verdict", "mode", "category"} for row in judged)


@pytest.mark.parametrize(
    "bad", ["[]", "3", "null", '{"prompt": "p"}', '{"prompt": "p", "answer": null}', "{", "[" * 100_000]
)
def test_a_file_with_a_bad_row_is_refused_before_anything_is_judged(tmp_path: Path, bad: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "p", "answer": "a"}\n' * 200 + bad + "\n")
    code, _, stderr = invoke("--input", str(source), "--output", str(target))
    assert code == 2
    assert "in.jsonl:201" in stderr
    assert not target.exists()


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_rows(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(data)
    code, _, stderr = invoke("--input", str(tmp_path / "in.jsonl"))
    assert code == 2
    assert "in.jsonl" in stderr
    assert "Traceback" not in stderr


def test_files_from_windows_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    row = '{"prompt": "p", "answer": "Sorry"}\n'
    (tmp_path / "in.jsonl").write_text(row, encoding="utf-8-sig")
    for source in (str(tmp_path / "in.jsonl"), "-"):
        result = CliRunner().invoke(
            main, ["judge", "--judge", "keywords", "--input", source], input=row.encode("utf-8-sig")
        )
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["verdict"] == "refusal"


@pytest.mark.parametrize("address", ["http://[::1/v1#m", "http://a..b/v1#m"])
def test_an_invalid_address_is_one_clear_error(address: str) -> None:
    code, stdout, stderr = invoke("--judge", address, rows=[{"prompt": "p", "answer": "a"}])
    assert (code, stdout) == (2, "")
    assert stderr.startswith("Error: ")
    assert "not the address of a server" in stderr


def test_pairs_are_accepted_only_with_agreement() -> None:
    code, _, stderr = invoke("--pairs", "100", rows=[{"prompt": "p", "answer": "a"}])
    assert code == 2
    assert "--agreement" in stderr


def test_half_a_surrogate_pair_is_judged_and_written_as_it_came(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(r'{"prompt": "\ud83d", "answer": "Sorry \udc00"}' + "\n")
    code, _, _ = invoke("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert code == 0
    judged = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert (judged["prompt"], judged["answer"], judged["verdict"]) == ("\ud83d", "Sorry \udc00", "refusal")


def test_agreement_is_printed_beside_the_agreement_of_the_labels() -> None:
    code, stdout, _ = invoke("--agreement")
    assert code == 0
    figures = json.loads(stdout)
    test = held_out_pairs()
    assert (figures["judge"], figures["n"], figures["unparseable"]) == ("keywords", len(test), 0)
    assert 0.5 < figures["accuracy"] < 0.9  # keywords are well above chance and well below a model
    assert figures["labels"] == label_agreement()
    # A sample for slow judges is spread over all categories.
    code, stdout, _ = invoke("--agreement", "--pairs", "100")
    sample = json.loads(stdout)
    assert (code, sample["n"]) == (0, 100)
    assert len(sample["by_category"]) == 16
