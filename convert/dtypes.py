"""Dtypes as files spell them, and casts that give the bits torch gives.

bfloat16 has no numpy dtype: it travels as its uint16 bits under the name ``bfloat16``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .errors import BadInput


@dataclass(frozen=True)
class Dtype:
    """``name`` as torch prints it, ``code`` in a safetensors header, ``storage`` in memory.

    ``exponent`` masks the exponent bits of a floating dtype: all set means inf or NaN. 0 for integers.
    """

    name: str
    code: str
    storage: np.dtype
    exponent: int = 0

    @property
    def size(self) -> int:
        return self.storage.itemsize

    @property
    def floating(self) -> bool:
        return self.exponent != 0

    @property
    def bits(self) -> np.dtype:
        """The unsigned integer dtype of the same width."""
        return np.dtype(f"<u{self.size}")


_ALL = [
    Dtype("float64", "F64", np.dtype("<f8"), 0x7FF0000000000000),
    Dtype("float32", "F32", np.dtype("<f4"), 0x7F800000),
    Dtype("float16", "F16", np.dtype("<f2"), 0x7C00),
    Dtype("bfloat16", "BF16", np.dtype("<u2"), 0x7F80),
    Dtype("int64", "I64", np.dtype("<i8")),
    Dtype("int32", "I32", np.dtype("<i4")),
    Dtype("int16", "I16", np.dtype("<i2")),
    Dtype("int8", "I8", np.dtype("i1")),
    Dtype("uint8", "U8", np.dtype("u1")),
    Dtype("bool", "BOOL", np.dtype("?")),
]
BY_NAME = {dtype.name: dtype for dtype in _ALL}
BY_CODE = {dtype.code: dtype for dtype in _ALL}


def by_code(code: str, tensor: str) -> Dtype:
    """The dtype that a safetensors header calls ``code``; raises :class:`BadInput` when unknown."""
    if not isinstance(code, str) or code not in BY_CODE:
        raise BadInput(f"{tensor} has dtype {code!r}, which is not one of {', '.join(BY_CODE)}.")
    return BY_CODE[code]


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values of ``array`` as float32; bfloat16 arrives as uint16 bits. Exact for 16-bit floats."""
    return cast(array, BY_NAME[dtype], BY_NAME["float32"])


def cast(array: np.ndarray, source: Dtype, target: Dtype) -> np.ndarray:
    """``array`` of dtype ``source`` as ``target``, round to nearest even as torch does; a NaN stays some NaN."""
    if source == target:
        return array
    if (source.name, target.name) == ("float16", "float32"):
        return np.take(_every_float16(), array.view(np.uint16))
    if source.name == "bfloat16":
        array, source = _widen_bfloat16(array), BY_NAME["float32"]
    with np.errstate(over="ignore"):
        if target.size == 2:  # torch goes from float64 by way of float32, and so rounds twice
            array = array.astype(np.float32, copy=False)
        if target.name == "bfloat16":
            return _round_to_bfloat16(array)
        return array.astype(target.storage, copy=False)


@cache
def _every_float16() -> np.ndarray:
    """The float32 of every bit pattern: looking up is faster than numpy's own cast."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to nearest even on the bit pattern; a NaN becomes the quiet NaN 0x7FC0, as in c10::BFloat16."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def has_nonfinite(array: np.ndarray, dtype: Dtype) -> bool:
    """Whether any element is inf or NaN, seen from the exponent bits alone.

    As signed integers these are the largest of the positive, as unsigned ones the largest of the negative numbers:
    two maxima find them, and no temporary array is made.
    """
    if not dtype.floating or array.size == 0:
        return False
    sign = 1 << (8 * dtype.size - 1)
    return (int(np.max(array.view(f"<i{dtype.size}"))) >= dtype.exponent
            or int(np.max(array.view(dtype.bits))) >= sign | dtype.exponent)
