"""The capture stage: what the model computes at the fit prompts and their answers, kept in shards."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rs_gguf.activations.capture import ANSWER_TOKENS, SHARD, capture_all, conversations
from rs_gguf.activations.store import ActivationStore
from rs_gguf.pipeline.costs import CHANGED, Cost, Costs, mean_length
from rs_gguf.pipeline.folder import RunFolder
from rs_gguf.pipeline.stage import Run, Stage
from rs_gguf.pipeline.stages.answers import judged
from rs_gguf.prompts import contexts
from rs_gguf.records.artefacts import STAGES

_AROUND = 15  # tokens of a context around a prompt, beside what is read once for several


class Capture(Stage):
    """The activations of the fit prompts and the inputs of the matrices that a gate reads, in the store."""

    info = STAGES["capture"]
    shared = True

    def inputs(self, run: Run) -> list[Any]:
        return [[p.id for p in run.gate_only], [asdict(c) for c in contexts.shipped()]]

    def work(self, run: Run, key: str) -> None:
        asked, others = run.prompts["fit"], run.in_contexts
        answers = {row["id"]: row["tokens"] for row in run.folder.read_rows("answers.jsonl")}
        refused = {name for name, row in judged(run.folder).items() if row["confidence"] > 0}
        with run.progress.stage(self.info.name, len(asked) + len(others)) as advance:
            system = run.recipe.prompts.system
            read, prefix = conversations(run.model, asked, system, answers, refused, others)
            ids = [p.id for p in asked] + [p.id for p, _ in others]
            store = store_of(run.folder, key)
            capture_all(run.model, ids, read, prefix, store, processes=run.processes, advance=advance)

    def cost(self, costs: Costs) -> Cost:
        answered = costs.count("fit")
        n, model = answered + costs.gate_only, costs.model
        read = n * costs.prompt + costs.gate_only * _AROUND
        if model.output_matrices:
            # Up to the last of some tokens at random, of answers that a gate is to stay shut for.
            depth = ANSWER_TOKENS / (ANSWER_TOKENS + 1) * mean_length(costs.recipe.answers.tokens)
            read += answered * (1 - CHANGED / 3) * depth
        rows = n + costs.other_tokens() + 2 * costs.prefix  # the template's tokens are kept in F32
        outputs = model.n_layer * model.width
        # A shard in F32, and the copies of one matrix that are made of it; at last the template's tokens.
        shard = max(min(SHARD, n) * (rows / n if n else 0), 2 * costs.prefix)
        working = 4 * shard * (2 * costs.inputs + outputs)
        disk = 4 * n * outputs + 2 * rows * costs.inputs
        return Cost(costs.reading(read), costs.memory() + working, disk, read)


def store_of(folder: RunFolder, key: str) -> ActivationStore:
    """Return the activations in `folder`, as those captured under `key`."""
    return ActivationStore(folder / "activations", key)
