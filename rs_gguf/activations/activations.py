"""`Activations`: the one type of activations that a fit takes, whatever stores the numbers.

Takes arrays, memory maps, tensors or shards on disk. Returns float64 tensors of one layer at a time, on the
device of the fit. Nothing is read before then.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_gguf.errors import InputError
from rs_gguf.machine import Processes

Samples: TypeAlias = "slice | npt.NDArray[Any]"

CHUNK_SAMPLES = 256
"""Samples to convert at once: small compared with a layer, large enough for fast matrix products."""


class Activations:
    """Rows [N, L, D] of any float type, in one part or in several parts one after another.

    Args:
        parts: arrays, memory maps, tensors or slices of a shard, each [n, L, D].
        indices: the selected samples, as indices into all parts; None selects all.
        layers: the layers that the parts hold; None if they hold all. Rows of other layers are 0.
        name: the name of the rows in error messages.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        indices: npt.NDArray[np.intp] | None = None,
        *,
        name: str = "activations",
        layers: Sequence[int] | None = None,
    ) -> None:
        self._parts, self.name, self._layers = parts, name, layers
        self._ends = np.cumsum([part.shape[0] for part in parts])
        self._whole = indices is None
        self._indices = np.arange(self._ends[-1]) if indices is None else indices
        self.shape: tuple[int, int, int] = (len(self._indices), *parts[0].shape[1:])

    @classmethod
    def of(cls, source: Any, *, name: str = "activations") -> Activations:
        """Return `source` itself if it is `Activations`; otherwise wrap one array or tensor [N, L, D].

        Raises:
            InputError: `source` does not have three axes, or has no layers or no width.
        """
        if isinstance(source, Activations):
            return source
        shape = tuple(int(size) for size in getattr(source, "shape", ()))
        if len(shape) != 3 or 0 in shape[1:]:
            raise InputError(
                f"{name} have the shape {shape}; an array or tensor [samples, layers, width] is needed"
            )
        return cls([source], name=name)

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, samples: Samples) -> Activations:
        """Return a selection of samples by a slice, a mask or indices. Read nothing."""
        return Activations(self._parts, self._indices[samples], name=self.name, layers=self._layers)

    def layer_rows(
        self, layer: int, samples: Samples = slice(None), device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return the rows of one layer as float64 [n, D] on `device`. The caller may write to the tensor.

        Raises:
            InputError: a row holds NaN or Inf. The message names the layer and the sample.
        """
        rows = self._read(layer, self._indices[samples], device)
        # Minimum and maximum propagate NaN, and need no mask as large as the rows.
        extremes = torch.stack(rows.aminmax(dim=1))
        bad = torch.nonzero(~torch.isfinite(extremes).all(dim=0))
        if len(bad):
            sample = np.arange(len(self))[samples][int(bad[0])]
            raise InputError(
                f"{self.name} of layer {layer} hold NaN or Inf in {len(bad)} of the samples read, first in "
                f"sample {sample}; finite numbers are needed. Leave these samples out, or use another build "
                "of the model: this one overflows."
            )
        return rows

    def chunks(
        self, layer: int, members: npt.NDArray[Any], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[npt.NDArray[Any], Tensor]]:
        """Yield (indices [n], rows [n, D]) of the samples `members` of one layer, read by `layer_rows`."""
        for start in range(0, len(members), CHUNK_SAMPLES):
            part = members[start : start + CHUNK_SAMPLES]
            yield part, self.layer_rows(layer, part, device)

    def _read(self, layer: int, indices: npt.NDArray[np.intp], device: torch.device | str) -> Tensor:
        if self._layers is not None:
            if layer not in self._layers:
                return torch.zeros((len(indices), self.shape[2]), dtype=torch.float64, device=device)
            layer = self._layers.index(layer)
        part_numbers = np.searchsorted(self._ends, indices, side="right")
        pieces, positions = [], []
        for number in np.unique(part_numbers):
            part, position = self._parts[number], np.flatnonzero(part_numbers == number)
            rows_of_part = indices[position] - (self._ends[number] - part.shape[0])
            pieces.append(_float64(_rows(part, rows_of_part, layer)).to(device))
            positions.append(position)
        if len(pieces) == 1:
            return pieces[0]
        rows = torch.empty((len(indices), self.shape[2]), dtype=torch.float64, device=device)
        for piece, position in zip(pieces, positions, strict=True):
            rows[torch.from_numpy(position).to(device)] = piece
        return rows

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type that represents every part without loss."""
        return np.result_type(*(_dtype(part) for part in self._parts))

    def array(self, folder: Path) -> npt.NDArray[Any]:
        """Return all rows as one array [N, L, D], for the projection kernel.

        A single whole array is returned itself. Otherwise return a memory map of a nameless file in `folder`.

        Raises:
            InputError: the disk is full, or `folder` cannot be written.
        """
        if len(self._parts) == 1 and isinstance(self._parts[0], np.ndarray) and self._whole:
            return self._parts[0]
        if not len(self):
            return np.empty(self.shape, self.dtype)  # An empty file cannot be mapped.
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                for piece in self._pieces():
                    # Not written through the map: on a full disk that would kill the process.
                    file.write(piece.astype(self.dtype, copy=False).tobytes())
                file.flush()
                return np.memmap(file, self.dtype, "r", shape=self.shape)
        except OSError as error:
            raise InputError(
                f"cannot write to {folder}: {error.strerror or error}. Free space and start again."
            ) from error

    def _pieces(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the selected samples in order, as runs [n, L, D] of one part each."""
        part_numbers = np.searchsorted(self._ends, self._indices, side="right")
        edges = np.flatnonzero(np.diff(part_numbers)) + 1
        for run in np.split(np.arange(len(self)), edges):
            number = part_numbers[run[0]]
            part = self._parts[number]
            yield np.asarray(part[:])[self._indices[run] - (self._ends[number] - part.shape[0])]


@dataclass(frozen=True)
class MatrixInputs:
    """The inputs of one kind of output matrix, in every layer: rows [·, L, W] of any float type.

    Layers without the matrix have rows of 0. The rows include the factors that some models apply to the
    matrix's product. `last_token`: inputs at the last prompt token of each sample. `prompt_tokens`,
    `answer_tokens`: inputs at other tokens of prompts and answers, where the gate must stay closed.
    `template_tokens`: inputs at the tokens that the chat template puts before every prompt.
    """

    last_token: Any  # [N, L, W]
    prompt_tokens: Any  # [P, L, W]
    answer_tokens: Any  # [A, L, W]
    template_tokens: Any  # [T, L, W]

    def of(self, samples: npt.NDArray[np.intp]) -> MatrixInputs:
        """Return the same inputs with a selection of the samples. The other tokens stay."""
        return replace(self, last_token=Activations.of(self.last_token).take(samples))

    def share(self, samples: npt.NDArray[np.intp], processes: Processes) -> MatrixInputs:
        """Return a selection of the samples and this process's share of the other tokens."""
        tokens = [
            Activations.of(rows) for rows in (self.prompt_tokens, self.answer_tokens, self.template_tokens)
        ]
        return MatrixInputs(
            Activations.of(self.last_token).take(samples),
            *(rows.take(processes.share(len(rows))) for rows in tokens),
        )


def _rows(part: Any, indices: npt.NDArray[np.intp], layer: int) -> Any:
    """Return rows [n, D] of one part. A shard's slice accepts no index list, so its whole layer is read."""
    if isinstance(part, np.ndarray):
        return part[indices, layer]
    if isinstance(part, Tensor):
        return part.detach()[torch.from_numpy(indices).to(part.device), layer]
    return part[:, layer][indices]


def _dtype(part: Any) -> np.dtype[Any]:
    return part.dtype if isinstance(part.dtype, np.dtype) else np.asarray(part[:0]).dtype


def _float64(rows: Any) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.to(torch.float64, copy=True)
    return torch.from_numpy(np.array(rows, dtype=np.float64, order="C"))
