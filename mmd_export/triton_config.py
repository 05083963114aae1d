"""``config.pbtxt`` and the warm-up files of a Triton Inference Server model repository, from a bundle. No torch.

The text is written by hand, so that no package of the server is needed; a test parses it strictly against the server's
own protobuf schema, ``inference.ModelConfig``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmd_export.bundle import Bundle, Manifest, TensorSpec
from mmd_export.errors import NotAvailableError

CONFIG_NAME = "config.pbtxt"
WARMUP_FOLDER = "warmup"  # the server looks for the files of model_warmup there
QUEUE_DELAY_MICROSECONDS = 2000
LONGEST_QUEUE = 256  # requests; the next one is refused at once

_BACKENDS = {"onnx": ("onnxruntime", "KIND_AUTO"), "tensorrt": ("tensorrt", "KIND_GPU")}
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "uint8": "TYPE_UINT8"}
_LITTLE_ENDIAN = {"float32": "<f4", "int64": "<i8", "uint8": "u1"}


@dataclass(frozen=True)
class Batching:
    """What the server may do with the batch of a graph.

    ``limit``: ``max_batch_size``; 0 where the server does not know of a batch, so that requests bring whole shapes.
    ``dynamic``: whether it may put requests together. ``reason``: for people.
    """

    limit: int
    dynamic: bool
    reason: str


def batching_of(manifest: Manifest) -> Batching:
    """The server stacks images along axis 0 alone, and into any size up to its limit."""
    batch = manifest.batch
    if batch.is_static:
        return Batching(0, False, f"The graph takes {batch} images a run, so requests run one by one.")
    if any(spec.batch_axis for spec in manifest.inputs):
        return Batching(0, False, "The images of step_noise lie on axis 1, where the server cannot stack requests.")
    if not all(batch.allows(n) for n in range(batch.smallest, batch.largest + 1)):
        reason = (
            f"The graph takes {batch} images a run, and the server would make sizes between them: no dynamic batches."
        )
        return Batching(batch.largest, False, reason)
    return Batching(batch.largest, True, f"The graph takes {batch} images a run; requests run together.")


def model_name(manifest: Manifest) -> str:
    """The bundle's name as the name of a folder and of a URL."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", manifest.name).strip(".-") or "sampler"


def warmup_sizes(manifest: Manifest) -> tuple[int, ...]:
    """The batches to run before the server says that it is ready: all of a list, the ends of a range."""
    batch = manifest.batch
    return batch.sizes if batch.sizes is not None else tuple(sorted({batch.smallest, batch.largest}))


def config_text(manifest: Manifest) -> str:
    """``config.pbtxt``; NotAvailableError for a format that none of the server's backends here runs."""
    if manifest.format not in _BACKENDS:
        known = " or ".join(_BACKENDS)
        raise NotAvailableError(
            f"bundle {manifest.name} holds format {manifest.format}, the Triton backends here run {known}; "
            "build for a target of such a format"
        )
    backend, kind = _BACKENDS[manifest.format]
    batching = batching_of(manifest)
    parts = [
        f"# Bundle {manifest.name}, for Triton Inference Server.",
        f"name: {_text(model_name(manifest))}",
        f"backend: {_text(backend)}",
        f"default_model_filename: {_text(manifest.artefact)}",
        f"# {batching.reason}",
        f"max_batch_size: {batching.limit}",
        *(_tensor("input", spec, batching) for spec in manifest.inputs),
        *(_tensor("output", spec, batching) for spec in manifest.outputs),
        _instances(manifest, kind),
        *(_dynamic_batching() if batching.dynamic else ()),
        *(_warmup(manifest, size, batching) for size in warmup_sizes(manifest)),
    ]
    return "\n".join(parts) + "\n"


def warmup_files(bundle: Bundle) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that ``model_warmup`` names: golden inputs, C order, little-endian.

    Where the server batches, it stacks as many copies of one image as a sample asks for; else a file holds a batch.
    """
    manifest, golden = bundle.manifest, bundle.golden()
    batching = batching_of(manifest)
    for size in (1,) if batching.limit else warmup_sizes(manifest):
        rows = np.arange(size) % golden.count
        for spec in manifest.inputs:
            array = np.take(golden.inputs[spec.name], rows, axis=spec.batch_axis)
            yield _warmup_name(spec, size), np.ascontiguousarray(array, _LITTLE_ENDIAN[spec.dtype]).tobytes()


def write_model(bundle: Bundle, folder: Path) -> None:
    """``config.pbtxt`` and ``warmup/`` into the folder of a model."""
    (folder / WARMUP_FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(config_text(bundle.manifest), encoding="utf-8", newline="\n")
    for name, content in warmup_files(bundle):
        (folder / WARMUP_FOLDER / name).write_bytes(content)


def _text(value: str) -> str:
    """A quoted string of protobuf's text format."""
    return json.dumps(value, ensure_ascii=False)


def _dims(spec: TensorSpec, batching: Batching) -> list[int]:
    """The shape that a request has: without the batch where the server knows of it, and never empty."""
    if batching.limit:
        return [int(size) for size in spec.shape[1:]] or [1]
    return [-1 if size == "batch" else size for size in spec.shape]


def _tensor(way: str, spec: TensorSpec, batching: Batching) -> str:
    """An ``input`` or ``output``. A tensor of rank 1 is (B, 1) in requests, and (B,) for the graph."""
    flat = batching.limit and len(spec.shape) == 1
    lines = [
        f"{way} {{",
        f"  name: {_text(spec.name)}",
        f"  data_type: {_TYPES[spec.dtype]}",
        f"  dims: {_dims(spec, batching)}",
        *(["  reshape { shape: [] }"] if flat else []),
        "}",
    ]
    return "\n".join(lines)


def _instances(manifest: Manifest, kind: str) -> str:
    """One instance; a TensorRT engine for a list of batches has an optimisation profile for each."""
    sizes = manifest.batch.sizes or ()
    profiles = [str(place) for place in range(len(sizes))] if manifest.format == "tensorrt" and len(sizes) > 1 else []
    lines = [
        "instance_group {",
        "  count: 1  # more of them run at the same time, with the weights in memory as often",
        f"  kind: {kind}",
        *(f"  profile: {_text(profile)}" for profile in profiles),
        "}",
    ]
    return "\n".join(lines)


def _dynamic_batching() -> list[str]:
    return [
        "dynamic_batching {",
        f"  max_queue_delay_microseconds: {QUEUE_DELAY_MICROSECONDS}",
        f"  default_queue_policy {{ max_queue_size: {LONGEST_QUEUE} }}",
        "}",
    ]


def _warmup(manifest: Manifest, size: int, batching: Batching) -> str:
    """A run of golden noise with ``size`` images."""
    lines = ["model_warmup {", f"  name: {_text(f'golden noise, {size} images')}"]
    lines.append(f"  batch_size: {size if batching.limit else 1}")
    for spec in manifest.inputs:
        dims = [size if value == -1 else value for value in _dims(spec, batching)]
        name = _warmup_name(spec, 1 if batching.limit else size)
        lines += [
            "  inputs {",
            f"    key: {_text(spec.name)}",
            f"    value {{ data_type: {_TYPES[spec.dtype]} dims: {dims} input_data_file: {_text(name)} }}",
            "  }",
        ]
    return "\n".join([*lines, "}"])


def _warmup_name(spec: TensorSpec, size: int) -> str:
    return f"{spec.name}-{size}.bin"


def tensor_shapes(manifest: Manifest) -> Mapping[str, tuple[int, ...]]:
    """The shape of every input and output in a request, -1 for the number of images."""
    batching = batching_of(manifest)
    front = (-1,) if batching.limit else ()
    return {spec.name: (*front, *_dims(spec, batching)) for spec in (*manifest.inputs, *manifest.outputs)}
