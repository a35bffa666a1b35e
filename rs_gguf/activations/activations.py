"""Activations: the one type that a fit takes, whatever holds the numbers.

Arrays, memory maps, tensors or shards on disk go in; float64 tensors of one layer come out, on the device of
the fit. Nothing is read before it is asked for.
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
"""Samples that are converted at once: few beside a layer, enough for a matrix product at full speed."""


class Activations:
    """Rows [N, L, D] of any float type, in one part or several, one after another.

    Args:
        parts: arrays, memory maps, tensors or slices of a shard, each [n, L, D].
        chosen: the samples that count, as indices into all parts; None for all.
        name: what the rows are, for messages.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        chosen: npt.NDArray[np.intp] | None = None,
        *,
        name: str = "activations",
    ) -> None:
        self._parts, self.name = parts, name
        self._ends = np.cumsum([part.shape[0] for part in parts])
        self._whole = chosen is None
        self._chosen = np.arange(self._ends[-1]) if chosen is None else chosen
        self.shape: tuple[int, int, int] = (len(self._chosen), *parts[0].shape[1:])

    @classmethod
    def of(cls, source: Any, *, name: str = "activations") -> Activations:
        """Return `source` if it is `Activations`, or wrap one array or tensor [N, L, D].

        Raises:
            InputError: not a non-empty array of three axes.
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
        """Choose samples by a slice, a mask or indices, and read nothing."""
        return Activations(self._parts, self._chosen[samples], name=self.name)

    def block(self, layer: int, samples: Samples = slice(None), device: torch.device | str = "cpu") -> Tensor:
        """Read some samples of one layer as float64 [n, D] on `device`; the caller may write to it.

        Raises:
            InputError: NaN or Inf, with the layer and the sample.
        """
        rows = self._read(layer, self._chosen[samples], device)
        # The extremes pass on NaN, and take no copy of the rows as a mask would.
        extremes = torch.stack(rows.aminmax(dim=1))
        bad = torch.nonzero(~torch.isfinite(extremes).all(dim=0))
        if len(bad):
            sample = np.arange(len(self))[samples][int(bad[0])]
            raise InputError(
                f"{self.name} of layer {layer} hold NaN or Inf in {len(bad)} of the samples read, first in "
                f"sample {sample}. Leave such samples out, or use another build of the model: this one "
                "overflows there."
            )
        return rows

    def chunks(
        self, layer: int, members: npt.NDArray[Any], device: torch.device | str = "cpu"
    ) -> Iterator[tuple[npt.NDArray[Any], Tensor]]:
        """Yield (indices [n], rows [n, D]) of the samples `members` of one layer, as `block` reads them."""
        for start in range(0, len(members), CHUNK_SAMPLES):
            part = members[start : start + CHUNK_SAMPLES]
            yield part, self.block(layer, part, device)

    def _read(self, layer: int, wanted: npt.NDArray[np.intp], device: torch.device | str) -> Tensor:
        holders = np.searchsorted(self._ends, wanted, side="right")
        pieces, places = [], []
        for holder in np.unique(holders):
            part, here = self._parts[holder], np.flatnonzero(holders == holder)
            indices = wanted[here] - (self._ends[holder] - part.shape[0])
            pieces.append(_float64(_rows(part, indices, layer)).to(device))
            places.append(here)
        if len(pieces) == 1:
            return pieces[0]
        rows = torch.empty((len(wanted), self.shape[2]), dtype=torch.float64, device=device)
        for piece, here in zip(pieces, places, strict=True):
            rows[torch.from_numpy(here).to(device)] = piece
        return rows

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that holds every part without a loss."""
        return np.result_type(*(_dtype(part) for part in self._parts))

    def array(self, folder: Path) -> npt.NDArray[Any]:
        """Return all rows as one array [N, L, D], as the projection kernel takes them.

        One array is returned as it is. Several become a memory map of a nameless file in `folder`.

        Raises:
            InputError: the disk is full, or `folder` cannot be written.
        """
        if len(self._parts) == 1 and isinstance(self._parts[0], np.ndarray) and self._whole:
            return self._parts[0]
        if not len(self):
            return np.empty(self.shape, self.dtype)  # an empty file cannot be mapped
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                for piece in self._pieces():
                    # Not through the map: a full disk would end the process instead of raising an error.
                    file.write(piece.astype(self.dtype, copy=False).tobytes())
                file.flush()
                return np.memmap(file, self.dtype, "r", shape=self.shape)
        except OSError as error:
            raise InputError(
                f"cannot write to {folder}: {error.strerror or error}. Free space and start again."
            ) from error

    def _pieces(self) -> Iterator[npt.NDArray[Any]]:
        """Yield runs of the chosen samples [n, L, D], in order, each of one part."""
        holders = np.searchsorted(self._ends, self._chosen, side="right")
        edges = np.flatnonzero(np.diff(holders)) + 1
        for run in np.split(np.arange(len(self)), edges):
            holder = holders[run[0]]
            part = self._parts[holder]
            yield np.asarray(part[:])[self._chosen[run] - (self._ends[holder] - part.shape[0])]


@dataclass(frozen=True)
class MatrixInputs:
    """What one kind of matrix multiplies, in every block: rows [·, L, W] of any float type.

    Times the factor, if any, that the model multiplies the product with before it adds it to the residual.
    `last_token`: at the last prompt token of each sample; `prompt_tokens`, `answer_tokens`: at other tokens of prompts and of
    answers where a gate must stay shut; `template_tokens`: at those that the chat template puts before every prompt.
    """

    last_token: Any  # [N, L, W]
    prompt_tokens: Any  # [P, L, W]
    answer_tokens: Any  # [A, L, W]
    template_tokens: Any  # [T, L, W]

    def of(self, samples: npt.NDArray[np.intp]) -> MatrixInputs:
        """Return the same with some of the samples; other tokens stay."""
        return replace(self, last_token=Activations.of(self.last_token).take(samples))

    def share(self, samples: npt.NDArray[np.intp], processes: Processes) -> MatrixInputs:
        """Return some of the samples and this process's share of the other tokens."""
        tokens = [
            Activations.of(rows) for rows in (self.prompt_tokens, self.answer_tokens, self.template_tokens)
        ]
        return MatrixInputs(
            Activations.of(self.last_token).take(samples),
            *(rows.take(processes.share(len(rows))) for rows in tokens),
        )


def _rows(part: Any, indices: npt.NDArray[np.intp], layer: int) -> Any:
    """Rows [n, D] of one part. A slice of a shard takes no list of samples, so its layer is read whole."""
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
