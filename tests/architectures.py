"""What stock llama.cpp does with steering, family by family, measured against the same weights in PyTorch.

The cases of `families` go in; out come the facts that `test_architectures.py` asserts, and the page
docs/architectures.md. `python tests/architectures.py` writes it anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
import transformers
from families import CASES, N_LAYER, VOCABULARY, WIDTH, network, write_gguf

from rs_gguf import lora, proof
from rs_gguf.adapter import WRITERS, writer_inputs
from rs_gguf.convert import combine
from rs_gguf.errors import InputError
from rs_gguf.llama import LlamaModel
from rs_gguf.lora import LoraAdapter
from rs_gguf.steering import SteeringVector

Logits = npt.NDArray[np.float32]
Parts = Sequence[tuple[Sequence[int], float]]  # (blocks, scale) of each vector

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
TOLERANCE = 1e-3  # of a logit, between the engines, in F32
INPUT_TOLERANCE = 1e-2  # relative; GELU alone is 2e-3, another tensor would be about 1
RANK = 2
PROMPTS = [
    [int(token) for token in np.random.default_rng(length).integers(2, len(VOCABULARY), length)]
    for length in (12, 7)
]
# First, middle and last block that llama.cpp can steer, then several at once.
VECTORS: dict[str, Parts] = {
    "first": [([1], 1.0)],
    "middle": [([N_LAYER // 2], 1.0)],
    "last": [([N_LAYER - 1], 1.0)],
    "negative": [(range(1, N_LAYER), -1.5)],
    "combined": [([1, 2], 0.7), ([2, 3], -1.2)],
}
ADAPTERS = {"whole": 1.0, "negative": -0.5}
# Families whose converted network differs from transformers' own even unsteered.
NOT_COMPARED = ("Hy4",)


# ---- the two engines ------------------------------------------------------------------------------


@contextmanager
def llama(file: Path, n_ctx: int = 256) -> Iterator[LlamaModel]:
    """A model whose keys and values stay F32: as F16, the default, they alone move logits by 4e-3."""

    def exact(defaults: Callable[[], Any] = llama_cpp.llama_context_default_params) -> Any:
        params = defaults()
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    # Some contexts are made at first use, so the patch stays.
    with (
        patch.object(llama_cpp, "llama_context_default_params", exact),
        LlamaModel(file, n_parallel=8, n_ctx=n_ctx, n_threads=1) as model,
    ):
        yield model


def llama_logits(model: LlamaModel) -> Logits:
    """Logits [T, V] of what follows each beginning of each prompt."""
    beginnings = [prompt[: end + 1] for prompt in PROMPTS for end in range(len(prompt))]
    found = {i: logits.copy() for i, logits in model.next_logits(beginnings)}
    return np.stack([found[i] for i in range(len(beginnings))])


def torch_logits(model: torch.nn.Module) -> Logits:
    """The same from PyTorch, one pass a prompt."""
    with torch.inference_mode():
        return np.concatenate([model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS])


# ---- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """`apart`: largest difference of a logit between the engines, over all positions. `moved`: what steering
    itself does in llama.cpp, as the largest change of a logit, at the position where that is least.
    """

    apart: float
    moved: float

    @classmethod
    def of(cls, plain: Logits, steered: Logits, expected: Logits) -> Agreement:
        return cls(float(np.abs(steered - expected).max()), float(np.abs(steered - plain).max(axis=1).min()))


@dataclass(frozen=True)
class Measured:
    """One family: agreements by kind of steering, and the blocks that have each matrix of a gated adapter."""

    architecture: str  # llama.cpp's own word
    apart: float  # the engines, unsteered
    vectors: dict[str, Agreement]
    adapters: dict[str, Agreement]
    matrices: dict[str, list[int]]
    inputs: dict[str, float]  # of those matrices, as llama.cpp tells them: the largest relative difference
    checks: list[proof.Proof]  # what `check` says of a vector on every block and of the adapter

    @property
    def ignores_vectors(self) -> bool:
        return all(found.moved == 0.0 for found in self.vectors.values())


def measure(names: Iterable[str]) -> dict[str, Measured]:
    """Convert and run these cases: about 1 s each."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: _measure(name, file) for name, file in write_gguf(names, Path(folder)).items()}


def _measure(name: str, file: Path) -> Measured:
    reference = network(name)
    with llama(file) as model:
        plain = llama_logits(model)
        vectors = {
            label: Agreement.of(plain, *_steered(reference, model, parts)) for label, parts in VECTORS.items()
        }
        weights = _writers(file)
        adapters = {
            label: Agreement.of(plain, *_adapted(reference, model, weights, scale, file.with_suffix(".lora")))
            for label, scale in ADAPTERS.items()
        }
        inputs = _inputs(reference, model, weights)
        checks = [
            proof.prove(_vector(range(1, N_LAYER), 0), model),
            proof.prove(file.with_suffix(".lora"), model),
        ]
    blocks = {
        writer: [n for n in range(N_LAYER) if f"blk.{n}.{writer}.weight" in weights] for writer in WRITERS
    }
    apart = float(np.abs(plain - torch_logits(reference)).max())
    return Measured(model.architecture, apart, vectors, adapters, blocks, inputs, checks)


def _steered(network: torch.nn.Module, model: LlamaModel, parts: Parts) -> tuple[Logits, Logits]:
    """Logits under the sum of weighted vectors: one buffer in llama.cpp, nested hooks in PyTorch."""
    vectors = [(_vector(blocks, seed), scale) for seed, (blocks, scale) in enumerate(parts)]
    with model.steered(dict(combine(vectors).directions)):
        found = llama_logits(model)
    with ExitStack() as hooks:
        for vector, scale in vectors:
            hooks.enter_context(vector.apply(network, scale))
        return found, torch_logits(network)


def _vector(blocks: Sequence[int], seed: int) -> SteeringVector:
    rng = np.random.default_rng(seed)
    return SteeringVector({block: rng.standard_normal(WIDTH) for block in blocks})


def _writers(file: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The matrices that a gated adapter may change, by their names in the file."""
    names = {f"blk.{block}.{writer}.weight" for block in range(N_LAYER) for writer in WRITERS}
    tensors = gguf.GGUFReader(file).tensors
    return {tensor.name: np.array(tensor.data) for tensor in tensors if tensor.name in names}


def _adapted(
    network: torch.nn.Module, model: LlamaModel, weights: dict[str, Any], scale: float, file: Path
) -> tuple[Logits, Logits]:
    """Logits under one random LoRA on all `weights`: as a file in llama.cpp, added to them in PyTorch."""
    rng = np.random.default_rng(7)
    factors = {
        name: (
            (rng.standard_normal((RANK, weight.shape[1])) / weight.shape[1] ** 0.5).astype(np.float32),
            (rng.standard_normal((weight.shape[0], RANK)) * 0.3).astype(np.float32),
        )
        for name, weight in weights.items()
    }
    lora.write(LoraAdapter(factors, model.architecture), file)
    with model.steered(adapters=[(file, scale)]):
        found = llama_logits(model)
    changed = []
    with torch.no_grad():
        try:
            for name, (a, b) in factors.items():
                weight = _parameter(network, weights[name])
                changed.append((weight, weight.clone()))
                weight += scale * torch.from_numpy(b @ a)
            return found, torch_logits(network)
        finally:
            for weight, before in changed:
                weight.copy_(before)


def _inputs(network: torch.nn.Module, model: LlamaModel, weights: Mapping[str, Any]) -> dict[str, float]:
    """How far apart the engines are on what each matrix multiplies at the last token, by kind of matrix."""
    names = model.graph_tensors()
    apart: dict[str, float] = {}
    for block in range(N_LAYER):
        try:
            inputs = writer_inputs(names, block)
        except InputError:  # none that can be read
            continue
        for writer, tensor in inputs.items():
            expected = _torch_inputs(network, weights[f"blk.{block}.{writer}.weight"])
            for prompt, row in zip(PROMPTS, expected, strict=True):
                ((_, found),) = model.activations([prompt], layers=[block], tensors=[tensor])
                difference = np.abs(found[tensor][0] - row).max() / np.abs(row).max()
                apart[writer] = max(apart.get(writer, 0.0), float(difference))
    return apart


def _torch_inputs(network: torch.nn.Module, converted: Logits) -> list[Logits]:
    """What the module with this weight is given at the last token of each prompt."""
    weight = _parameter(network, converted).data_ptr()
    (module,) = (
        module
        for module in network.modules()
        if any(own.data_ptr() == weight for own in module.parameters(recurse=False))
    )
    rows: list[Logits] = []
    hook = module.register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].reshape(-1, inputs[0].shape[-1])[-1].numpy().copy())
    )
    torch_logits(network)
    hook.remove()
    return rows


def _parameter(network: torch.nn.Module, converted: npt.NDArray[np.float32]) -> torch.Tensor:
    """The parameter that was converted to these numbers, as a view [out, in]: GPT-2 stores it transposed."""
    wanted = torch.from_numpy(converted)
    views = (
        view for weight in network.parameters() if weight.ndim == 2 for view in (weight.data, weight.data.T)
    )
    (found,) = (view for view in views if view.shape == wanted.shape and torch.equal(view, wanted))
    return found


# ---- the page -------------------------------------------------------------------------------------

_HEAD = (
    "family",
    "in llama.cpp",
    "control vector",
    "adapter can change",
    "input can be read",
    "vector: apart",
    "vector: moves",
    "adapter: apart",
    "adapter: moves",
)
_N_FACTS = 5  # columns that are the same on every machine
_PAGE = """\
# Architectures

What stock llama.cpp does with steering, family by family. Written on {date} by
`python tests/architectures.py`, with llama-cpp-python {llama} and transformers {transformers}; the tests
measure it all again and fail when the first five columns are no longer true.

For each family a random network of {layers} blocks, {width} wide, is made with transformers, converted to
F32 by llama.cpp's own converter, and run by both engines. Steering in PyTorch (the hooks of
`SteeringVector.apply`; an adapter's product added to the weights) and in llama.cpp (what
`--control-vector-scaled` and `--lora` end in) must give the same logits at every position, up to
{tolerance:g}. Vectors: the first, a middle and the last block, all at a negative scale, two overlapping
ones at two scales. Adapters: rank {rank} on every matrix named, at scales 1 and −0.5.

- **control vector**: whether every block from 1 on is steered. `check --model` tells it of your own model.
- **adapter can change**: which matrices of a gated adapter exist; in how many blocks, where not in all.
- **input can be read**: those of which llama.cpp tells what they multiply, as the fit of a gate needs it; it
  is then the same in both engines.
- **apart**: the largest difference of a logit between the engines. Families with GELU are further apart,
  steered or not: llama.cpp looks it up in a table of F16 values.
- **moves**: the largest change of a logit by steering, at the position and the scale where it is least.

Gemma 3n is left out: its residual is four streams, which cannot be read, and a run ends with an error.

{table}
"""


def page(measured: Mapping[str, Measured]) -> str:
    """The whole of docs/architectures.md."""
    rows = [_HEAD, ["---"] * len(_HEAD), *(_row(family, found) for family, found in measured.items())]
    return _PAGE.format(
        date=date.today(),
        llama=llama_cpp.__version__,
        transformers=transformers.__version__,
        tolerance=TOLERANCE,
        layers=N_LAYER,
        width=WIDTH,
        rank=RANK,
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
    )


def facts(text: str) -> list[list[str]]:
    """The rows of a page's table without the figures, which differ from processor to processor."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row[:_N_FACTS] for row in rows]


def _row(family: str, found: Measured) -> list[str]:
    matrices = [
        writer + (f" ({len(blocks)} of {N_LAYER})" if len(blocks) < N_LAYER else "")
        for writer, blocks in found.matrices.items()
        if blocks
    ]
    vectors = ["–", "–"] if found.ignores_vectors else _figures(found.vectors)
    adapters = ["–", "–"] if family in NOT_COMPARED else _figures(found.adapters)
    steered = "**ignored**" if found.ignores_vectors else "yes"
    inputs = [writer for writer in WRITERS if writer in found.inputs and family not in NOT_COMPARED]
    told = [", ".join(matrices) or "–", ", ".join(inputs) or "–"]
    return [family, f"`{found.architecture}`", steered, *told, *vectors, *adapters]


def _figures(agreements: Mapping[str, Agreement]) -> list[str]:
    apart = max(agreement.apart for agreement in agreements.values())
    moved = min(agreement.moved for agreement in agreements.values())
    return [f"{apart:.0e}", f"{moved:.2f}"]


if __name__ == "__main__":
    PAGE.write_text(page(measure(CASES)), encoding="utf-8")
