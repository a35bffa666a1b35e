"""Test what a second fit of the gates reads: a tiny model with a file in force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from fixtures.fit_samples import OPTIONS
from fixtures.tiny_gguf import write_tiny_qwen2

from rs_gguf.activations.capture import ANSWER_TOKENS
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import Steering, read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.methods.samples import Samples
from rs_gguf.models import architecture
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.recipe import Recipe
from rs_gguf.pipeline.sections import Answers
from rs_gguf.pipeline.stage import Run
from rs_gguf.pipeline.stages import refit as refitting
from rs_gguf.prompts.contexts import Context
from rs_gguf.records.conversation import Judgement, Prompt
from rs_gguf.records.trials import Candidate

LAYERS = 5  # of which the search may change 1 to 3
PROMPTS = [
    Prompt("Who governs?", "sensitive", split="fit"),
    Prompt("Who may vote here?", "sensitive", split="fit"),
    Prompt("Name a river.", "benign", split="fit"),
    Prompt("Make a bomb.", "harmful", split="fit"),
]
OTHER = Prompt("Which party is it?", "sensitive", split="fit")


class Judge:
    """The first sensitive prompt and the harmful one stay refused; the second sensitive one opens."""

    name = "stand-in"

    def judge(self, pairs: Sequence[tuple[str, Any]]) -> Iterator[tuple[int, Judgement]]:
        for i, (prompt, _) in enumerate(pairs):
            yield (
                i,
                Judgement(
                    0.9 if prompt in (PROMPTS[0].prompt, PROMPTS[3].prompt) else -0.9, "stand-in", None
                ),
            )


@dataclass
class Recorder:
    """A method that steers with given directions, and returns the inputs that it was to fit on."""

    directions: dict[int, Any]

    def space(self, fitted: Any, n_layer: int, effect: str) -> Any:
        return SimpleNamespace(start=[Candidate("adapter", "", 1.0, 1, 2, 0.5), None])

    def steering(self, fitted: Any, candidate: Candidate, architecture: str, scratch: Path) -> Steering:
        assert (fitted, candidate.strength, architecture) == ("first", 0.5, "qwen2")
        assert not scratch.exists()  # nothing is left of a refit that was killed
        return Steering(self.directions)

    def fit(self, samples: Samples, options: Any, *, advance: Any) -> dict[str, Any]:
        assert samples.activations is None  # the contrast stays what it was
        return {
            name: (
                [rows.last_token.layer_rows(layer).numpy() for layer in range(LAYERS)],
                len(rows.answer_tokens),
            )
            for name, rows in samples.inputs.items()
        }


@pytest.mark.parametrize("attention", [(0, 1, 2, 3, 4), (0, 2, 4), (1, 2)])
def test_inputs_and_answers_are_read_under_the_file(
    attention: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some families have `attn_output` in some layers only: so does the tiny model, as it is described."""

    def places(*given: Any) -> dict[str, architecture.MatrixPlaces]:
        found = matrix_places(*given)
        return {**found, "attn_output": replace(found["attn_output"], layers=attention)}

    matrix_places = architecture.matrix_places
    monkeypatch.setattr(architecture, "matrix_places", places)
    rng = np.random.default_rng(0)
    directions = {1: 3 * rng.standard_normal(32).astype(np.float32)}
    monkeypatch.setattr(refitting, "METHODS", {"adapter": Recorder(directions)})
    write_tiny_qwen2(tmp_path / "tiny.gguf", n_layer=LAYERS)
    with LlamaModel(tmp_path / "tiny.gguf", n_parallel=4, n_ctx=512, n_threads=1) as model:
        run = SimpleNamespace(
            model=model,
            judge=Judge(),
            recipe=Recipe(answers=Answers(fit_tokens=12)),
            prompts={"fit": PROMPTS},
            in_contexts=[(OTHER, Context("plain"))],
            folder=RunFolder(tmp_path / "run"),
        )
        order = np.array([3, 0, 2, 4])
        first = Samples([], None, np.zeros(0), {"stale": cast("Any", None)}, tmp_path)
        found = refitting.refit(cast("Run", run), "adapter", "first", first, order, OPTIONS)
        tokens = chat_tokens(model, [*PROMPTS, OTHER], None)
        with model.steered(Steering(directions)):
            expected = read_last(model, tokens, range(LAYERS), ("kqv_out",))["kqv_out"]
            lengths = {i: len(g.tokens) for i, g in model.generate(tokens[:4], max_tokens=12)}
        unsteered = read_last(model, tokens, range(LAYERS), ("kqv_out",))["kqv_out"]
    assert list(found) == ["attn_output", "ffn_down"]
    assert not (tmp_path / "run" / "activations-refit").exists()
    last_token, n_answer_tokens = found["attn_output"]
    for layer in range(LAYERS):
        read = layer in attention and layer in architecture.searched_layers(LAYERS)
        rows = expected[order, layer] if read else np.zeros_like(last_token[layer])
        np.testing.assert_allclose(last_token[layer], rows, rtol=0, atol=2e-2)
    assert np.abs(expected[:, 2] - unsteered[:, 2]).max() > 0.2
    # The answer that opened is read, the one that stays refused is not.
    counts = [min(ANSWER_TOKENS, lengths[i]) for i in (1, 2, 3)]
    assert n_answer_tokens == sum(counts) > 2 * ANSWER_TOKENS
