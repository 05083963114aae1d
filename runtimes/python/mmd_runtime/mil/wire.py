"""The protobuf wire format, read without a schema: varints, and spans of bytes (protobuf.dev, "Encoding").

A message is the list of values of each field number; what a value means is up to who asks for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_VARINT, _FIXED64, _SPAN, _FIXED32 = 0, 1, 2, 5
Field: TypeAlias = "int | memoryview"


class MalformedError(ValueError):
    """The bytes are no package of the kind that is read here."""


class Message:
    """The fields of one message by number."""

    def __init__(self, data: memoryview) -> None:
        self._fields: dict[int, list[Field]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def spans(self, number: int) -> Iterator[memoryview]:
        """Every value of a field of bytes, text or messages."""
        for value in self._fields.get(number, ()):
            if isinstance(value, int):
                raise MalformedError(f"field {number} is a number, not bytes")
            yield value

    def messages(self, number: int) -> Iterator[Message]:
        """Every message of a field."""
        return (Message(span) for span in self.spans(number))

    def message(self, number: int) -> Message | None:
        """The last message of a field, which is the one that counts, or None."""
        last = None
        for last in self.spans(number):  # noqa: B007 - protobuf: the last one wins
            pass
        return None if last is None else Message(last)

    def number(self, number: int, default: int = 0) -> int:
        """A field of one integer."""
        values = self._fields.get(number, [default])
        if not isinstance(values[-1], int):
            raise MalformedError(f"field {number} is bytes, not a number")
        return values[-1]

    def text(self, number: int) -> str:
        """A field of UTF-8 text, empty if it is absent."""
        return "".join(_decoded(span) for span in list(self.spans(number))[-1:])

    def texts(self, number: int) -> tuple[str, ...]:
        """Every text of a field."""
        return tuple(_decoded(span) for span in self.spans(number))

    def pairs(self, number: int) -> Iterator[tuple[str, Message]]:
        """A ``map<string, message>`` field."""
        for entry in self.messages(number):
            yield entry.text(1), entry.message(2) or Message(memoryview(b""))

    def integers(self, number: int) -> list[int]:
        """A repeated field of integers, packed or not, two's complement."""
        found: list[int] = []
        for value in self._fields.get(number, ()):
            found += [value] if isinstance(value, int) else _packed(value)
        return [_signed(value) for value in found]

    def floats(self, number: int, dtype: str) -> NDArray[np.generic]:
        """A packed repeated field of ``<f4`` or ``<f8``."""
        try:
            parts = [np.frombuffer(span, dtype) for span in self.spans(number)]
        except ValueError as error:
            raise MalformedError(f"field {number} holds no whole number of {dtype} values") from error
        return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _fields(data: memoryview) -> Iterator[tuple[int, Field]]:
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place)
        kind = key & 7
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield key >> 3, value
        elif kind == _SPAN:
            size, place = _varint(data, place)
            if size > end - place:
                raise MalformedError(f"a field of {size} bytes ends behind the end of its message")
            yield key >> 3, data[place : place + size]
            place += size
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            if size > end - place:
                raise MalformedError("a fixed field ends behind the end of its message")
            yield key >> 3, struct.unpack_from("<I" if size == 4 else "<Q", data, place)[0]
            place += size
        else:
            raise MalformedError(f"wire type {kind} is unknown")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """The number at ``place`` and the place behind it; most are one byte."""
    try:
        byte = data[place]
        if byte < 128:
            return byte, place + 1
        value, shift = byte & 127, 7
        while shift < 70:
            place += 1
            byte = data[place]
            value |= (byte & 127) << shift
            if byte < 128:
                return value, place + 1
            shift += 7
    except IndexError:
        raise MalformedError("it ends within a number") from None
    raise MalformedError("a number takes more than ten bytes")


def _packed(span: memoryview) -> list[int]:
    values, place = [], 0
    while place < len(span):
        value, place = _varint(span, place)
        values.append(value)
    return values


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _decoded(span: memoryview) -> str:
    try:
        return str(span, "utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError("a text is not UTF-8") from error
