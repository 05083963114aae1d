"""onnxruntime's own float16 converter on the digits graph, beside ``--precision fp16`` -> results/autocast.json.

What each writes: its size and casts, whether onnx.checker takes it in full and onnxruntime runs it, and the largest
error of 64 samples against the float32 graph. A minute on one core.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.common import RESULTS, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.errors import one_line
from mmd_export.noise import sampler_noise
from mmd_runtime.onnx_providers import failures

STEPS, IMAGES = 5, 64
BLOCKED: tuple[list[str] | None, ...] = (None, ["Resize", "InstanceNormalization", "Softmax"])  # None: its default


def main() -> None:
    from onnxruntime.transformers import float16

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain = onnx.load(built("fp32", Path(folder) / "fp32"))
        exact = samples(plain)
        assert not isinstance(exact, str), exact
        for blocked in BLOCKED:
            made = float16.convert_float_to_float16(onnx.load(Path(folder) / "fp32/model.onnx"), op_block_list=blocked)
            name = "default" if blocked is None else f"blocked: {', '.join(blocked)}"
            rows.append({"tool": f"onnxruntime.transformers.float16, {name}", **facts(made, exact)})
        ours = onnx.load(built("fp16", Path(folder) / "fp16"))
        rows.append({"tool": "--precision fp16", **facts(ours, exact)})
    for row in rows:
        print(row, flush=True)
    values = {"model": "digits", "steps": STEPS, "images": IMAGES, "rows": rows}
    write_result(RESULTS / "autocast.json", "benchmarks/autocast.py", values)


def built(precision: str, out: Path) -> Path:
    """The artefact of a bundle for any batch."""
    batch = f"1..{IMAGES}"
    return build(BuildOptions("digits", "onnx", out, precision, batch, steps=STEPS, verify=False)).artefact_path


def facts(model: onnx.ModelProto, exact: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Of one graph."""
    try:
        onnx.checker.check_model(model, full_check=True)
        refused = None
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        refused = one_line(error)
    found = samples(model)
    return {
        "bytes": len(model.SerializeToString()),
        "casts": Counter(node.op_type for node in model.graph.node)["Cast"],
        "checker": refused,
        "largest_error": None if isinstance(found, str) else float(f"{np.abs(found - exact).max():.2g}"),
        "onnxruntime": found if isinstance(found, str) else None,
    }


def samples(model: onnx.ModelProto) -> np.ndarray[Any, Any] | str:
    """Images from fixed noise in onnxruntime, or why it does not run the graph."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    noise = sampler_noise(0, IMAGES, (1, 8, 8), 0)["noise"]
    try:
        session = ort.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        kind = np.float16 if given.type == "tensor(float16)" else np.float32
        (image,) = session.run(["sample"], {given.name: noise.astype(kind)})
    except failures() as error:
        return one_line(error)
    return np.asarray(image, np.float32)


if __name__ == "__main__":
    main()
