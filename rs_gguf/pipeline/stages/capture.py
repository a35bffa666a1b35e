"""The capture stage: the activations of the model at the fit prompts and their answers, kept in shards."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rs_gguf.activations.capture import ANSWER_TOKENS, SHARD, capture_all, conversations
from rs_gguf.activations.store import ActivationStore
from rs_gguf.engines.engine import Can
from rs_gguf.models import dimensions
from rs_gguf.pipeline.costs import CHANGED, Cost, Costs, mean_length
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.pipeline.stages.answers import judged
from rs_gguf.prompts import contexts
from rs_gguf.records.artefacts import STAGES

_LAYOUT = "F16, inputs of the searched layers"  # a run of a version that stored others captures again
_AROUND = 15  # tokens of a context around a prompt, besides those that several prompts share


class Capture(Stage):
    """The stage that stores the activations of the fit prompts and the inputs of the output matrices."""

    info = STAGES["capture"]
    shared = True

    def inputs(self, run: Run) -> list[Any]:
        return [
            [p.id for p in run.gate_only],
            [asdict(c) for c in contexts.shipped()],
            ANSWER_TOKENS,
            _LAYOUT,
        ]

    def work(self, run: Run, key: str) -> None:
        prompts, gate_only = run.prompts["fit"], run.in_contexts
        answers = {row["id"]: row["tokens"] for row in run.folder.read_rows("answers.jsonl")}
        refused = {name for name, row in judged(run.folder).items() if row["confidence"] > 0}
        with run.progress.stage(self.info.name, len(prompts) + len(gate_only)) as advance:
            system = run.recipe.prompts.system
            read, prefix = conversations(run.model, prompts, system, answers, refused, gate_only)
            ids = [p.id for p in prompts] + [p.id for p, _ in gate_only]
            store = store_of(run.folder, key)
            capture_all(
                run.model, ids, read, prefix, store,
                matrices=matrices_of(run), processes=run.processes, advance=advance,
            )  # fmt: skip

    def cost(self, costs: Costs) -> Cost:
        answered = costs.count("fit")
        n, model = answered + costs.gate_only, costs.model
        read = n * costs.prompt + costs.gate_only * _AROUND
        if model.output_matrices:
            # Answers at which the gate must stay closed are read up to the last of a few random tokens.
            depth = ANSWER_TOKENS / (ANSWER_TOKENS + 1) * mean_length(costs.recipe.answers.fit_tokens)
            read += answered * (1 - CHANGED / 3) * depth
        rows = n + costs.other_tokens() + 2 * costs.prefix  # tokens of the template are kept in F32
        outputs = model.n_layer * model.width
        # A shard in F32 and the copies of one matrix that are made of it; the last shard holds the template.
        shard = max(min(SHARD, n) * (rows / n if n else 0), 2 * costs.prefix)
        inputs = model.searched_inputs
        working = 4 * shard * (2 * inputs + outputs)
        disk = 2 * (n * outputs + rows * inputs)
        return Cost(costs.reading(read), costs.memory() + working, disk, read)


def matrices_of(run: Run) -> dict[str, list[int]]:
    """Return the layers of each output matrix whose inputs a run reads: those that the search may change.

    Empty if the engine cannot read inputs of matrices.
    """
    if Can.MATRIX_INPUTS not in run.model.can:
        return {}
    return dimensions.of_gguf(run.model.path).searched_matrices


def store_of(folder: RunFolder, key: str) -> ActivationStore:
    """Return the store of activations in `folder`; reading it fails if it has another key."""
    return ActivationStore(folder / "activations", key)
