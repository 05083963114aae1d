"""The values of a network's conditions: ``--condition name=FILE``, a ``.npy`` or ``.safetensors``."""

from __future__ import annotations

import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError

from mmd_export.conditions import Condition, outside
from mmd_export.errors import UsageError, one_line

_KINDS = {"float32": "f", "int64": "iub"}


def read_conditions(
    given: Sequence[str], wanted: Sequence[Condition], count: int, where: str
) -> dict[str, NDArray[Any]]:
    """An array (count, *shape) for each of ``wanted``; a file holds one value for all images, or one for each.

    Raises UsageError for a name that the network does not know, a missing one, a file that cannot be read, or an array
    of another shape or kind.
    """
    files = _files(given, [each.name for each in wanted], where)
    told = {}
    for each in wanted:
        if each.name not in files:
            shape = "x".join(map(str, each.shape)) or "one number"
            raise UsageError(
                f"{where}: condition {each.name!r} is missing; pass --condition {each.name}=FILE.npy ({each.dtype}, "
                f"{shape} for each image)"
            )
        told[each.name] = _fitted(_read(files[each.name], each.name), each, count, files[each.name])
    return told


def with_examples(conditions: Sequence[Condition], given: Sequence[str], where: str) -> tuple[Condition, ...]:
    """``conditions``, those that are ``given`` with the values of their files as examples: one, or any number of them.

    Raises UsageError as ``read_conditions`` does, but for those that are missing.
    """
    files = _files(given, [each.name for each in conditions], where)
    return tuple(
        replace(each, values=_fitted(_read(files[each.name], each.name), each, None, files[each.name]))
        if each.name in files
        else each
        for each in conditions
    )


def _files(given: Sequence[str], known: Sequence[str], where: str) -> Mapping[str, Path]:
    files: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UsageError(f"--condition is {text!r}; name=FILE.npy or name=FILE.safetensors is expected")
        if name not in known:
            raise UsageError(f"{where}: condition {name!r} is unknown; known: {', '.join(known) or 'none'}")
        if name in files:
            raise UsageError(f"--condition {name} is given twice: {files[name]} and {path}; choose one")
        files[name] = Path(path)
    return files


def _read(path: Path, name: str) -> NDArray[Any]:
    """The array of a .npy, or of a .safetensors the one of that name or the only one."""
    try:
        if path.suffix != ".safetensors":
            return _of_npy(path)
        tensors = safetensors.numpy.load(path.read_bytes())
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UsageError(
            f"--condition {name}={path} cannot be read: {one_line(error)}; write it with numpy.save"
        ) from error
    if name not in tensors and len(tensors) != 1:
        raise UsageError(f"--condition {name}={path} holds {', '.join(sorted(tensors))}; {name!r} is expected")
    return tensors[name] if name in tensors else next(iter(tensors.values()))


def _of_npy(path: Path) -> NDArray[Any]:
    """ValueError for what is none; numpy's own texts advise to unpickle it."""
    with path.open("rb") as file:
        if file.read(len(npy.MAGIC_PREFIX)) != npy.MAGIC_PREFIX:
            raise ValueError("it is no .npy")
        file.seek(0)
        try:
            array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
        except (ValueError, OverflowError, tokenize.TokenError) as error:
            told = one_line(error)
            raise ValueError("it holds no plain numbers" if "pickle" in told else told) from error
        return array


def _fitted(array: NDArray[Any], wanted: Condition, count: int | None, path: Path) -> NDArray[Any]:
    """``array`` in the dtype of the graph, once for each image; without a ``count`` as many as there are."""
    where = f"--condition {wanted.name}={path}"
    if array.dtype.kind not in _KINDS[wanted.dtype]:
        raise UsageError(f"{where} holds {array.dtype}, {wanted.dtype} is expected")
    several = len(array) if array.ndim == len(wanted.shape) + 1 else 1
    one, all_ = wanted.shape, (several if count is None else count, *wanted.shape)
    if array.shape not in (one, (1, *one), all_) or not several:
        told = f"({', '.join(map(str, ('N', *one)))})" if count is None else all_
        raise UsageError(f"{where} is {array.shape}; {one} for all images or {told} for each is expected")
    if not np.isfinite(array).all():
        raise UsageError(f"{where} holds NaN or infinity")
    if found := outside(array, wanted.below):
        raise UsageError("{} holds {}; {} are expected".format(where, *found))
    return np.array(np.broadcast_to(array, all_), dtype=wanted.dtype, order="C")
