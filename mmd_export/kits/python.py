"""Kit ``python``: a script that runs a bundle with numpy and the library of its artefact, without torch."""

from __future__ import annotations

from mmd_export.kit_project import Library, SourceKit

KIT = SourceKit(
    name="python",
    summary="a Python project that needs numpy and the library of the artefact, not torch",
    formats=("onnx", "openvino"),
    libraries=(
        Library("mmd-export", "Apache-2.0", "its package, without extras for training"),
        Library("ONNX Runtime", "MIT", "the package onnxruntime"),
        Library("OpenVINO", "Apache-2.0", "the package openvino, for bundles of that format"),
    ),
    before={"openvino": ("pip install openvino",)},
    run=("pip install -r requirements.txt", "python app.py --self-test", "python app.py --seed 7 --out sample.png"),
    sources="python-kit",
)
