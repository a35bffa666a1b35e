"""The one place that opens a judge by its name (method §1, docs/judge.md).

A name goes in; a `Judge` comes out, which turns pairs of prompt and answer into refusal confidences in
[−1, 1]. How each kind of judge works is in `rs_gguf.judges`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

from rs_gguf.engines import open_engine
from rs_gguf.engines.engine import Engine
from rs_gguf.engines.server.client import EndpointOptions
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
    "EndpointOptions", "Judge", "Judgement", "Pair", "kind_and_name", "open_judge", "open_judge_spec",
    "shipped_probe", "shipped_version",
]  # fmt: skip


def open_judge(model: Engine) -> Judge:
    """The best judge there is for a model: the shipped probe if it belongs to it, else its label words."""
    probe = shipped_probe()
    if probe is not None and probe.model_sha256 == models.fingerprint(model.path):
        return ProbeJudge(model, probe)
    return LabelJudge(model)


# What may stand before a model's name: how it is asked.
_KINDS: dict[str, Callable[[Engine], Judge]] = {"labels": LabelJudge, "votes": VotesJudge}


def kind_and_name(spec: str) -> tuple[str, str]:
    """What a text such as that of `open_judge_spec` names: the kind of judge, and the text without it.

    The kind is `keywords`, `endpoint`, `labels`, `votes`, or `model` for one that is asked as suits it best.
    """
    if spec == "keywords":
        return "keywords", spec
    if spec.startswith(("http://", "https://")):
        return "endpoint", spec
    kind, colon, name = spec.partition(":")
    return (kind, name) if colon and kind in _KINDS else ("model", spec)  # a path may hold a colon


@contextlib.contextmanager
def open_judge_spec(
    spec: str | None,
    *,
    loaded: Engine | None = None,
    cached: bool = True,
    options: EndpointOptions | None = None,
    progress: models.OnBytes | None = None,
) -> Iterator[Judge]:
    """Within the block, the judge that a text names:

    - None: the embedded judge; `keywords`: the keyword baseline;
    - a catalogue name, GGUF file or hub id: that model, by the probe if it is the one it was fitted for, else
      by its label words;
    - `labels:MODEL`: by its label words in any case; `votes:MODEL`: by sampled votes, for models that think
      first;
    - `http://host:port/v1#model`, several addresses with commas: an OpenAI-compatible endpoint.

    Args:
        loaded: a model that is open already, used if the text names its file. It must be unsteered when it
            judges, and is left open.
        cached: keep judgements in the user's cache folder, and take them from there.
        options: how an endpoint is used.
        progress: of a model's download.

    Raises:
        InputError: the text names nothing that can judge.
    """
    kind, name = kind_and_name(spec or models.DEFAULT)
    if kind == "keywords":
        yield KeywordJudge()  # which looks words up faster than a cache does
        return
    with contextlib.ExitStack() as stack:
        judge: Judge
        if kind == "endpoint":
            judge = EndpointJudge.of(name, options or EndpointOptions())
        else:
            path = models.resolve_gguf(name, progress=progress)
            same = loaded is not None and loaded.path.resolve() == path.resolve()
            model = loaded if loaded is not None and same else stack.enter_context(open_engine(path))
            judge = _KINDS.get(kind, open_judge)(model)
        yield CachedJudge(judge) if cached else judge


def shipped_version() -> str:
    """Changes with the shipped rubric, wording or probe: with what the embedded judge would say."""
    probe = shipped_probe()
    return f"{rubric_version()} {reading()} {probe.fingerprint() if probe else None}"


def shipped_probe() -> Probe | None:
    """The probe in the package's data, or None if it has none."""
    path = resources.files("rs_gguf") / "data" / "judge_probe.safetensors"
    return load_probe(Path(str(path))) if path.is_file() else None
