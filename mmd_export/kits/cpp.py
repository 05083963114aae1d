"""Kit ``cpp``: one header and one source of C++17, with CMake, a C interface and a command."""

from __future__ import annotations

from mmd_export.kit_project import Library, SourceKit

KIT = SourceKit(
    name="cpp",
    summary="a CMake project of one header and one source of C++17, with a C interface and a command",
    formats=("onnx", "openvino", "tensorrt"),
    libraries=(
        Library("ONNX Runtime", "MIT", "its releases, for bundles of format onnx"),
        Library("OpenVINO", "Apache-2.0", "its releases or its Python package, for bundles of format openvino"),
        Library("TensorRT", "NVIDIA's own", "NVIDIA, for bundles of format tensorrt"),
    ),
    run=(
        "cmake --build build --config Release",
        "build/mmd_sample --self-test",
        "build/mmd_sample --seed 7 --out sample.png",
    ),
    before={
        "onnx": ('cmake -B build -DONNXRUNTIME_ROOT="$PWD/../onnxruntime"',),
        "openvino": (
            "pip install openvino",
            """cmake -B build -DOpenVINO_DIR="$(python -c 'import openvino; print(openvino.__path__[0])')/cmake\"""",
        ),
        "tensorrt": ('cmake -B build -DTENSORRT_ROOT="$PWD/tensorrt"',),
    },
)
