"""Layer scores, as public names. The code is in `rs_gguf.activations.scores`."""

from rs_gguf.activations.scores import (
    band_profile,
    calibration_scales,
    layer_auroc,
    layer_scores,
    scales_of,
    scores_of,
)

__all__ = [
    "band_profile",
    "calibration_scales",
    "layer_auroc",
    "layer_scores",
    "scales_of",
    "scores_of",
]
