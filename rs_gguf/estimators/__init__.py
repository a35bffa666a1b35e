"""The directions of refusal: one unit vector a layer (docs/estimators.md)."""

from rs_gguf.estimators.constrained import ContrastRidge, ResidualRidge, SafeRidge, SensitiveRidge
from rs_gguf.estimators.estimator import (
    MeanDifference,
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
    WeightedMeanDifference,
    WeightedRidgeMeanDifference,
    fit_paths,
)

__all__ = [
    "ContrastRidge",
    "MeanDifference",
    "ResidualRidge",
    "RidgeMeanDifference",
    "SafeRidge",
    "SensitiveRidge",
    "UncentredWeightedRidgeMeanDifference",
    "WeightedMeanDifference",
    "WeightedRidgeMeanDifference",
    "fit_paths",
]
