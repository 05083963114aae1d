"""``weight.bin``: Core ML's blob storage, version 2 (coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp).

A header of 64 bytes (count, version), then for each blob a record of 64 bytes at a multiple of 64 (sentinel, type, size
in bytes, offset of the data, bits of padding), and the data.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_runtime.mil.wire import MalformedError

_SENTINEL = 0xDEADBEEF
_VERSION = 2
# The name of a type in blobs, by its number there (BlobDataType.hpp).
_TYPES = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip
NUMPY = {
    "bool": "?", "fp16": "<f2", "fp32": "<f4", "fp64": "<f8", "int8": "i1", "int16": "<i2", "int32": "<i4",
    "int64": "<i8", "uint8": "u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
}  # fmt: skip
BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}


class Blobs:
    """The file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        try:
            data: Any = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        except OSError as error:
            raise MalformedError(f"{path.name} cannot be read ({error.strerror})") from error
        self.data = data
        if len(self.data) < 64 or struct.unpack_from("<II", self.data)[1] != _VERSION:
            raise MalformedError(f"{path.name} is no blob storage of version {_VERSION}")

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The tensor whose record is at ``offset``; types of less than 8 bits come as bytes."""
        where = f"weight.bin, record {offset}"
        if offset + 64 > len(self.data):
            raise MalformedError(f"{where} lies behind the end of {len(self.data)} bytes")
        sentinel, kind, size, start, _ = struct.unpack_from("<IIQQQ", self.data, offset)
        if sentinel != _SENTINEL:
            raise MalformedError(f"{where} starts with {sentinel:#x}, not {_SENTINEL:#x}")
        if _TYPES.get(kind) != dtype:
            raise MalformedError(f"{where} holds {_TYPES.get(kind, kind)}, the program says {dtype}")
        if start + size > len(self.data):
            raise MalformedError(f"{where}: its {size} bytes end behind the end of {len(self.data)}")
        return tensor(np.asarray(self.data[start : start + size]), dtype, shape, where)


def tensor(data: NDArray[np.uint8], dtype: str, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """Raw little-endian bytes as an array; types of less than 8 bits are packed from the lowest bit on."""
    count = math.prod(shape)
    bits = BITS.get(dtype)
    expected = count * np.dtype(NUMPY[dtype]).itemsize if bits is None else -(-count * bits // 8)
    if len(data) != expected:
        raise MalformedError(f"{where} has {len(data)} bytes, {dtype} {shape} takes {expected}")
    if bits is None:
        return np.ascontiguousarray(data).view(NUMPY[dtype]).reshape(shape)
    return unpacked(data, bits, count, signed=dtype == "int4").reshape(shape)


def unpacked(data: NDArray[np.uint8], bits: int, count: int, *, signed: bool = False) -> NDArray[Any]:
    """``count`` numbers of ``bits`` bits, the lowest bits of a byte first."""
    flat = np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits)
    values: NDArray[Any] = (flat << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if signed:
        values = np.where(values >> (bits - 1), values.astype(np.int16) - 2**bits, values).astype(np.int8)
    return values
