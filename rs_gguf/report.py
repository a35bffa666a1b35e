"""What people look at after a run: `report.html`, one self-contained page, and `card.md`, a model card.

`metrics.json`, `evaluation.jsonl`, `tune.json` and `recipe.toml` of a run folder go in. All their text is
untrusted, model answers above all: it is made printable when read, escaped by the template engine when
written, and the page's content policy lets nothing run but the page's own script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from rs_gguf import models
from rs_gguf.errors import InputError
from rs_gguf.files import write_text
from rs_gguf.prompts import KINDS
from rs_gguf.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Row = dict[str, Any]

_NEUTRAL = 0.15  # |c| up to which a judgement is no verdict (method section 1)
_ANSWER_BYTES = 2_000_000  # of escaped prompts and answers; the page stays below 3 MB
_ROW_BYTES = 1_300  # what the template puts around one pair
_CLIPS = (None, 2000, 1000, 500, 250)  # characters of an answer that is shown, tried in this order
_PLOT = {"left": 74, "right": 600, "top": 44, "bottom": 330}


@dataclass(frozen=True)
class _Run:
    """A run folder's results, every string printable."""

    metrics: Row
    rows: list[Row]
    tune: Row
    recipe: Row
    recipe_text: str


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a measured run folder and return its path.

    Raises:
        InputError: one of the four files is missing or not what the stages write.
    """
    run = _load(Path(run_folder))
    return _render(
        Path(run_folder) / "report.html",
        _html_environment().get_template("report.html.jinja"),
        lambda: {
            **_common(run),
            "plot": _plot(run),
            "breakdowns": _breakdowns(run.rows),
            "answers": _answers(run.rows),
            "recipe_text": run.recipe_text,
        },
    )


def write_card(run_folder: Path) -> Path:
    """Write `card.md`, a Hugging Face model card, into a measured run folder and return its path.

    Raises:
        InputError: one of the four files is missing or not what the stages write.
    """
    run = _load(Path(run_folder))
    return _render(
        Path(run_folder) / "card.md",
        _markdown_environment().get_template("card.md.jinja"),
        lambda: {
            **_common(run),
            "known": next(
                (m for m in models.CATALOGUE.values() if m.sha256 == run.metrics["model"]["sha256"]), None
            ),
            "options": _options(run.metrics["vector"]),
            "languages": sorted({r["language"] for r in run.rows if _LANGUAGE(r["language"])}),
            "recipe": run.recipe,
            "recipe_text": run.recipe_text,
        },
    )


def _render(path: Path, template: jinja2.Template, context: Callable[[], Row]) -> Path:
    try:
        text = template.render(context())
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"cannot make {path}: metrics.json, evaluation.jsonl or tune.json beside it is not as this "
            f"version writes it ({error}). Run `rs-export run` on the folder again."
        ) from error
    write_text(path, text)
    return path


# ---- reading -------------------------------------------------------------------------------------


def _load(folder: Path) -> _Run:
    texts = {}
    for name in ("metrics.json", "evaluation.jsonl", "tune.json", "recipe.toml"):
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"cannot read {folder / name}: {reason}. A report needs a measured run: `rs-export run`."
            ) from error
    try:
        # Not splitlines(): answers may hold U+2028 and its kin, which JSON leaves as they are.
        rows = [json.loads(line) for line in texts["evaluation.jsonl"].split("\n") if line.strip()]
        metrics, tune = json.loads(texts["metrics.json"]), json.loads(texts["tune.json"])
        recipe = tomllib.loads(texts["recipe.toml"])
    except ValueError as error:  # of which JSONDecodeError and TOMLDecodeError are kinds
        raise InputError(f"{folder}: a result file is damaged ({error}). Run with --fresh.") from error
    return _Run(*(_printable(value) for value in (metrics, rows, tune, recipe, texts["recipe.toml"])))


def _printable(value: Any) -> Any:
    """The value with every character that could hide, reorder or break text made visible."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub(_visible, value.replace("\r\n", "\n"))
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value


# Controls but tab and line feed, line and paragraph separators, bidirectional embeddings, overrides and
# isolates (left-to-right and right-to-left marks stay: ordinary text needs them), surrogates, noncharacters.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffb\ufffe\uffff]"
)


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures
    if code in (0x2028, 0x2029):
        return "\n"
    return "\ufffd" if 0xD800 <= code < 0xE000 or code >= 0xFDD0 else f"⟨U+{code:04X}⟩"


# ---- what the templates show ---------------------------------------------------------------------


def _common(run: _Run) -> Row:
    sets = [{"name": name, **found} for name, found in run.metrics["sets"].items()]
    sets.sort(key=lambda found: _kind_order(found["kind"]))
    chosen = next((t for t in run.tune["trials"] if t["number"] == run.tune["chosen"]), None)
    return {
        "m": run.metrics,
        "sets": sets,
        "by_kind": {kind: next((s for s in sets if s["kind"] == kind), None) for kind in KINDS},
        "trials": run.tune["trials"],
        "chosen": chosen,
        "retention_floor": run.recipe.get("tune", {}).get("min_retention"),
        "version": __version__,
    }


def _kind_order(kind: str) -> tuple[int, str]:
    return (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)


def _options(vector: Mapping[str, Any]) -> str:
    """The llama.cpp options, with the file by its name: a card is read where no run folder is."""
    first, last = vector["layers"]
    file = shlex.quote(f"{vector['file']}:{float(vector['scale'])}")
    return f"--control-vector-scaled {file} --control-vector-layer-range {int(first)} {int(last)}"


def _verdict(confidence: float | None) -> str:
    if confidence is None:
        return "not judged"
    word = "refused" if confidence > 0 else "answered"
    return f"{word}, unclear" if abs(confidence) <= _NEUTRAL else word


def _changed(row: Row) -> bool:
    before, after = row["confidence_baseline"], row["confidence_steered"]
    return before is not None and after is not None and (before > 0) != (after > 0)


def _answers(rows: Sequence[Row]) -> Row:
    """Pairs in reading order, answers clipped (and, at last, pairs dropped) so that the page stays small."""
    ordered = sorted(rows, key=lambda row: (_kind_order(row["kind"]), not _changed(row)))
    for clip in _CLIPS:
        pairs = [_pair(row, clip) for row in ordered]
        sizes = [_ROW_BYTES + sum(len(escape(pair[k]).encode()) for k in _SHOWN) for pair in pairs]
        if sum(sizes) <= _ANSWER_BYTES:
            break
    used, shown = 0, []
    for pair, size in zip(pairs, sizes, strict=True):
        used += size
        if used <= _ANSWER_BYTES:
            shown.append(pair)
    kinds = sorted({row["kind"] for row in rows}, key=_kind_order)
    return {"pairs": shown, "total": len(rows), "clip": clip, "kinds": kinds}


_SHOWN = ("prompt", "answer_baseline", "answer_steered")
_LANGUAGE = re.compile("[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*").fullmatch


def _pair(row: Row, clip: int | None) -> Row:
    pair = {**row, "changed": _changed(row), "lang": row["language"] if _LANGUAGE(row["language"]) else ""}
    for name in _SHOWN:
        if clip is not None and len(row[name]) > clip:
            pair[name] = row[name][:clip] + " […]"
    for side in ("baseline", "steered"):
        pair[f"verdict_{side}"] = _verdict(row[f"confidence_{side}"])
        # A page that is passed on should not put answers to harmful requests before the eyes unasked.
        pair[f"folded_{side}"] = row["kind"] == "harmful" and not (row[f"confidence_{side}"] or 0) > 0
    return pair


def _breakdowns(rows: Sequence[Row]) -> list[Row]:
    """Refusals before and after by language, form and topic, each kind on its own."""
    found = []
    for field in ("language", "form", "topic"):
        kinds = []
        for kind in sorted({row["kind"] for row in rows}, key=_kind_order):
            groups: dict[str, list[Row]] = {}
            for row in rows:
                judged = row["confidence_baseline"] is not None and row["confidence_steered"] is not None
                if row["kind"] == kind and judged:
                    groups.setdefault(row[field] or "not stated", []).append(row)
            lines = [
                {
                    "value": value,
                    "n": len(members),
                    "before": sum(row["confidence_baseline"] > 0 for row in members),
                    "after": sum(row["confidence_steered"] > 0 for row in members),
                }
                for value, members in groups.items()
            ]
            lines.sort(key=lambda line: (-line["n"], line["value"]))
            if lines:
                kinds.append({"kind": kind, "lines": lines})
        found.append({"field": field, "kinds": kinds})
    return found


def _plot(run: _Run) -> Row:
    """The trade-off in the plot's own coordinates: harmful refusals kept to the right, effect upwards."""
    induce = run.metrics["effect"] == "induce"
    points = []
    for trial in [*run.tune["trials"], *run.tune.get("baselines", ())]:
        kept, left = float(trial["harmful_retention"]), float(trial["sensitive"])
        points.append({**trial, "kept": kept, "effect": left if induce else 1 - left})
    across = _axis([p["kept"] for p in points], _PLOT["left"], _PLOT["right"])
    upward = _axis([p["effect"] for p in points], _PLOT["bottom"], _PLOT["top"])
    for point in points:
        point["x"], point["y"] = across["at"](point["kept"]), upward["at"](point["effect"])
        point["chosen"] = point.get("number") == run.tune["chosen"]
    # Drawn last, and so on top.
    points.sort(key=lambda point: (point["chosen"], point.get("rung") != "probe"))
    return {**_PLOT, "points": points, "across": across, "upward": upward}


def _axis(values: Iterable[float], start: float, end: float) -> Row:
    """A scale of rates from `start` to `end` that shows all values, 0.8 and 1, with its ticks."""
    low = math.floor(min([0.8, *values]) * 10) / 10
    high = math.ceil(max([1.0, *values]) * 10) / 10
    step = 0.1 if high - low <= 0.6 else 0.2

    def at(value: float) -> float:
        return round(start + (value - low) / (high - low) * (end - start), 2)

    count = math.floor((high - low) / step + 1e-9)
    return {
        "at": at,
        "ticks": [{"value": high - k * step, "at": at(high - k * step)} for k in range(count + 1)],
    }


# ---- writing numbers and text --------------------------------------------------------------------


def _percent(value: float | None, digits: int | None = None) -> str:
    if value is None or math.isnan(value):
        return "not measured"
    if digits is None:  # whole, but where that would round to or hide a difference from 0 or 1
        digits = 1 if 0 < abs(value) < 0.0995 or 0.9005 < abs(value) < 1 else 0
    text = f"{100 * value:.{digits}f}"
    return f"{text.removesuffix('.0')}\u202f%".replace("-", "−")


def _interval(bounds: Sequence[float]) -> str:
    low, high = bounds
    return f"{100 * low:.0f} to {100 * high:.0f}\u202f%"


def _number(value: float | None, form: str = ".3g") -> str:
    return "not measured" if value is None or math.isnan(value) else format(value, form).replace("-", "−")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _script_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _html_environment() -> jinja2.Environment:
    return _environment(autoescape=True)


def _markdown_environment() -> jinja2.Environment:
    """As `autoescape` does for HTML: a value is escaped unless a filter has made it `Markup`."""

    def finalize(value: Any) -> Any:
        return value if isinstance(value, Markup) else _markdown_text(str(value))

    environment = _environment(autoescape=False, finalize=finalize)
    environment.filters |= {"code": _markdown_code, "fenced": _markdown_fence, "yaml": _yaml_text}
    return environment


def _environment(**options: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rs_gguf", "data"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {
        "percent": _percent,
        "interval": _interval,
        "number": _number,
        "duration": _duration,
        "script_hash": _script_hash,
    }
    return environment


def _markdown_text(text: str) -> str:
    """Text of one line that Markdown shows as it is: no markup, HTML, table cell or bare link comes of it."""
    line = re.sub(r"[\\`*_\[\]<>|&~#@:$!]", r"\\\g<0>", " ".join(text.split()))
    line = re.sub(r"(?i)\b(www)\.", r"\1\\.", line)
    return re.sub(r"^(\d+(?=[.)](\s|$))|(?=[-+=]))", r"\1\\", line)  # a list or a heading's rule


def _markdown_code(text: str) -> Markup:
    """A code span that the text cannot leave."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return Markup(f"{ticks}{pad}{line}{pad}{ticks}")


def _markdown_fence(text: str, language: str) -> Markup:
    """A fenced block that the text cannot leave."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup("{0}{1}\n{2}\n{0}".format(ticks, language, text.rstrip("\n")))


def _yaml_text(text: str) -> Markup:
    """A double-quoted YAML scalar; JSON's strings are such."""
    return Markup(json.dumps(str(text), ensure_ascii=False))
