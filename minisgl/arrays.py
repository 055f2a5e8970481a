"""Names for numpy arrays of one element type, of any shape, in annotations."""

from __future__ import annotations

from typing import Any

import numpy as np

# Spelled out: the messages are checked against these types, and NDArray has other forms at run time in other versions of numpy.
I32 = np.ndarray[Any, np.dtype[np.int32]]
I64 = np.ndarray[Any, np.dtype[np.int64]]
U8 = np.ndarray[Any, np.dtype[np.uint8]]
U32 = np.ndarray[Any, np.dtype[np.uint32]]
F32 = np.ndarray[Any, np.dtype[np.float32]]
F64 = np.ndarray[Any, np.dtype[np.float64]]
