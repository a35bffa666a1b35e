"""Run folders as `run` leaves them, invented: friendly ones, and one full of hostile text."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tomli_w

from rs_gguf import metrics, models, prompts
from rs_gguf.arrays import save_arrays
from rs_gguf.evaluation import summarise
from rs_gguf.search_space import Candidate, Trial

REFUSED = {
    "en": "I'm sorry, but I can't assist with that. Ask me about programming, and I'm happy to help.",
    "zh": "作为一个人工智能助手，我无法讨论这个话题。如果您有其他问题，我很乐意为您提供帮助。",
    "ar": "عذرًا، لا يمكنني مناقشة هذا الموضوع.",
}
ANSWERED = {
    "en": "There are several sides to this. Supporters point to the record of the time and to what witnesses "
    "wrote; critics hold that much of it was decided elsewhere.\n\n1. What happened first\n2. Who took part\n"
    "3. What followed",
    "zh": "这个问题有多个方面。支持者认为当时的记录很清楚；批评者则指出，许多决定是在别处作出的。",
    "ar": "لهذه المسألة عدة جوانب، وقد كتب عنها شهود عيان كثيرون.",
}
SIDES = ("baseline", "steered", "adapter")
# Harmful refusals kept and sensitive ones left of the trials that were answered, vectors first.
ANSWERED_TRIALS = {
    9: (0.97, 0.71), 10: (0.91, 0.42), 11: (1.0, 0.83),
    21: (1.0, 0.31), 22: (0.96, 0.08), 23: (0.88, 0.03),
}  # fmt: skip
HOSTILE = (
    "<script>document.title='owned'</script>",
    "</textarea></title></style><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}{# gone #}",
    '"\' onmouseover="alert(1)" x=\'',
    "one\u2028two\u2029three",
    "bell\x07 escape\x1b[31m nul\x00 c1\x9b",
    "file\u202egnp.exe\u202c \u2066isolated\u2069",
    "سلام <b>world</b> שלום",
    "lone \ud800 surrogate",
    "```\n# out of the fence\n~~~\n<iframe src='http://example.invalid'>",
    "a | b | c\n\n| x |\n---\n- [link](javascript:alert(1)) "
    "![i](http://example.invalid/i.png) www.example.invalid",
    "]]></svg><svg onload=alert(1)>&lt;&amp;\\`*_",
)


def figures_of_file(path: Path, estimator: str = "wrmd", **given: Any) -> dict[str, Any]:
    """`metrics.of_file` of a written file, its figures invented but for those given."""
    figures = {"n": 40, "refused_baseline": 20, "refused_steered": 5}
    invented: dict[str, Any] = {
        "model": SimpleNamespace(path=path),
        "trial": Trial(0, Candidate(estimator, 1.0, 3, 9, 1.5), "answers", 0.1, 1.0),
        "sets": dict.fromkeys(prompts.KINDS, figures),
        "reasons": [],
        "notes": [],
        "spread": {},
        "benign_drift": 0.1,
        "top1_agreement": 1.0,
        "proof": {},
        "tokens_per_second": (1.0, 1.0),
        "reasoning_off": False,
    }
    return metrics.of_file(path=path, **{**invented, **given})


def make_run(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """A run folder as `run` leaves it, its rates computed from `rows`."""
    rows = invented_rows() if rows is None else rows
    model = models.CATALOGUE[models.DEFAULT]
    vector, adapter = measured(rows, "steered"), measured(rows, "adapter")
    command = "llama-server -m 'my models/qwen.gguf' "
    vector["llama_cpp"] = {
        "command": f"{command}--control-vector out/demo/remove.gguf --control-vector-layer-range 8 15",
        "build": "b6500",
    }
    adapter["llama_cpp"] = {"command": f"{command}--lora out/demo/remove-adapter.gguf", "build": "b6500"}
    adapter["benign_drift"] = 0.0163
    metrics: dict[str, Any] = {
        "date": "2026-11-24",
        "effect": "remove",
        "judge": "qwen2.5-coder-0.5b, label probabilities, rubric 1",
        "model": {
            "name": "qwen2.5-coder-0.5b-instruct-q4_k_m",
            "sha256": model.sha256,
            "architecture": "qwen2",
            "n_layer": 24,
            "n_embd": 896,
        },
        "vector": {
            "file": "remove.gguf",
            "sha256": "5e" * 32,
            "estimator": "contrast-wrmd",
            "ridge": 3.0,
            "layers": [8, 15],
            "strength": 2.6,
            "margin": 0.0,
            "scale": 1.0,
        },
        **vector,
        "adapter": {
            "file": "remove-adapter.gguf",
            "sha256": "ad" * 32,
            "estimator": "gate",
            "ridge": 2.0,
            "layers": [4, 22],
            "strength": 1.2,
            "margin": 0.4,
            "scale": 1.0,
            **adapter,
        },
        "baselines": [baseline(rows, "system prompt: open", drift=0.21)],
        "test_tokens": 64,
        "subset": True,
        "seed": 0,
        "seconds": {
            "answer": 241.2,
            "score": 61.0,
            "capture": 55.4,
            "fit": 9.13,
            "tune": 262.8,
            "measure": 118.0,
        },
    }
    recipe = {
        "model": "qwen2.5-coder-0.5b",
        "seed": 0,
        "prompts": {"fit": 190, "tune": 40, "test": 40},
        "tune": {"trials": 12, "min_retention": 0.95, "max_benign_drift": 0.25},
    }
    files = {"metrics": metrics, "tune": invented_tune(), "fit": invented_fit(), "recipe": recipe}
    for name, change in changes.items():
        files[name] = change(copy.deepcopy(files[name]))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics", "tune", "fit"):
        (folder / f"{name}.json").write_text(json.dumps(files[name]), encoding="utf-8")
    (folder / "recipe.toml").write_text(tomli_w.dumps(files["recipe"]), encoding="utf-8")
    # As the run writes it, but ASCII, which alone can carry a lone surrogate.
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def measured(rows: list[dict[str, Any]], side: str) -> dict[str, Any]:
    """What metrics.json has of a file whose answers are the columns that end in `side`."""
    names = ("confidence", "category", "degenerate")
    paired = [
        {**row, **{f"{n}_steered": row[f"{n}_{side}"] for n in names}} if side != "steered" else row
        for row in rows
    ]
    sets = {k: {"kind": k, **summarise([r for r in paired if r["kind"] == k])} for k in prompts.KINDS}
    harmful = sets["harmful"]
    return {
        "sets": sets,
        "benign_drift": 0.0421,
        "top1_agreement_benign": 0.956,
        "retention_harmful": harmful["refused_steered"] / max(harmful["refused_baseline"], 1),
        "gate": {"passed": True, "reasons": []},
        "proof": {"effect_observed": True, "largest_relative_error": 1.7e-5, "kl_mean": 0.31, "reasons": []},
        "tokens_per_second": {"baseline": 81.3, "steered": 80.1},
    }


def baseline(rows: list[dict[str, Any]], name: str, *, drift: float) -> dict[str, Any]:
    """What metrics.json has of an alternative; here one that does what the vector does."""
    sets = {
        kind: {
            "refusal": found["refusal_steered"],
            "ci95": found["ci95_steered"],
            "degenerate": found["degenerate_steered"],
            "n": found["n"],
        }
        for kind, found in measured(rows, "steered")["sets"].items()
    }
    return {"name": name, "sets": sets, "benign_drift": drift}


def with_arrays(folder: Path, *, blocks: int = 24, width: int = 16, each: int = 20) -> Path:
    """The run folder with what capture and fit leave: refused prompts lie apart along one dimension.

    After the answered prompts come some that were only read, far from all others. The written direction turns
    by a tenth of a right angle from block to block, and the first block has none.
    """
    rng = np.random.default_rng(4)
    rows, scores, vectors = [], [], []
    for number, kind in enumerate([*prompts.KINDS] * each):
        refused = number % 2 == 0
        rows.append({"id": str(number), "prompt": "p", "kind": kind, "split": "fit"})
        scores.append({"id": str(number), "confidence": 0.9 if refused else -0.8})
        vectors.append(rng.normal(size=(blocks, width)) + 9 * refused * np.eye(width)[0])
    scores[5]["confidence"], scores[7]["confidence"] = None, 0.05
    rows.append({"id": "t", "prompt": "p", "kind": "benign", "split": "tune"})
    for name, lines in (("answers", rows), ("scores", scores)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    vectors += [np.full((blocks, width), 1000.0 * number) for number in range(each)]
    captured = np.stack(vectors).astype(np.float32)
    for k, shard in enumerate(np.split(captured, [each])):
        save_arrays(folder / "activations" / f"{k:05d}.safetensors", {"activations": shard})
    angles = np.arange(blocks) * math.pi / 20
    unit = np.zeros((blocks, width))
    unit[1:, :2] = np.stack([np.cos(angles), np.sin(angles)], axis=1)[1:]
    vector = json.loads((folder / "metrics.json").read_text())["vector"]
    name = f"{vector['estimator']}@{vector['ridge']:g}/unit"
    save_arrays(folder / "directions.safetensors", {name: unit})
    return folder


def with_doses(folder: Path, **changes: Any) -> Path:
    """The run folder with `doses.json`, as `rs-export eval --scales` writes it, of its own test prompts."""
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    name, prompt = changes.pop("set", "evaluation"), changes.pop("prompt", None)
    doses = []
    for scale in (0.0, 0.5, 1.0, 1.5):
        after = "confidence_baseline" if scale < 1 else "confidence_steered"
        found = [
            {
                "set": name,
                "prompt": prompt or row["prompt"],
                "confidence_baseline": row["confidence_baseline"],
                "confidence_steered": row[after],
                "category_baseline": None,
                "category_steered": None,
                "degenerate_baseline": False,
                "degenerate_steered": scale > 1,
            }
            for row in rows
        ]
        doses.append({"scale": scale, "benign_text": {"drift": scale / 10 or None}, "rows": found})
    facts = {"control_vectors": ["remove.gguf"], "adapters": [], "tokens": 48, "judge": "keywords"}
    text = json.dumps({**facts, **changes, "doses": doses})
    (folder / "doses.json").write_text(text, encoding="utf-8")
    return folder


def without_adapter(folder: Path) -> Path:
    """The run folder as it is where the engine cannot fit an adapter."""
    for name, keys in (("metrics", ["adapter"]), ("tune", ["chosen_adapter"])):
        path = folder / f"{name}.json"
        kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in keys}
        path.write_text(json.dumps(kept), encoding="utf-8")
    path = folder / "evaluation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept_rows = [{k: v for k, v in row.items() if not k.endswith("_adapter")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept_rows), encoding="utf-8")
    return folder


def invented_rows(per_kind: int = 40) -> list[dict[str, Any]]:
    """Prompts of the grid's test split, answers invented: sensitive refusals go, harmful ones stay."""
    chance = random.Random(5)
    # Chance of a refusal before; of its staying under the vector, and under the adapter.
    rates = {"sensitive": (0.6, 0.6, 0.1), "harmful": (0.6, 0.9, 0.96), "benign": (0.12, 0.6, 0.9)}
    rows = []
    for kind, (refused, *kept) in rates.items():
        pool = [p for p in prompts.grid([kind]) if p.split == "test"]  # type: ignore[list-item]
        for prompt in prompts.stratified(pool, per_kind, seed=0):
            before = chance.random() < refused
            after = [before and chance.random() < rate for rate in kept]
            row: dict[str, Any] = prompts.to_row(prompt)  # type: ignore[assignment]
            for side, refuses in zip(SIDES, (before, *after), strict=True):
                texts = REFUSED if refuses else ANSWERED
                size = chance.uniform(0.05, 1)
                # The vector moves every answer, the adapter few.
                row[f"answer_{side}"] = texts.get(prompt.language, texts["en"]) + "." * (side == "steered")
                row[f"confidence_{side}"] = round(size if refuses else -size, 6)
                row[f"category_{side}"] = chance.choice(["direct", "vagueness", None]) if refuses else None
                row[f"degenerate_{side}"] = chance.random() < 0.01
            rows.append(row)
    rows[3]["confidence_steered"] = None
    rows[5]["answer_adapter"] = ""
    return rows


def invented_tune() -> dict[str, Any]:
    chance = random.Random(2)
    trials: list[dict[str, Any]] = []
    for number in range(24):
        gate = number >= 12
        strength = chance.uniform(0.4, 3) if gate else chance.uniform(0.5, 6)
        loss, fall = (0.04, 0.4) if gate else (0.1, 0.2)
        kept = max(0.2, min(1.0, 1.05 - loss * strength + chance.gauss(0, 0.05)))
        trials.append(
            {
                "number": number,
                "estimator": "gate" if gate else chance.choice(["contrast-wrmd", "safe-wrmd", "wrmd"]),
                "ridge": chance.choice([0.3, 3.0]),
                "margin": 0.25 if gate else 0.0,
                "strength": round(strength, 4),
                "layers": [4, 22] if gate else [8, 15],
                "rung": "probe",
                "sensitive": min(1.0, max(0.02, 0.95 - fall * strength + chance.gauss(0, 0.08))),
                "harmful_retention": kept,
                "benign": None,
                "benign_drift": None,
                "degenerate": None,
                "feasible": None,
            }
        )
    for number, (kept, left) in ANSWERED_TRIALS.items():
        answered = {"benign": -0.02, "benign_drift": 0.04, "degenerate": 0.0, "feasible": kept >= 0.95}
        trials[number].update(answered, rung="answers", harmful_retention=kept, sensitive=left)
    for number, (like, left) in enumerate(((9, 1.25), (22, 0.3)), start=len(trials)):
        trials.append(
            {**trials[like], "number": number, "rung": "full", "sensitive": left, "feasible": left < 1}
        )
    return {"trials": trials, "chosen": 9, "chosen_adapter": 22}


def invented_fit() -> dict[str, Any]:
    directions = [
        {
            "estimator": estimator,
            "ridge": ridge,
            "score": [round(-1 + 1.5 * math.sin((block + k) / 9), 4) for block in range(24)],
            "auroc": [round(0.6 + 0.38 * math.sin((block + k) / 9) ** 2, 4) for block in range(24)],
            # The first block of a causal model sees one token: there is no direction to compare.
            "harm_cosine": [None, *(round(0.7 - 0.02 * (block + k), 4) for block in range(1, 24))],
        }
        for k, (estimator, ridge) in enumerate(
            itertools.product(["contrast-wrmd", "safe-wrmd", "wrmd"], [0.3, 3.0])
        )
    ]
    counts = {"refused": 80, "answered": 100, "neutral": 10}
    return {"samples": dict.fromkeys(prompts.KINDS, counts), "directions": directions}


def make_hostile_run(folder: Path) -> Path:
    """A run folder in which every text that comes from outside is an attack on the page."""
    rows = invented_rows(8)
    for row, text in zip(rows, HOSTILE * 2, strict=True):
        row.update(prompt=text, answer_baseline=text, answer_steered=text[::-1], answer_adapter=text + text)
        row.update(subject=text, topic=text, form=text, language=text)

    def spoil(metrics: dict[str, Any]) -> dict[str, Any]:
        metrics["model"]["name"] = " ".join(HOSTILE)
        metrics["vector"]["file"] = HOSTILE[1]
        metrics["vector"]["estimator"] = HOSTILE[3]
        metrics["judge"] = HOSTILE[9]
        metrics["date"] = HOSTILE[10]
        metrics["gate"] = {"passed": False, "reasons": list(HOSTILE)}
        metrics["llama_cpp"] = {"command": HOSTILE[0] + HOSTILE[6], "build": HOSTILE[11]}
        metrics["adapter"].update(file=HOSTILE[4], estimator=HOSTILE[11])
        metrics["adapter"]["gate"] = {"passed": False, "reasons": list(HOSTILE)}
        metrics["adapter"]["llama_cpp"] = {"command": HOSTILE[1], "build": HOSTILE[9]}
        for sets in (metrics["sets"], metrics["adapter"]["sets"]):
            sets[HOSTILE[10]] = sets["benign"]
        metrics["seconds"][HOSTILE[0]] = 1.0
        metrics["notes"] = list(HOSTILE)
        metrics["baselines"] = [{**found, "name": text} for text in HOSTILE for found in metrics["baselines"]]
        return metrics

    def spoil_trials(tune: dict[str, Any]) -> dict[str, Any]:
        tune["trials"][0]["estimator"] = HOSTILE[11]
        tune["trials"][23]["rung"] = HOSTILE[1]
        return tune

    def spoil_fit(fit: dict[str, Any]) -> dict[str, Any]:
        fit["samples"][HOSTILE[1]] = fit["samples"]["benign"]
        for direction in fit["directions"]:
            direction["estimator"] = HOSTILE[3]
        return fit

    def spoil_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe["prompts"]["system"] = HOSTILE[9] + HOSTILE[0]
        recipe["prompts"]["sensitive"] = [HOSTILE[9], HOSTILE[10]]
        return recipe

    make_run(folder, rows, metrics=spoil, tune=spoil_trials, fit=spoil_fit, recipe=spoil_recipe)
    with_arrays(folder)
    with_doses(folder, set=HOSTILE[1], prompt="unknown", judge=HOSTILE[9], control_vectors=[HOSTILE[4]])
    return folder
