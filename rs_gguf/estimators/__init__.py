"""Refusal directions: one unit vector per layer, fitted in PyTorch (docs/estimators.md)."""

from rs_gguf.estimators.constrained import ContrastRidge, ResidualRidge, SafeRidge, SensitiveRidge
from rs_gguf.estimators.estimator import (
    DirectionEstimator,
    MeanDifference,
    RidgeMeanDifference,
    UncentredWeightedRidgeMeanDifference,
    WeightedMeanDifference,
    WeightedRidgeMeanDifference,
    fit_paths,
)

ESTIMATORS: dict[str, type[DirectionEstimator]] = {
    estimator.name: estimator
    for estimator in (
        MeanDifference,
        WeightedMeanDifference,
        RidgeMeanDifference,
        WeightedRidgeMeanDifference,
        UncentredWeightedRidgeMeanDifference,
        SensitiveRidge,
        ContrastRidge,
        SafeRidge,
        ResidualRidge,
    )
}
"""Every estimator, by its name in recipes."""

__all__ = [
    "ESTIMATORS",
    "ContrastRidge",
    "DirectionEstimator",
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
