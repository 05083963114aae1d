"""Kit ``node``: an npm package with types that runs a bundle in Node, and a command that writes a PNG."""

from __future__ import annotations

from mmd_export.kit_project import Library, SourceKit

KIT = SourceKit(
    name="node",
    summary="an npm package with types, and a command that writes a PNG",
    formats=("onnx",),
    libraries=(
        Library("ONNX Runtime for Node", "MIT", "the npm package onnxruntime-node"),
        Library("pngjs", "MIT", "the npm package pngjs"),
        Library("TypeScript, to build", "Apache-2.0", "the npm package typescript"),
    ),
    run=(
        "npm ci",
        "npm run build",
        "npm run sample -- --self-test",
        "npm run sample -- --seed 7 --out sample.png",
    ),
    parts=(("typescript", "src/core"),),
)
