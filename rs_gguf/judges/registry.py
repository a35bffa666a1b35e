"""Open a judge by its name (method §1, docs/judge.md).

A name goes in; a `Judge` comes out, which turns pairs (prompt, answer) into refusal confidences in [−1, 1].
`rs_gguf.judges` describes the kinds of judge.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rs_gguf.engines import open_engine
from rs_gguf.engines.engine import Engine
from rs_gguf.engines.server.client import EndpointOptions
from rs_gguf.engines.settings import DEFAULTS, EngineSettings
from rs_gguf.errors import InputError
from rs_gguf.judges.cache import CachedJudge
from rs_gguf.judges.endpoint import EndpointJudge
from rs_gguf.judges.judge import Judge, Pair
from rs_gguf.judges.local import KeywordJudge, LabelJudge, ProbeJudge
from rs_gguf.judges.probe import Probe, load_probe
from rs_gguf.judges.rubric import reading, rubric_version
from rs_gguf.judges.votes import VotesJudge
from rs_gguf.models import resolve as models
from rs_gguf.records.conversation import Judgement

__all__ = [
    "EndpointOptions", "Judge", "Judgement", "Pair", "SecondJudge", "judges_with_model", "kind_and_name",
    "open_judge", "open_judge_spec", "open_second_judge", "shipped_probe", "shipped_version",
]  # fmt: skip


def open_judge(model: Engine) -> Judge:
    """Return the best judge for a model: its shipped probe if it has one, else its label words."""
    probe = shipped_probe(models.fingerprint(model.path))
    return LabelJudge(model) if probe is None else ProbeJudge(model, probe)


# Judges of a model, by the prefix of its name: `labels:MODEL`.
_OF_MODELS: dict[str, Callable[[Engine], Judge]] = {"labels": LabelJudge, "votes": VotesJudge}
# Judges without a model, by their name, or by its prefix with the colon: opened with the text behind it.
_RULES: dict[str, Callable[[str], Judge]] = {"keywords": lambda _: KeywordJudge()}


def kind_and_name(spec: str) -> tuple[str, str]:
    """Return the kind of judge that `spec` names, and `spec` without a prefix for the kind.

    The kind is `endpoint`, a rule such as `keywords`, `labels`, `votes`, or `model` for the best judge of a
    model.
    """
    if spec.startswith(("http://", "https://")):
        return "endpoint", spec
    kind, colon, name = spec.partition(":")
    if kind + colon in _RULES:
        return kind + colon, name
    return (kind, name) if colon and kind in _OF_MODELS else ("model", spec)  # a path may contain a colon


def judges_with_model(kind: str) -> bool:
    """Return whether a judge of this kind runs a model on this machine."""
    return kind != "endpoint" and kind not in _RULES


@contextlib.contextmanager
def open_judge_spec(
    spec: str | None,
    *,
    loaded: Engine | None = None,
    engine: EngineSettings = DEFAULTS,
    cached: bool = True,
    options: EndpointOptions | None = None,
    progress: models.OnBytes | None = None,
) -> Iterator[Judge]:
    """Open the judge that `spec` names, for the `with` block:

    - None: the embedded judge; `keywords`: the keyword baseline;
    - a catalogue name, GGUF file or hub id: this model, with the probe if it was fitted for it, else with its
      label words;
    - `labels:MODEL`: label words in any case; `votes:MODEL`: sampled votes, for models that think first;
    - `http://host:port/v1#model`, or several addresses with commas: an OpenAI-compatible endpoint.

    Args:
        spec: the name of the judge, as above.
        loaded: an open model, used if `spec` names its file. It must be unsteered when it judges, and stays
            open.
        engine: how llama.cpp runs a model, also the one in `loaded`.
        cached: keep judgements in the user's cache folder, and reuse them.
        options: how an endpoint is used.
        progress: called during the download of a model.

    Raises:
        InputError: `spec` does not name a judge.
    """
    kind, name = kind_and_name(spec or models.DEFAULT)
    if kind in _RULES:
        yield _RULES[kind](name)  # not cached: it is faster than the cache
    elif kind == "endpoint":
        endpoint = EndpointJudge.of(name, options or EndpointOptions())
        yield CachedJudge(endpoint) if cached else endpoint
    else:
        with _open_model(name, loaded, engine, progress) as model:
            judge = _OF_MODELS.get(kind, open_judge)(model)
            yield CachedJudge(judge, variant=engine.result_options) if cached else judge


@dataclass(frozen=True)
class SecondJudge:
    """A judge beside the first one, and its model, which also answers other questions about a pair."""

    judge: Judge
    model: Engine


@contextlib.contextmanager
def open_second_judge(
    spec: str,
    *,
    loaded: Engine | None = None,
    engine: EngineSettings = DEFAULTS,
    progress: models.OnBytes | None = None,
) -> Iterator[SecondJudge]:
    """Open the second judge that `spec` names, for the `with` block; see `open_judge_spec`.

    Raises:
        InputError: `spec` does not name a model that this machine can run.
    """
    kind, name = kind_and_name(spec)
    if not judges_with_model(kind):
        raise InputError(
            f"second judge {spec}: only a model that this machine runs is accepted. Give a catalogue name, a "
            "GGUF file, a hub id, labels:MODEL or votes:MODEL."
        )
    with _open_model(name, loaded, engine, progress) as model:
        judge = _OF_MODELS.get(kind, open_judge)(model)
        yield SecondJudge(CachedJudge(judge, variant=engine.result_options), model)


@contextlib.contextmanager
def _open_model(
    name: str, loaded: Engine | None, engine: EngineSettings, progress: models.OnBytes | None
) -> Iterator[Engine]:
    """Yield the named model: `loaded` if that is its file, which stays open, else a new engine."""
    path = models.resolve_gguf(name, progress=progress)
    if loaded is not None and loaded.path.resolve() == path.resolve():
        yield loaded
    else:
        with open_engine(path, settings=engine) as model:
            yield model


def shipped_version() -> str:
    """Return a text that changes with the shipped rubric, wording or probes, as their judges do."""
    probes = [shipped_probe(model.sha256) for model in models.CATALOGUE.values()]
    return " ".join([f"{rubric_version()} {reading()}", *(p.fingerprint() for p in probes if p is not None)])


@functools.cache
def shipped_probe(model_sha256: str) -> Probe | None:
    """Return the probe in the package's data for the model file with this hash; None if there is none."""
    model = models.with_hash(model_sha256)
    if model is None:
        return None
    path = resources.files("rs_gguf") / "data" / "judges" / f"{model.name}.safetensors"
    return load_probe(Path(str(path))) if path.is_file() else None
