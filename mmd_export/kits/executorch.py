"""Kit ``executorch``: the sources of kit ``cpp`` with the C++ runtime that ExecuTorch's Python package brings."""

from __future__ import annotations

from mmd_export.kit_project import Library, SourceKit

KIT = SourceKit(
    name="executorch",
    summary="a CMake project in C++17 that runs the .pte with the runtime of ExecuTorch's Python package",
    formats=("pte",),
    libraries=(Library("ExecuTorch", "BSD-3-Clause", "its Python package"),),
    run=(
        "cmake --build build --config Release",
        "build/mmd_sample --self-test",
        "build/mmd_sample --seed 7 --out sample.png",
    ),
    sources="cpp",
    before={
        "pte": (
            "pip install --no-deps executorch",
            """cmake -B build -DCMAKE_PREFIX_PATH="$(python -c 'import executorch; print(executorch.__path__[0])')\"""",
        )
    },
)
