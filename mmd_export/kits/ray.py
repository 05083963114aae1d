"""Kit ``ray``: a Ray Serve application that draws in batches, and a client that asks it."""

from __future__ import annotations

from mmd_export.kit_project import Library, SourceKit

KIT = SourceKit(
    name="ray",
    summary="a Ray Serve application: batches, health, metrics, back-pressure; PNG and raw numbers over HTTP",
    formats=("onnx", "openvino"),
    libraries=(
        Library("Ray", "Apache-2.0", "the package ray, extra serve"),
        Library("FastAPI", "MIT", "the package fastapi"),
        Library("ONNX Runtime", "MIT", "the package onnxruntime"),
        Library("OpenVINO", "Apache-2.0", "the package openvino, for bundles of that format"),
        Library("mmd-export", "Apache-2.0", "its package, without extras for training"),
    ),
    before={"openvino": ("pip install openvino",)},
    run=(
        "pip install -r requirements.txt",
        "python app.py --self-test",
        "python app.py",
        "python client.py --self-test",
        "python client.py --seed 7 --out sample.png",
    ),
)
