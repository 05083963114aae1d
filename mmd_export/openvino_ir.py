"""OpenVINO IR from our ONNX file: conversion, half weights, and what there is to know of the result. No torch."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from mmd_export.errors import NotAvailableError
from mmd_export.openvino_library import openvino

# Constants of fewer values stay float32: biases, norm scales, the folded time path and the numbers of the plan.
SMALLEST_HALF = 1024
_LARGEST_HALF = float(np.finfo(np.float16).max)
_NOT_NODES = ("Parameter", "Const", "Result")


def convert(path: Path, states: Sequence[str]) -> Any:
    """The ONNX file as an openvino model whose one output is ``sample``; equal files give equal models.

    ``states`` become outputs of the file: so no fusion takes a state's value out of the graph.
    """
    library = openvino()
    _show_states(path, states)
    try:
        with _root_logger_kept():
            model = library.convert_model(str(path))
    except _failures(library) as error:
        reason = ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1].strip(" -")
        raise NotAvailableError(
            f"openvino {version('openvino')} cannot convert the graph: {reason}; use --target onnx"
        ) from error
    for result in model.get_results():
        if "sample" not in result.input_value(0).get_names():
            model.remove_result(result)
    model.validate_nodes_and_infer_types()
    _name_plainly(model)
    return model


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """openvino 2026.4 raises the root logger's level to ERROR and leaves it there if a conversion fails."""
    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers


def _failures(library: Any) -> tuple[type[Exception], ...]:
    """The exceptions of its front ends, which share no base class of their own."""
    kinds = vars(library.frontend).values()
    return RuntimeError, *(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))


def _show_states(path: Path, states: Sequence[str]) -> None:
    import onnx

    model = onnx.load(path, load_external_data=False)
    for name in states:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)


def _name_plainly(model: Any) -> None:
    """Number the nodes that bear a number anyway: openvino counts on over all models of a process."""
    for place, node in enumerate(model.get_ordered_ops()):
        if re.search(r"_\d+$", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{place}")


def halve_weights(model: Any) -> None:
    """Store every float32 weight of ``SMALLEST_HALF`` values or more as float16, widened where it is read.

    The widening is folded when the model is loaded, so arithmetic stays float32. A weight beyond float16's range stays.
    """
    library = openvino()
    ops = library.opset13
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != library.Type.f32:
            continue
        values = node.data
        if values.size < SMALLEST_HALF or not np.abs(values).max() <= _LARGEST_HALF:
            continue
        users = list(node.output(0).get_target_inputs())
        half = ops.constant(values.astype(np.float16), name=f"{node.get_friendly_name()}/half")
        wide = ops.convert(half, "f32", name=f"{node.get_friendly_name()}/wide")
        for user in users:
            user.replace_source_output(wide.output(0))


def save(model: Any, path: Path) -> None:
    """``path`` (.xml) and the weights beside it (.bin), as they are in ``model``."""
    openvino().save_model(model, str(path), compress_to_fp16=False)


def facts(path: Path) -> dict[str, Any]:
    """Nodes, weights and op counts of the file: a weight is a piece of the .bin, counted once."""
    counts: Counter[str] = Counter()
    pieces: set[tuple[int, int]] = set()
    for layer in ET.parse(path).getroot().iter("layer"):
        counts[layer.get("type", "")] += 1
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            pieces.add((int(data.get("offset", 0)), int(data.get("size", 0))))
    nodes = {name: count for name, count in sorted(counts.items()) if name not in _NOT_NODES}
    return {
        "nodes": sum(nodes.values()),
        "unique_weight_bytes": sum(size for _, size in pieces),
        "op_counts": nodes,
    }
