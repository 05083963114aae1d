"""Kit ``triton``: a model repository for Triton Inference Server, and a client that proves the server's answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmd_export.bundle import Bundle, Manifest
from mmd_export.kit_project import Library, SourceKit
from mmd_export.triton_config import model_name, write_model

# Engines that carry a part of their library; https://github.com/triton-inference-server/tensorrt_backend#command-line-options
VERSION_COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"
IMAGE = "nvcr.io/nvidia/tritonserver:26.09-py3"


@dataclass(frozen=True)
class TritonKit(SourceKit):
    """The version folder of the model is the bundle itself: the client checks the bytes that the server loads."""

    def lines(self, manifest: Manifest) -> tuple[str, ...]:
        """Those of every kit; the server loads a version-compatible engine only where it is told to."""
        server, *others = SourceKit.lines(self, manifest)
        compatible = (manifest.hardware or {}).get("version_compat") == "yes"
        return (f"{server} {VERSION_COMPATIBLE}" if compatible else server, *others)

    def write(self, bundle: Bundle, folder: Path) -> None:
        """Sources and bundle, then what the server is told."""
        model = f"models/{model_name(bundle.manifest)}"
        SourceKit.write(replace(self, bundle_at=f"{model}/1"), bundle, folder)
        write_model(bundle, folder / model)


def _server(options: str = "") -> str:
    container = f'docker run --rm --gpus all {options}-p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD/models:/models"'
    return f"{container} {IMAGE} tritonserver --model-repository=/models"


KIT = TritonKit(
    name="triton",
    summary="a model repository for Triton Inference Server and a client; no Triton server was at hand to run it",
    formats=("onnx", "tensorrt"),
    libraries=(
        Library("Triton Inference Server", "BSD-3-Clause, in a container under NVIDIA's own terms", "NVIDIA"),
        Library("Triton's Python client", "BSD-3-Clause", "the package tritonclient"),
        Library("gRPC and Protocol Buffers", "Apache-2.0, BSD-3-Clause", "the packages grpcio and protobuf"),
        Library("mmd-export", "Apache-2.0", "its package, without extras for training"),
    ),
    before={"onnx": (_server("-e NVIDIA_TF32_OVERRIDE=0 "),), "tensorrt": (_server(),)},  # float32 stays float32
    run=(
        "pip install -r requirements.txt",
        "python client.py --self-test",
        "python client.py --seed 7 --out sample.png",
    ),
)
