"""A stand-in for Triton Inference Server: its gRPC protocol and its reading of ``config.pbtxt``, on ONNX Runtime.

What it does with shapes, batches and warm-up files follows the sources of the server's core
(https://github.com/triton-inference-server/core, ``backend_model_instance.cc`` and ``infer_request.cc``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

WIRE = {"TYPE_FP32": ("FP32", "<f4"), "TYPE_INT64": ("INT64", "<i8"), "TYPE_UINT8": ("UINT8", "u1")}
Arrays = Mapping[str, NDArray[Any]]


def read_config(model: Path) -> Any:
    """``config.pbtxt``, parsed strictly against the schema of the server: an unknown field is an error."""
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


def type_name(tensor: Any) -> str:
    """``TYPE_FP32`` and so on."""
    return str(model_config_pb2.DataType.Name(tensor.data_type))


class Model:
    """One model of a repository, loaded and warmed up as its config says."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        assert self.config.name == folder.name
        assert self.config.backend == "onnxruntime"
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(folder / "1" / self.config.default_model_filename), settings)
        if self.config.max_batch_size:
            for value in (*self.session.get_inputs(), *self.session.get_outputs()):
                assert isinstance(value.shape[0], str), f"{value.name}: the server wants a free first dimension"
        self.warmed = [self._warm(folder / "warmup", sample) for sample in self.config.model_warmup]

    def _warm(self, folder: Path, sample: Any) -> int:
        """Copies of the request of a sample, run together; returns the number of images."""
        one = {}
        for name, given in sample.inputs.items():
            data = (folder / given.input_data_file).read_bytes()
            values = np.frombuffer(data, WIRE[type_name(given)][1]).reshape(tuple(given.dims))
            one[name] = values[np.newaxis] if self.config.max_batch_size else values
        assert sample.batch_size == 1 or self.config.max_batch_size
        stacked = {name: np.concatenate([array] * sample.batch_size) for name, array in one.items()}
        return len(self.run(stacked)["sample"])

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """A request, with the checks of the server."""
        assert set(inputs) == {each.name for each in self.config.input}
        feeds = {each.name: self._shaped(each, inputs[each.name]) for each in self.config.input}
        names = [each.name for each in self.config.output]
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def _shaped(self, tensor: Any, array: NDArray[Any]) -> NDArray[Any]:
        """Compare with ``dims``, and give the array the shape that the graph takes."""
        dims, limit = tuple(tensor.dims), self.config.max_batch_size
        own = array.shape[1:] if limit else array.shape
        assert len(own) == len(dims)
        assert all(want in (-1, size) for want, size in zip(dims, own, strict=True)), (tensor.name, array.shape, dims)
        assert not limit or 1 <= len(array) <= limit
        if not tensor.HasField("reshape"):
            return array
        front = array.shape[:1] if limit else ()
        return array.reshape(*front, *tensor.reshape.shape)


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # no types
    """The calls that the client makes. ``refusals``: so many requests are refused first, as by a full queue."""

    def __init__(self, model: Model, refusals: int = 0) -> None:
        self.model, self.refusals, self.batches = model, refusals, list[int]()

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        """Shapes with -1 for a free number of images."""
        if request.name != self.model.config.name:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        front = [-1] if self.model.config.max_batch_size else []

        def described(tensor: Any) -> Any:
            shape = [*front, *tensor.dims]
            kind = service_pb2.ModelMetadataResponse.TensorMetadata
            return kind(name=tensor.name, datatype=WIRE[type_name(tensor)][0], shape=shape)

        return service_pb2.ModelMetadataResponse(
            name=request.name, versions=["1"], inputs=[described(each) for each in self.model.config.input],
            outputs=[described(each) for each in self.model.config.output],
        )  # fmt: skip

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        """Tensors come and go as raw bytes."""
        if self.refusals:
            self.refusals -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
        types = {each.name: type_name(each) for each in (*self.model.config.input, *self.model.config.output)}
        inputs = {}
        for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True):
            datatype, dtype = WIRE[types[tensor.name]]
            assert tensor.datatype == datatype
            inputs[tensor.name] = np.frombuffer(data, dtype).reshape(tuple(tensor.shape))
        self.batches.append(len(inputs["noise"]))
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        for name, array in self.model.run(inputs).items():
            answer.outputs.add(name=name, datatype=WIRE[types[name]][0], shape=list(array.shape))
            answer.raw_output_contents.append(array.tobytes())
        return answer


@contextmanager
def serving(model: Path, refusals: int = 0) -> Iterator[tuple[str, Service]]:
    """The address of a server with that model, and its service."""
    service = Service(Model(model), refusals)
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", service
    finally:
        server.stop(None).wait()
