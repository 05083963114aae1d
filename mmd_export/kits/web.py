"""Kit ``web``: a page that runs a bundle in the browser, and an element and functions for other pages."""

from __future__ import annotations

from mmd_export.kit_project import Library, SourceKit

KIT = SourceKit(
    name="web",
    summary="a web page in TypeScript: ONNX Runtime on WebGPU or WebAssembly, nothing from elsewhere at run time",
    formats=("onnx",),
    libraries=(
        Library("ONNX Runtime Web", "MIT", "the npm package onnxruntime-web"),
        Library("Vite, to build", "MIT", "the npm package vite"),
        Library("TypeScript, to build", "Apache-2.0", "the npm package typescript"),
        Library("Playwright, to test", "Apache-2.0", "the npm package playwright-core"),
    ),
    run=("npm ci", "npm run dev"),
    bundle_at="public/bundle",
    parts=(("typescript", "src/core"),),
)
