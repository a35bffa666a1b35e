"""Capture: llama.cpp against this project's PyTorch path, and that against repeng and steering-vectors.

The quantised default model and the same prompts on all sides: block outputs of every block at the last
prompt token. The PyTorch sides share one network, dequantised to F32, and a copy of it in bf16 where the
processor multiplies that. The peers are used well: what only training needs is left out (their functions
that read activations are called themselves), and so are the logits, since they get the network without its
head; prompts are tokenised by their own code in batches, sorted by length so that little is padding, all
cores, and each is timed with batches of 1, 8 and 32 prompts, of which its best counts. The sides take turns,
after a first call of each that is not timed.
Printed are prompts per second, how far the activations and the directions made of them agree, and the peak
memory of a process that captures through llama.cpp, beside the size of the model file; with `--wider K` only
that, of a model K times as wide. The peers come with pip, once, into the user's cache folder.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rs_gguf.engines.answers import chat_tokens
from rs_gguf.engines.engine import read_last
from rs_gguf.engines.llama.model import LlamaModel
from rs_gguf.models import resolve as models
from rs_gguf.prompts import grid as prompts
from rs_gguf.records.conversation import Prompt

REPENG, STEERING_VECTORS = "repeng==0.4.0", "steering-vectors==0.12.2"
BATCHES = (1, 8, 32)  # prompts that a peer reads at once
Activations = npt.NDArray[np.float32]  # [N, L, D]
Peer = Callable[[Any, list[str], int], Activations]  # of a network, texts and how many are read at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument("--prompts", type=int, default=32, help="half of them harmful, half benign")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--memory", action="store_true", help="only capture through llama.cpp, print the peak"
    )
    parser.add_argument(
        "--wider", type=int, metavar="K", help="only the memory, of the model made K times as wide, in Q4_0"
    )
    options = parser.parse_args()
    path = models.resolve(options.model)
    asked = [
        prompt
        for kind in ("harmful", "benign")
        for prompt in prompts.stratified(
            [p for p in prompts.grid([kind]) if p.split == "fit"], options.prompts // 2, seed=1
        )
    ]
    if options.memory:
        print(json.dumps(peak_memory(path, asked)))
        return
    if options.wider:
        with tempfile.TemporaryDirectory() as folder:
            wider = Path(folder) / "wider.gguf"
            # In a process of its own: the peak of this one would be that of its children too.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(write_wider, path, options.wider, wider).result()
            report_memory(wider, options.prompts)
        return
    report_memory(path, options.prompts)
    found = race(path, asked, options.repeats)
    compare(found, np.array([1.0 if p.kind == "harmful" else -1.0 for p in asked]))


# ---- speed ---------------------------------------------------------------------------------------------


def race(path: Path, asked: list[Prompt], repeats: int) -> dict[str, Activations]:
    """Print prompts per second of all sides; the activations that each read."""
    import torch
    import transformers

    from rs_gguf.engines.pytorch.model import TorchModel
    from rs_gguf.models.configuration import keeps_bf16

    ours, network = LlamaModel(path), TorchModel(path)
    tokens = chat_tokens(ours, asked)
    lengths = [len(t) for t in tokens]
    print(f"{len(asked)} prompts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
    texts = [ours.detokenize(t, special=True) for t in tokens]
    assert [network.tokenize(text) for text in texts] == tokens  # so that all sides read the same

    def read(model: Any, chosen: list[int]) -> Activations:
        return read_last(model, [tokens[i] for i in chosen], range(model.n_layer))["l_out"]

    def read_by(peer: Peer, model: Any, batch: int, chosen: list[int]) -> Activations:
        return peer(model, [texts[i] for i in chosen], batch)

    networks = {"": network}
    if keeps_bf16(transformers.PretrainedConfig(dtype=torch.bfloat16)):
        networks[", bf16"] = rounded = copy.copy(network)
        rounded.model = copy.deepcopy(network.model).bfloat16()
    sides: dict[str, Callable[[list[int]], Activations]] = {"llama.cpp": partial(read, ours)}
    for name, used in networks.items():
        sides[f"PyTorch{name}"] = partial(read, used)
        for batch in BATCHES:
            sides |= {
                f"{REPENG}{name}, {batch} at once": partial(read_by, with_repeng, used, batch),
                f"{STEERING_VECTORS}{name}, {batch} at once": partial(
                    read_by, with_steering_vectors, used, batch
                ),
            }
    by_length = sorted(range(len(texts)), key=lambda i: lengths[i])
    for side in sides.values():
        side(by_length[:2])  # a peer is fetched and imported
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found = {}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 == 0 else reversed(list(sides)):
            start = time.perf_counter()
            found[name] = sides[name](by_length)
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:<42} {len(asked) / seconds[name][-1]:7.2f} prompts/s", flush=True)
    median = {name: statistics.median(of) for name, of in seconds.items()}
    print(f"llama.cpp is {median['PyTorch'] / median['llama.cpp']:.2f} times as fast as PyTorch")
    for name in networks:
        for peer in (f"{REPENG}{name}", f"{STEERING_VECTORS}{name}"):
            best = min((f"{peer}, {batch} at once" for batch in BATCHES), key=lambda side: median[side])
            ratio = median[best] / median[f"PyTorch{name}"]
            print(f"PyTorch{name} is {ratio:.2f} times as fast as {best}, its best of {BATCHES}")
    return {name: activations[np.argsort(by_length)] for name, activations in found.items()}


def with_repeng(network: Any, texts: list[str], batch: int) -> Activations:
    sys.path.insert(0, str(package(REPENG)))
    np.float_ = np.float64  # type: ignore[attr-defined]  # its annotations are those of NumPy 1
    from repeng.extract import batched_get_hiddens

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        found = batched_get_hiddens(
            network.model.base_model, network.tokenizer, texts, list(range(network.n_layer)), batch
        )
    return np.stack([found[layer] for layer in range(network.n_layer)], axis=1)


def with_steering_vectors(network: Any, texts: list[str], batch: int) -> Activations:
    """Its unit is a pair: one half of the prompts is given as the positive side, the other as the negative.

    Neighbours in length stay together: what is even in number is on the one side, what is odd on the other.
    """
    import torch

    sys.path.insert(0, str(package(STEERING_VECTORS)))
    from steering_vectors import extract_activations

    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    sides = extract_activations(network.model.base_model, network.tokenizer, pairs, batch_size=batch)
    even, odd = (
        torch.stack([torch.cat(side[layer]) for layer in range(network.n_layer)], dim=1).float().numpy()
        for side in sides
    )
    return np.stack([even, odd], axis=1).reshape(len(texts), *even.shape[1:])


def package(requirement: str) -> Path:
    from fixtures.binaries import package

    return package(requirement)


# ---- agreement -----------------------------------------------------------------------------------------


def compare(found: dict[str, Activations], confidence: npt.NDArray[np.float64]) -> None:
    """Print cosines of each side's activations and directions to those of the PyTorch path."""
    from rs_gguf.estimators.estimator import MeanDifference, WeightedRidgeMeanDifference, fit_paths

    def directions(activations: Activations) -> npt.NDArray[np.float64]:
        estimators = [MeanDifference(), WeightedRidgeMeanDifference()]
        # Block 0 is out of reach for a control vector, and sees nearly the same token in every last place.
        paths = fit_paths(activations[:, 1:], confidence, estimators, ridges=[1.0])
        return np.stack([path.directions[0] for path in paths])

    expected = directions(found["PyTorch"])
    for name, activations in found.items():
        if name != "PyTorch":
            rows = cosines(activations, found["PyTorch"])
            md, wrmd = (directions(activations) * expected).sum(-1)
            print(
                f"{name:<42} to PyTorch: cosine of activations ≥ {rows.min():.6f}; of directions "
                f"md ≥ {md.min():.6f} (median {np.median(md):.6f}), "
                f"wrmd ≥ {wrmd.min():.6f} (median {np.median(wrmd):.6f})"
            )


def cosines(a: Activations, b: Activations) -> npt.NDArray[np.float64]:
    dot = (a.astype(np.float64) * b).sum(-1)
    norms = np.linalg.norm(a.astype(np.float64), axis=-1) * np.linalg.norm(b.astype(np.float64), axis=-1)
    found: npt.NDArray[np.float64] = dot / norms
    return found


# ---- memory --------------------------------------------------------------------------------------------


def peak_memory(path: Path, asked: list[Prompt]) -> dict[str, float]:
    """Megabytes of this process before the model is opened, and at most."""
    before = peak()
    with LlamaModel(path) as model:
        sequences = chat_tokens(model, asked)
        for _ in model.read(sequences, [(len(s) - 1,) for s in sequences], range(model.n_layer)):
            pass
    return {"before": before, "peak": peak()}


def peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def write_wider(path: Path, times: int, to: Path) -> None:
    """The model with each width `times` as large, its weights repeated: what counts is how many there are."""
    reader = gguf.GGUFReader(path)
    fields = {
        name: field for name, field in reader.fields.items() if not name.startswith(("GGUF.", "general."))
    }
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(to, architecture, use_temp_file=True)
    widths = ("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    for name, field in fields.items():
        value = field.contents()
        grown = name.removeprefix(f"{architecture}.") in widths
        writer.add_key_value(name, value * times if grown else value, field.types[0], field.types[-1])
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if weights.ndim == 1:
            writer.add_tensor(tensor.name, np.tile(weights, times))
            continue
        vocabulary = tensor.name in ("token_embd.weight", "output.weight")
        tiled = np.tile(weights / times, (1 if vocabulary else times, times))
        q4_0 = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, gguf.quants.quantize(tiled, q4_0), raw_dtype=q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def report_memory(path: Path, count: int) -> None:
    command = [sys.executable, __file__, "--memory", "--model", str(path), "--prompts", str(count)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = path.stat().st_size / 1e6
    print(
        f"peak memory of a capture through llama.cpp: {found['peak']:.0f} MB, {found['peak'] / size:.2f} "
        f"times the file's {size:.0f} MB; {found['before']:.0f} MB were in use before the model was opened"
    )


if __name__ == "__main__":
    main()
