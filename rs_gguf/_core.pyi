from typing import Any

import numpy as np
import numpy.typing as npt

__version__: str

def project(
    activations: npt.NDArray[Any],
    directions: npt.ArrayLike,
    offset: npt.ArrayLike | None = None,
    *,
    threads: int,
) -> npt.NDArray[np.float32]: ...
def statistics(
    activations: npt.NDArray[Any],
    directions: npt.ArrayLike,
    confidence: npt.ArrayLike,
    weights: npt.ArrayLike,
    offset: npt.ArrayLike | None = None,
    *,
    neutral: float,
    quantile: float,
    threads: int,
) -> dict[str, npt.NDArray[np.float64]]: ...
def kernels() -> list[str]: ...
def kernel() -> str: ...
