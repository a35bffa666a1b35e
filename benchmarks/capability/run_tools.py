"""Run the tasks of this folder through lm-evaluation-harness and Inspect, unsteered and steered.

Two llama-servers run side by side, one for each side. Both tools solve the tasks greedily on each of them. It
prints the number of solved tasks by tool and task, and the paired changes with the exact McNemar p-value.
`make capability` installs the tools into an environment of their own and runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from rs_gguf.evaluation.paired_statistics import mcnemar
from rs_gguf.machine import usable_cores
from rs_gguf.models import resolve as models
from rs_gguf.models.q8_copy import file_to_load

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from fixtures import binaries

ROOT = Path(__file__).parents[2]
TASKS = Path("benchmarks", "capability")  # as the definitions name it: the tools run in ROOT
ADAPTER = Path("vectors", "qwen2.5-coder-0.5b-remove", "remove-adapter.gguf")
NAMES = ("own_gsm8k", "own_ifeval", "own_mmlu")
Solved = dict[int, bool]  # by the number of the task's row, from 0
PARALLEL, CONTEXT = 8, 1024  # answers at a time, tokens of each with its prompt


def main() -> None:
    """Run both tools on both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", type=Path, required=True, help="folder of `lm_eval` and `inspect`")
    parser.add_argument("--model", default=models.DEFAULT, help="catalogue name or GGUF file")
    parser.add_argument("--lora", type=Path, default=ROOT / ADAPTER, help="gated adapter of the steered side")
    threads = max(1, usable_cores() // 2)
    parser.add_argument("--threads", type=int, default=threads, help="of each of the two llama-servers")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "capability", help="folder for the logs")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    server = [
        "--model", str(file_to_load(models.resolve_gguf(options.model))), "--threads", str(options.threads),
        "--parallel", str(PARALLEL), "--ctx-size", str(CONTEXT * PARALLEL),
    ]  # fmt: skip
    sides = {"unsteered": server, "steered": [*server, "--lora", str(options.lora.resolve())]}
    for side in sides:
        (out / side).mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        before, after = pool.map(lambda side: solve(sides[side], options.tools.resolve(), out / side), sides)
    print(f"\n{options.model}, {options.lora.name}, {date.today()}\n")
    print(table(before, after))


def solve(options: list[str], tools: Path, folder: Path) -> dict[str, dict[str, Solved]]:
    """Start a llama-server with these options and return which rows were solved, by tool and task.

    The logs of the server and of the tools go to `folder`.
    """
    found = {}
    with binaries.Server(folder / "server.log", *options) as server:
        for tool, (command, read) in TOOLS.items():
            began = time.monotonic()
            run(command(f"http://{server.address}/v1", tools, folder), folder / f"{tool}.log")
            found[tool] = read(tools, folder)
            print(f"{folder.name}, {tool}: {time.monotonic() - began:.0f} s", flush=True)
    return found


def run(command: list[str], log: Path) -> str:
    """Run a tool in the root of the project and return what it prints on stdout.

    Raises:
        SystemExit: it ended with an error; the end of its log is the message.
    """
    environment = {
        **os.environ, "OPENAI_API_KEY": "none", "LLAMA_API_KEY": "none", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(log.parent / "hf"), "HF_HUB_OFFLINE": "1", "INSPECT_DISPLAY": "plain",
    }  # fmt: skip
    with log.open("wb") as errors:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, check=False
        )
    printed = done.stdout.decode(errors="replace")
    with log.open("a", encoding="utf-8") as errors:
        errors.write(printed)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    return printed


# ---- the tools -------------------------------------------------------------------------------------------


def lm_eval_command(address: str, tools: Path, folder: Path) -> list[str]:
    """Return the command of lm-evaluation-harness."""
    # The default limit of 300 s for each answer is short on a busy machine.
    model = f"model=llama,base_url={address}/chat/completions,num_concurrent={PARALLEL},timeout=3600"
    return [
        str(tools / "lm_eval"), "run", "--model", "local-chat-completions", "--model_args", model,
        "--apply_chat_template", "--include_path", str(TASKS), "--tasks", *NAMES,
        "--log_samples", "--output_path", str(folder / "lm_eval"),
    ]  # fmt: skip


def lm_eval_solved(_: Path, folder: Path) -> dict[str, Solved]:
    """Read the samples that lm-evaluation-harness logged."""
    found = {}
    for name in NAMES:
        (log,) = (folder / "lm_eval").rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        found[name] = {row["doc_id"]: row[row["metrics"][0]] == 1.0 for row in rows}
    return found


def inspect_command(address: str, tools: Path, folder: Path) -> list[str]:
    """Return the command of Inspect."""
    return [
        str(tools / "inspect"), "eval", str(TASKS / "inspect_tasks.py"), "--model", "openai-api/llama/llama",
        "--model-base-url", address, "--max-connections", str(PARALLEL), "--log-format", "json",
        "--log-dir", str(folder / "inspect"),
    ]  # fmt: skip


def inspect_solved(_: Path, folder: Path) -> dict[str, Solved]:
    """Read Inspect's logs."""
    found = {}
    for log in sorted((folder / "inspect").glob("*.json")):
        read = json.loads(log.read_text(encoding="utf-8"))
        name = read["eval"]["task"].rpartition("/")[2]
        # Samples are numbered from 1.
        found[name] = {row["id"] - 1: _only(row["scores"])["value"] == "C" for row in read["samples"]}
    return found


def _only(scores: Mapping[str, Any]) -> Any:
    (score,) = scores.values()
    return score


Command = Callable[[str, Path, Path], list[str]]
TOOLS: dict[str, tuple[Command, Callable[[Path, Path], dict[str, Solved]]]] = {
    "lm-eval": (lm_eval_command, lm_eval_solved),
    "Inspect": (inspect_command, inspect_solved),
}


def table(before: Mapping[str, Mapping[str, Solved]], after: Mapping[str, Mapping[str, Solved]]) -> str:
    """Return a Markdown table: a row for each tool and task, and the sum of each tool's tasks."""
    lines = [
        "| tool | tasks | n | solved, unsteered | solved, steered | gained | lost | p |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tool, tasks in before.items():
        pairs = {name: [(tasks[name][i], after[tool][name][i]) for i in tasks[name]] for name in NAMES}
        pairs["all"] = [pair for members in pairs.values() for pair in members]
        for name, members in pairs.items():
            gained, lost = members.count((False, True)), members.count((True, False))
            lines.append(
                f"| {tool} | {name} | {len(members)} | {sum(b for b, _ in members)} "
                f"| {sum(a for _, a in members)} | {gained} | {lost} | {mcnemar(gained, lost):.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
