"""The package as files: the model without what the machine left in it, the same bytes for the same model."""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmd_export.liveness import Operation, peak_bytes

_MODEL = "com.apple.CoreML/model.mlmodel"
_WEIGHTS = "com.apple.CoreML/weights"
# Identifiers of items must be UUIDs, and one package has two items: any two will do, so they are derived from names.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "mmd-export.coreml")


def write_package(model: Any, folder: Path, facts: Mapping[str, str]) -> dict[str, Any]:
    """Write the MLModel ``model`` as ``folder``; ``facts`` go into its metadata. Returns GraphInfo's fields.

    A package is Manifest.json, which names the model and the folder of weights, and these two; conversion adds the
    date, a table of debugging handles and the source of each op, which are left out.
    """
    spec = model.get_spec()
    spec.description.metadata.userDefined.clear()
    for name, value in sorted(facts.items()):
        spec.description.metadata.userDefined[name] = value
    spec.mlProgram.attributes.clear()
    for function in spec.mlProgram.functions.values():
        function.attributes.clear()
    data = folder / "Data"
    weights = data / _WEIGHTS / "weight.bin"
    weights.parent.mkdir(parents=True)
    (data / _MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    if (source := Path(model.weights_dir) / "weight.bin").is_file():
        shutil.copyfile(source, weights)
    entries = {
        _identifier(path): {"author": "com.apple.CoreML", "description": text, "name": Path(path).name, "path": path}
        for path, text in ((_MODEL, "CoreML Model Specification"), (_WEIGHTS, "CoreML Model Weights"))
    }
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": _identifier(_MODEL)}
    text = json.dumps(manifest, indent=4, sort_keys=True) + "\n"
    (folder / "Manifest.json").write_text(text, encoding="utf-8", newline="\n")
    return _graph_facts(spec, weights.stat().st_size if weights.exists() else 0)


def _identifier(path: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, path)).upper()


def _graph_facts(spec: Any, weight_bytes: int) -> dict[str, Any]:
    """Ops that compute something; the bytes of all weights, each stored once; those of activations at their peak."""
    counts = Counter(op.type for op in _operations(spec) if op.type != "const")
    return {
        "nodes": counts.total(),
        "unique_weight_bytes": weight_bytes,
        "op_counts": dict(sorted(counts.items())),
        "peak_activation_bytes": max(_peaks(spec)),
    }


def _operations(spec: Any) -> Iterator[Any]:
    for _, block in _blocks(spec):
        yield from block.operations


def _blocks(spec: Any) -> Iterator[tuple[Any, Any]]:
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield function, block


def _peaks(spec: Any) -> Iterator[int]:
    """The most bytes alive at once, by shapes alone; constants, also those that are decompressed, are weights."""
    for function, block in _blocks(spec):
        operations = [
            Operation(
                reads={argument.name for read in op.inputs.values() for argument in read.arguments if argument.name},
                makes={} if op.type.startswith("const") else {value.name: _bytes(value) for value in op.outputs},
            )
            for op in block.operations
        ]
        yield peak_bytes({value.name: _bytes(value) for value in function.inputs}, operations, set(block.outputs))


def _bytes(value: Any) -> int:
    """Of a tensor of fixed shape."""
    tensor = value.type.tensorType
    kind = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[tensor.dataType].name
    bits = re.search("[0-9]+", kind)  # FLOAT16, INT32, UINT8; BOOL has none
    values: int = math.prod(size.constant.size for size in tensor.dimensions)
    return values * (int(bits[0]) if bits else 8) // 8
