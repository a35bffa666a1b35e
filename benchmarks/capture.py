"""Measure activation capture: llama.cpp against PyTorch, and PyTorch against repeng and steering-vectors.

All methods read the same prompts with the quantised default model: the activations of every layer at the last
prompt token. The PyTorch methods share one network, dequantised to F32, and a bf16 copy if the processor
multiplies bf16. The peers get good conditions. Only their functions that read activations are called, on the
network without its head, so that no logits are computed. Their own code tokenises the prompts, sorted by
length to avoid padding, on all cores. Each runs with batches of 1, 8 and 32 prompts; the best one counts. The
methods take turns after a first call of each, which is not timed.

Prints prompts/s, and the agreement of the activations and of directions fitted on them. Also prints the peak
memory of a process that captures through llama.cpp, relative to the size of the model file. `--wider K`
prints only the memory, for a model K times as wide. pip installs the peers once into the user's cache folder.
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
BATCHES = (1, 8, 32)  # prompts in one batch of a peer
Activations = npt.NDArray[np.float32]  # [N, L, D]
Peer = Callable[[Any, list[str], int], Activations]  # takes a network, texts and the batch size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=models.DEFAULT)
    parser.add_argument(
        "--prompts", type=int, default=32, help="number of prompts, half harmful and half benign"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--memory", action="store_true", help="only capture through llama.cpp and print the peak memory"
    )
    parser.add_argument(
        "--wider", type=int, metavar="K", help="only the memory, for the model made K times as wide, in Q4_0"
    )
    options = parser.parse_args()
    path = models.resolve(options.model)
    sample = [
        prompt
        for kind in ("harmful", "benign")
        for prompt in prompts.stratified(
            [p for p in prompts.grid([kind]) if p.split == "fit"], options.prompts // 2, seed=1
        )
    ]
    if options.memory:
        print(json.dumps(peak_memory(path, sample)))
        return
    if options.wider:
        with tempfile.TemporaryDirectory() as folder:
            wider = Path(folder) / "wider.gguf"
            # Use a separate process: children inherit the peak memory of this one.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(write_wider, path, options.wider, wider).result()
            report_memory(wider, options.prompts)
        return
    report_memory(path, options.prompts)
    activations = race(path, sample, options.repeats)
    compare(activations, np.array([1.0 if p.kind == "harmful" else -1.0 for p in sample]))


# ---- speed ---------------------------------------------------------------------------------------------


def race(path: Path, sample: list[Prompt], repeats: int) -> dict[str, Activations]:
    """Print prompts/s of all methods; return the activations [N, L, D] that each read."""
    import torch
    import transformers

    from rs_gguf.engines.pytorch.model import TorchModel
    from rs_gguf.models.configuration import keeps_bf16

    ours, network = LlamaModel(path), TorchModel(path)
    tokens = chat_tokens(ours, sample)
    lengths = [len(t) for t in tokens]
    print(f"{len(sample)} prompts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
    texts = [ours.detokenize(t, special=True) for t in tokens]
    assert [network.tokenize(text) for text in texts] == tokens  # all methods must read the same tokens

    def read(model: Any, indices: list[int]) -> Activations:
        return read_last(model, [tokens[i] for i in indices], range(model.n_layer))["l_out"]

    def read_by(peer: Peer, model: Any, batch: int, indices: list[int]) -> Activations:
        return peer(model, [texts[i] for i in indices], batch)

    networks = {"": network}
    if keeps_bf16(transformers.PretrainedConfig(dtype=torch.bfloat16)):
        networks[", bf16"] = rounded = copy.copy(network)
        rounded.model = copy.deepcopy(network.model).bfloat16()
    methods: dict[str, Callable[[list[int]], Activations]] = {"llama.cpp": partial(read, ours)}
    for name, instance in networks.items():
        methods[f"PyTorch{name}"] = partial(read, instance)
        for batch in BATCHES:
            methods |= {
                f"{REPENG}{name}, {batch} at once": partial(read_by, with_repeng, instance, batch),
                f"{STEERING_VECTORS}{name}, {batch} at once": partial(
                    read_by, with_steering_vectors, instance, batch
                ),
            }
    by_length = sorted(range(len(texts)), key=lambda i: lengths[i])
    for method in methods.values():
        method(by_length[:2])  # downloads and imports the peers
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    activations = {}
    for repeat in range(repeats):
        for name in list(methods) if repeat % 2 == 0 else reversed(list(methods)):
            start = time.perf_counter()
            activations[name] = methods[name](by_length)
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:<42} {len(sample) / seconds[name][-1]:7.2f} prompts/s", flush=True)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"llama.cpp is {median['PyTorch'] / median['llama.cpp']:.2f} times as fast as PyTorch")
    for name in networks:
        for peer in (f"{REPENG}{name}", f"{STEERING_VECTORS}{name}"):
            best = min((f"{peer}, {batch} at once" for batch in BATCHES), key=lambda name: median[name])
            ratio = median[best] / median[f"PyTorch{name}"]
            print(f"PyTorch{name} is {ratio:.2f} times as fast as {best}, its best of {BATCHES}")
    return {name: rows[np.argsort(by_length)] for name, rows in activations.items()}


def with_repeng(network: Any, texts: list[str], batch: int) -> Activations:
    sys.path.insert(0, str(package(REPENG)))
    np.float_ = np.float64  # type: ignore[attr-defined]  # its annotations need NumPy 1
    from repeng.extract import batched_get_hiddens

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        rows = batched_get_hiddens(
            network.model.base_model, network.tokenizer, texts, list(range(network.n_layer)), batch
        )
    return np.stack([rows[layer] for layer in range(network.n_layer)], axis=1)


def with_steering_vectors(network: Any, texts: list[str], batch: int) -> Activations:
    """Read activations in pairs, the unit of the peer: even prompts as positive, odd ones as negative.

    The prompts of a pair thus have similar lengths.
    """
    import torch

    sys.path.insert(0, str(package(STEERING_VECTORS)))
    from steering_vectors import extract_activations

    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    halves = extract_activations(network.model.base_model, network.tokenizer, pairs, batch_size=batch)
    even, odd = (
        torch.stack([torch.cat(half[layer]) for layer in range(network.n_layer)], dim=1).float().numpy()
        for half in halves
    )
    return np.stack([even, odd], axis=1).reshape(len(texts), *even.shape[1:])


def package(requirement: str) -> Path:
    from fixtures.binaries import package

    return package(requirement)


# ---- agreement -----------------------------------------------------------------------------------------


def compare(activations: dict[str, Activations], confidence: npt.NDArray[np.float64]) -> None:
    """Print the cosines of each method's activations and directions with PyTorch's."""
    from rs_gguf.estimators.estimator import MeanDifference, WeightedRidgeMeanDifference, fit_paths

    def directions(rows: Activations) -> npt.NDArray[np.float64]:
        estimators = [MeanDifference(), WeightedRidgeMeanDifference()]
        # A control vector cannot steer layer 0, whose input is nearly the same last token in all prompts.
        paths = fit_paths(rows[:, 1:], confidence, estimators, ridges=[1.0])
        return np.stack([path.directions[0] for path in paths])

    expected = directions(activations["PyTorch"])
    for name, rows in activations.items():
        if name != "PyTorch":
            row_cosines = cosines(rows, activations["PyTorch"])
            md, wrmd = (directions(rows) * expected).sum(-1)
            print(
                f"{name:<42} to PyTorch: cosine of activations ≥ {row_cosines.min():.6f}; of directions "
                f"md ≥ {md.min():.6f} (median {np.median(md):.6f}), "
                f"wrmd ≥ {wrmd.min():.6f} (median {np.median(wrmd):.6f})"
            )


def cosines(a: Activations, b: Activations) -> npt.NDArray[np.float64]:
    dot = (a.astype(np.float64) * b).sum(-1)
    norms = np.linalg.norm(a.astype(np.float64), axis=-1) * np.linalg.norm(b.astype(np.float64), axis=-1)
    result: npt.NDArray[np.float64] = dot / norms
    return result


# ---- memory --------------------------------------------------------------------------------------------


def peak_memory(path: Path, sample: list[Prompt]) -> dict[str, float]:
    """Return the peak memory of this process in MB, before the model is opened and in total."""
    before = peak()
    with LlamaModel(path) as model:
        sequences = chat_tokens(model, sample)
        for _ in model.read(sequences, [(len(s) - 1,) for s in sequences], range(model.n_layer)):
            pass
    return {"before": before, "peak": peak()}


def peak() -> float:
    """Return the peak memory of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, other systems KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def write_wider(path: Path, times: int, to: Path) -> None:
    """Write the model with each width `times` as large. Weights are repeated; only their number matters."""
    reader = gguf.GGUFReader(path)
    fields = {
        name: field for name, field in reader.fields.items() if not name.startswith(("GGUF.", "general."))
    }
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(to, architecture, use_temp_file=True)
    widths = ("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    for name, field in fields.items():
        value = field.contents()
        scales = name.removeprefix(f"{architecture}.") in widths
        writer.add_key_value(name, value * times if scales else value, field.types[0], field.types[-1])
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
    memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = path.stat().st_size / 1e6
    print(
        f"peak memory of a capture through llama.cpp: {memory['peak']:.0f} MB, {memory['peak'] / size:.2f} "
        f"times the file's {size:.0f} MB; {memory['before']:.0f} MB were in use before the model was opened"
    )


if __name__ == "__main__":
    main()
