"""The dtypes of arrays, named once."""

from typing import Any

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]
HashArray = npt.NDArray[np.uint64]
Int16Array = npt.NDArray[np.int16]
Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]
