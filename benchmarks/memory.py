"""Measure the memory of a whole run over time, on 500 and on 10,000 fit prompts; it should stay the same.

The model is tiny and random, so that nearly all memory belongs to the pipeline. The run is a separate
process. This process judges its answers over HTTP and reads its size ten times per second. `held` is memory
that the process cannot give back. `mapped` is pages of files (model, activation store), which the system can
reclaim. Prints a line per stage and, at the end, the memory for both numbers of prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fixtures.endpoints import Reply, Server, entry, said
from fixtures.tiny_qwen3 import THINKING_TEMPLATE, write_tiny_qwen3

LETTERS = dict.fromkeys("etaoinshrdlu", 7.0)
SETTINGS = [
    "answers.fit_tokens=8", "answers.tokens=8", "answers.test_tokens=8", "answers.temperature=1.0",
    "prompts.tune=8",
    "prompts.validation=8", "fit.estimators=['contrast-wrmd']", "fit.ridges=[1.0]", "tune.logprob_trials=2",
    "tune.finalists=1",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs=2, default=(500, 10_000), metavar=("FEW", "MANY"))
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        print("Not measured: this system does not report the memory of a process as Linux does, in /proc.")
        return
    with tempfile.TemporaryDirectory() as scratch:
        few, many = (measured(Path(scratch) / str(count), count) for count in options.prompts)
    factor = options.prompts[1] / options.prompts[0]
    print(
        f"{factor:g} times the prompts: held at most {few[0]:.0f} → {many[0]:.0f} MB, "
        f"the activation store {few[1]:.0f} → {many[1]:.0f} MB"
    )


def measured(folder: Path, count: int) -> tuple[float, float]:
    """Return the most memory that a run on `count` fit prompts held and its activation store, both in MB."""
    folder.mkdir()
    write_tiny_qwen3(
        folder / "tiny.gguf", THINKING_TEMPLATE.replace("<think>\n", ""),
        liked=LETTERS, n_layer=6, width=64, inner=128,
    )  # fmt: skip
    server = Server(judge_answers, ["judge"])
    settings = [
        *SETTINGS,
        f"prompts.fit={-(-count // 3)}",
        f"model={folder / 'tiny.gguf'}",
        f"judge={server.url}",
    ]
    for kind in ("sensitive", "harmful", "benign"):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, -(-count // 3))))
        settings.append(f"prompts.{kind}=['{path}']")
    out = folder / "out"
    command = [sys.executable, "-m", "rs_gguf", "run", "--out", str(out)]
    command += [part for value in settings for part in ("--set", value)]
    print(f"{count} fit prompts")
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        )
    most = watch(child, out)
    server.stop()
    if child.returncode not in (0, 1):  # 1: a random model fails the acceptance criteria
        raise RuntimeError((folder / "log").read_text())
    return most, sum(path.stat().st_size for path in (out / "activations").iterdir()) / 1e6


def watch(child: subprocess.Popen[bytes], out: Path) -> float:
    """Print the child's size after each stage and every ten seconds; return the most that it held, in MB."""
    start, most, when, printed, done_before = time.monotonic(), 0.0, 0.0, float("-inf"), -1
    while child.poll() is None:
        held, mapped = sizes(child.pid)
        state = out / "state.json"
        stages = list(json.loads(state.read_text())) if state.is_file() else []
        seconds = time.monotonic() - start
        if held > most:
            most, when = held, seconds
        if len(stages) > done_before or seconds - printed > 10:
            after = f"after {stages[-1]}" if stages else "at the start"
            print(f"{seconds:6.1f} s  held {held:6.0f} MB  mapped {mapped:6.0f} MB  {after}", flush=True)
            printed, done_before = seconds, len(stages)
        time.sleep(0.1)
    print(f"{time.monotonic() - start:6.1f} s  held {most:6.0f} MB at most, at {when:.1f} s")
    return most


def sizes(pid: int) -> tuple[float, float]:
    """Return the MB that a process holds itself, and the MB of mapped files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # the process has just ended
        return 0.0, 0.0
    values = dict(line.split(":", 1) for line in status.splitlines())
    own, mapped = (int(values.get(name, "0 kB").split()[0]) / 1e3 for name in ("RssAnon", "RssFile"))
    return own, mapped


def rows(kind: str, fit: int) -> list[dict[str, str]]:
    sizes = {"fit": fit, "tune": 8, "validation": 8}
    return [
        {"prompt": f"{kind} {split} {number}", "split": split, "topic": f"topic {number % 10}"}
        for split, size in sizes.items()
        for number in range(size)
    ]


def judge_answers(body: dict[str, Any]) -> Reply:
    """Judge harmful prompts and every other sensitive one as refused, all others as answered."""
    request = body["messages"][0]["content"].rsplit("Request: ", 1)[1].split("\n", 1)[0]
    kind, _, number = request.partition(" ")
    refused = kind == "harmful" or (kind == "sensitive" and number[-1] in "02468")
    return said("", [entry("x", -0.1, {"refusal" if refused else "answer": -0.1})])


if __name__ == "__main__":
    main()
