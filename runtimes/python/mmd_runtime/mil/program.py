"""A saved ``.mlpackage``: its ML Program as plain values (coremltools, mlmodel/format/Model.proto and MIL.proto)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mmd_runtime.mil.blobs import NUMPY, Blobs, tensor
from mmd_runtime.mil.wire import MalformedError, Message

_ML_PROGRAM = 502  # field of Model
_TYPES = {
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 12: "fp64", 21: "int8", 22: "int16", 23: "int32", 24: "int64",
    25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1",
    38: "uint6", 39: "uint3",
}  # fmt: skip
Literal: TypeAlias = Any  # an array, or text


@dataclass(frozen=True)
class Type:
    """What an op declares of a value: ``fp32``, ``int32``, ..., and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """As in a message."""
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True)
class Ref:
    """An argument that is the value of that name."""

    name: str


@dataclass(frozen=True)
class Op:
    """One operation. ``inputs`` are lists where the op takes several values under one name."""

    kind: str
    name: str
    inputs: Mapping[str, tuple[Ref | Literal, ...]]
    outputs: tuple[tuple[str, Type], ...]
    attributes: Mapping[str, Literal]


@dataclass(frozen=True)
class Feature:
    """An input or output of the model: ``fp32``, ``fp16``, ``int32`` arrays, or images, ``rgb`` or ``grayscale``.

    ``shape`` is that of an array, or height and width of an image; an output need not declare it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """The function ``main``. ``version`` is the specification version, which says the oldest system that loads it."""

    version: int
    opset: str
    inputs: Mapping[str, Type]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    features: tuple[Feature, ...]


def read_package(folder: Path) -> Program:
    """Follow the package's own manifest to the model, read it and its weights; raises MalformedError."""
    model = _model_path(folder)
    try:
        data = memoryview(model.read_bytes())
    except OSError as error:
        raise MalformedError(f"{model.name} cannot be read ({error.strerror})") from error
    root = Message(data)
    program, description = root.message(_ML_PROGRAM), root.message(2)
    if program is None or description is None:
        raise MalformedError(f"{model.name} holds no ML Program")
    functions = dict(program.pairs(2))
    if set(functions) != {"main"}:
        raise MalformedError(f"{model.name} has the functions {sorted(functions)}, not main alone")
    function = functions["main"]
    blocks, opset = dict(function.pairs(3)), function.text(2)
    if opset not in blocks:
        raise MalformedError(f"{model.name} has no block for its opset {opset!r}")
    reader = _Reader(model.parent)
    block = blocks[opset]
    return Program(
        root.number(1),
        opset,
        dict(_named_type(each) for each in function.messages(1)),
        block.texts(2),
        tuple(reader.op(each) for each in block.messages(3)),
        tuple(_feature(each) for number in (1, 10) for each in description.messages(number)),
    )


def _model_path(folder: Path) -> Path:
    """The root item of ``Manifest.json``."""
    try:
        manifest = json.loads((folder / "Manifest.json").read_text(encoding="utf-8"))
        path = str(manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"])
    except OSError as error:
        raise MalformedError(f"Manifest.json cannot be read ({error.strerror})") from error
    except (ValueError, LookupError, TypeError) as error:
        raise MalformedError("Manifest.json names no root model") from error
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise MalformedError(f"Manifest.json leads out of the package, to {path!r}")
    return folder / "Data" / path


class _Reader:
    """Operations and values; opens the weights when the first of them is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Blobs] = {}

    def op(self, message: Message) -> Op:
        kind, attributes = message.text(1), {name: self.value(each) for name, each in message.pairs(5)}
        outputs = tuple(_named_type(each) for each in message.messages(3))
        if any(True for _ in message.spans(4)):
            raise MalformedError(f"op {outputs[0][0] if outputs else kind!r} has blocks of its own")
        inputs = {name: tuple(self.binding(each) for each in arg.messages(1)) for name, arg in message.pairs(2)}
        return Op(kind, str(attributes.pop("name", "")), inputs, outputs, attributes)

    def binding(self, message: Message) -> Ref | Literal:
        value = message.message(2)
        return Ref(message.text(1)) if value is None else self.value(value)

    def value(self, message: Message) -> Literal:
        """An immediate value, or one of a blob file."""
        declared = _type(message.message(2))
        if (blob := message.message(5)) is not None:
            name = blob.text(1).removeprefix("@model_path/")
            if name not in self.files:
                if ".." in Path(name).parts or Path(name).is_absolute():
                    raise MalformedError(f"weights lie outside of the package, at {name!r}")
                self.files[name] = Blobs(self.folder / name)
            return self.files[name].read(blob.number(2), declared.dtype, declared.shape)
        immediate = message.message(3)
        found = None if immediate is None else immediate.message(1)
        if found is None:
            raise MalformedError("a constant is neither a tensor nor in a blob file")
        return _immediate(found, declared)


def _immediate(message: Message, declared: Type) -> Literal:
    """TensorValue: one of seven lists."""
    dtype, shape = declared.dtype, declared.shape
    for number in (4, 7):
        if (part := message.message(number)) is None:
            continue
        if number == 4:
            return "".join(part.texts(1)[:1])
        raw = b"".join(part.spans(1))
        return tensor(np.frombuffer(raw, np.uint8), dtype, shape, "a constant")
    floats, doubles = message.message(1), message.message(6)
    if floats is not None:
        values = floats.floats(1, "<f4")
    elif doubles is not None:
        values = doubles.floats(1, "<f8")
    else:
        lists = (message.message(number) for number in (2, 3, 5))
        values = np.array(next((part.integers(1) for part in lists if part is not None), []), np.int64)
    if dtype not in NUMPY:
        raise MalformedError(f"a constant of {dtype} is given as numbers")
    if values.size != math.prod(shape):
        raise MalformedError(f"a constant has {values.size} values, its type is {declared}")
    return values.astype(NUMPY[dtype]).reshape(shape)


def _named_type(message: Message) -> tuple[str, Type]:
    return message.text(1), _type(message.message(2))


def _type(message: Message | None) -> Type:
    """ValueType: only tensors of fixed shape."""
    declared = None if message is None else message.message(1)
    if declared is None:
        raise MalformedError("a value is not a tensor")
    dtype = declared.number(1)
    if dtype not in _TYPES:
        raise MalformedError(f"data type {dtype} is unknown")
    sizes = []
    for dimension in declared.messages(3):
        if (constant := dimension.message(1)) is None:
            raise MalformedError("a dimension is not fixed")
        sizes.append(constant.number(1))
    return Type(_TYPES[dtype], tuple(sizes))


def _feature(message: Message) -> Feature:
    """FeatureDescription: an array or an image."""
    declared = message.message(3) or Message(memoryview(b""))
    image, array = declared.message(4), declared.message(5)
    shape: tuple[int, ...]
    if image is not None:
        kind = {10: "grayscale", 20: "rgb", 30: "bgr"}.get(image.number(3), "image")
        shape = (image.number(2), image.number(1))
    elif array is not None:
        kinds = {65552: "fp16", 65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8"}
        kind = kinds.get(array.number(2), str(array.number(2)))
        shape = tuple(array.integers(1))
    else:
        kind, shape = "unknown", ()
    return Feature(message.text(1), kind, shape)
