"""Facts about families of networks: which blocks can be steered, what writes to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rs_gguf.errors import InputError

MAX_LAYERS = 512
"""llama.cpp's LLAMA_MAX_LAYERS (src/llama-hparams.h): no model it loads has a block number this high."""
FIRST_STEERABLE = 1
"""llama.cpp keeps no slot for block 0: `direction.0` is no tensor that it reads."""
# Matrices whose product is added to the residual stream, and the graph's names for what they multiply: the
# last step first, since llama.cpp's build_ffn names them one after another. BitNet has norms before both.
WRITERS: Mapping[str, Sequence[str]] = {
    "attn_output": ("attn_sub_norm", "kqv_out"),
    "ffn_down": (
        "ffn_sub_norm",
        "ffn_gate_par",
        "ffn_swiglu_limited",
        "ffn_swiglu",
        "ffn_geglu",
        "ffn_reglu",
        "ffn_act",
        "ffn_gelu",
        "ffn_silu",
        "ffn_sqr(relu)",
        "ffn_relu",
    ),
}


def checked_directions(directions: Mapping[int, Any]) -> dict[int, npt.NDArray[np.float32]]:
    """Return directions as read-only float32 rows [D], by ascending block.

    Raises:
        InputError: none, a block that cannot be steered, or rows that are not finite and of one width.
    """
    if not directions:
        raise InputError(
            "The vector has no direction; give at least one block, as {layer: array of width D}."
        )
    checked: dict[int, npt.NDArray[np.float32]] = {}
    for layer, given in directions.items():
        if (
            isinstance(layer, bool)
            or not isinstance(layer, int | np.integer)
            or not FIRST_STEERABLE <= layer < MAX_LAYERS
        ):
            raise InputError(
                f"Block {layer!r} cannot be steered: block numbers are integers from 1 to {MAX_LAYERS - 1} "
                "(block 0 is out of llama.cpp's reach). Leave it out."
            )
        try:
            with np.errstate(over="ignore"):
                row = np.array(given, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"The direction of block {layer} is no array of numbers ({error}).") from None
        if row.ndim != 1 or row.size == 0:
            raise InputError(
                f"The direction of block {layer} has shape {row.shape}; one of shape [D] is needed."
            )
        if not np.isfinite(row).all():
            raise InputError(
                f"The direction of block {layer} has {int((~np.isfinite(row)).sum())} values that are NaN, "
                "Inf or beyond float32; they would reach every logit. Fit it again or leave the block out."
            )
        row.flags.writeable = False
        checked[int(layer)] = row
    widths = {len(row) for row in checked.values()}
    if len(widths) != 1:
        raise InputError(f"The directions have widths {sorted(widths)}; all must have the model's width.")
    return dict(sorted(checked.items()))


def writer_inputs(names: Sequence[str], layer: int) -> dict[str, str]:
    """Which tensor of the graph each writing matrix multiplies, from the names of the graph's tensors.

    Matrices that this architecture does not have, or has one for each expert, are left out. `InputError` when
    none is left.
    """
    present = {name.removesuffix(f"-{layer}") for name in names if name.endswith(f"-{layer}")}
    if any(name.startswith("ffn_moe_") for name in present):
        present &= set(WRITERS["attn_output"])  # the other names are those of a shared expert
    found = {
        writer: next(tensor for tensor in tensors if tensor in present)
        for writer, tensors in WRITERS.items()
        if present & set(tensors)
    }
    if not found:
        raise InputError(
            "no matrix of this architecture can hold a gate: its graph names none of "
            + ", ".join(tensor for tensors in WRITERS.values() for tensor in tensors)
            + ". Use a control vector."
        )
    return found
