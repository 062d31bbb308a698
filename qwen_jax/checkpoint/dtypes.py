"""Dtypes that stored weights may have, and conversions between them that lose nothing unseen."""

import ml_dtypes
import numpy as np

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
# Bit pattern of the positive infinity of each dtype, which is above that of every finite number.
_INFINITY_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def check_name(dtype: str) -> None:
    """Raises `ValueError` if `dtype` is not one that weights may have."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")


def check_finite(array: np.ndarray, name: str) -> None:
    """Raises `ValueError` naming the tensor if it has NaN or infinite values.

    The bits are read as integers: every non-finite value is at or above the infinity of its sign.
    """
    if not array.size:
        return
    infinity = _INFINITY_BITS[array.dtype.name]
    bits = 8 * array.itemsize
    positive = array.view(f"i{array.itemsize}").max() >= infinity
    negative = array.view(f"u{array.itemsize}").max() >= infinity + (1 << (bits - 1))
    if positive or negative:
        finite = np.isfinite(array.astype(np.float32))
        raise ValueError(f"{name} has {int((~finite).sum())} values that are NaN or infinite")


def convert(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The tensor `name` rounded to `dtype`. Raises `ValueError` where a value is too large."""
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    try:
        check_finite(converted, name)
    except ValueError as error:
        raise ValueError(f"{error} as {dtype.name}; convert to bfloat16 or float32") from None
    return converted
