"""Execution providers of ONNX Runtime: what each is called, whether it works here, and where the nodes of a graph went.

A provider is part of the onnxruntime wheel that is installed, or a package of its own that any onnxruntime loads
(https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries). onnxruntime by itself goes on with the CPU when a
provider cannot be loaded; nothing here does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmd_export.errors import NotAvailableError, UsageError, one_line
from mmd_export.runtime import Availability, Placement, uninstalled
from mmd_export.trt.device import find_device

_INSTEAD = "pip uninstall -y onnxruntime; pip install"  # these wheels overwrite each other
UPDATE_DRIVER, ELSEWHERE = "update the NVIDIA driver", "run it on a machine that has one"
# Of cudaError: the driver is too old or of another release; there is no device, or no driver at all.
_OLD_DRIVER = re.compile(r"driver version is insufficient|InsufficientDriver|CUDA failure (35|36)\b")
_OTHER_DRIVER = re.compile(r"CUDA failure (803|804)\b|SystemDriverMismatch|CompatNotSupported")
_NO_DEVICE = re.compile(r"no CUDA-capable device|cudaErrorNoDevice|CUDA failure 100\b")
_GPU_WHEEL = f"{_INSTEAD} 'mmd-export[gpu]'"
# y = x + x on one float32, opset 13: what a provider is tried on, as the onnx package may be missing where it runs.
_ADD = (
    b'\x08\x08\x12\x00:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08'
    b"\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@dataclass(frozen=True)
class Provider:
    """One provider.

    Args:
        name: as after ``onnxruntime:``.
        full_name: as onnxruntime calls it.
        install: the line that brings it.
        plugin: module of the package that brings it to any onnxruntime.
        device: where its buffers lie, as onnxruntime's IO binding calls it.
        options: of the provider; float32 is to stay float32.
        graph_option: the option that captures a run as a CUDA graph.
    """

    name: str
    full_name: str
    install: str
    plugin: str = ""
    device: str = "cpu"
    options: Mapping[str, str] = field(default_factory=dict)
    graph_option: str = ""


CPU = Provider("cpu", "CPUExecutionProvider", "pip install 'mmd-export[runtime]'")
_ALL = (
    CPU,
    Provider(
        "cuda", "CUDAExecutionProvider", _GPU_WHEEL,
        device="cuda", options={"use_tf32": "0"}, graph_option="enable_cuda_graph",
    ),
    Provider(
        "tensorrt", "TensorrtExecutionProvider", f"{_GPU_WHEEL} 'tensorrt<11'",
        device="cuda", graph_option="trt_cuda_graph_enable",
    ),
    Provider(
        "nvtensorrtrtx", "NvTensorRTRTXExecutionProvider", "pip install onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx", device="cuda", graph_option="enable_cuda_graph",
    ),
    Provider("coreml", "CoreMLExecutionProvider", "on macOS: pip install 'mmd-export[runtime]'"),
    Provider(
        "openvino", "OpenVINOExecutionProvider",
        f"{_INSTEAD} onnxruntime-openvino  # or, on Intel processors: pip install onnxruntime-ep-openvino",
        plugin="onnxruntime_ep_openvino",
    ),
    Provider("webgpu", "WebGpuExecutionProvider", "pip install onnxruntime-ep-webgpu", plugin="onnxruntime_ep_webgpu"),
    Provider("dml", "DmlExecutionProvider", f"on Windows: {_INSTEAD} onnxruntime-directml"),
)  # fmt: skip
PROVIDERS: Mapping[str, Provider] = {provider.name: provider for provider in _ALL}


def get_provider(name: str) -> Provider:
    """The provider called ``name``; UsageError lists the known ones."""
    if name not in PROVIDERS:
        raise UsageError(f"runtime onnxruntime has no provider {name!r}; known: {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


class ProviderMissingError(NotAvailableError):
    """A provider that does not work here, with the line that would bring it."""

    def __init__(self, provider: Provider, reason: str, move: str = "") -> None:
        self.reason, self.move = reason, move or driver_move(reason) or provider.install
        super().__init__(f"onnxruntime's provider {provider.name} does not work here: {reason}; {self.move}")


def driver_move(reason: str) -> str:
    """What to do about a failure of CUDA that is the driver's or the device's; empty for every other."""
    if _OTHER_DRIVER.search(reason):
        return UPDATE_DRIVER
    if _OLD_DRIVER.search(reason):  # CUDA says so too where there is none
        return ELSEWHERE if find_device() is None else UPDATE_DRIVER
    return ELSEWHERE if _NO_DEVICE.search(reason) else ""


def open_session(ort: Any, provider: Provider, model: str | bytes, settings: Any, *, graph: bool = False) -> Any:
    """An InferenceSession with ``provider`` first and, for what that does not take, the CPU.

    ``graph``: every run as a CUDA graph. Raises ProviderMissingError if the provider is missing or was left out, and
    what onnxruntime raises.
    """
    wanted = {**provider.options, **({provider.graph_option: "1"} if graph else {})}
    if provider.full_name in ort.get_available_providers():
        _load_cuda(ort, provider)
        order = [(provider.full_name, wanted)] + ([] if provider is CPU else [CPU.full_name])
        opened = ort.InferenceSession(model, settings, providers=order, enable_fallback=0)
    else:
        settings.add_provider_for_devices(_plugin_devices(ort, provider), wanted)
        opened = ort.InferenceSession(model, settings, enable_fallback=0)
    if (found := opened.get_providers())[:1] != [provider.full_name]:
        reason = f"onnxruntime {ort.__version__} cannot load it, only {', '.join(found)}"
        if provider.device == "cuda" and find_device() is None:
            raise ProviderMissingError(provider, f"{reason}: no NVIDIA GPU with a driver that works is here", ELSEWHERE)
        raise ProviderMissingError(provider, reason)
    return opened


def availability(ort: Any, provider: Provider) -> Availability:
    """Whether one addition runs with the provider; it is what tells a driver or library that is missing."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    detail = f"onnxruntime {ort.__version__}, {provider.full_name}"
    try:
        open_session(ort, provider, _ADD, settings)
    except ProviderMissingError as error:
        return Availability(False, error.reason, error.move)
    except failures() as error:
        missing = ProviderMissingError(provider, f"{detail}: {one_line(error)}")
        return Availability(False, missing.reason, missing.move)
    return Availability(True, detail)


def record_placement(settings: Any) -> None:
    """Ask for what ``placement`` reads; an onnxruntime that knows no such setting ignores it."""
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def placement(provider: Provider, opened: Any) -> Placement:
    """Where onnxruntime put the nodes of an open session, whose settings asked for it."""
    if not hasattr(opened, "get_provider_graph_assignment_info"):
        return Placement(provider.full_name, unknown="this onnxruntime does not tell; 1.24 does")
    nodes: dict[str, list[str]] = {}
    for part in opened.get_provider_graph_assignment_info():
        nodes.setdefault(part.ep_name, []).extend(f"{node.op_type} {node.name}".strip() for node in part.get_nodes())
    taken = nodes.pop(provider.full_name, [])
    return Placement(provider.full_name, len(taken), {name: tuple(found) for name, found in sorted(nodes.items())})


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of onnxruntime, which share no base class of their own."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    kinds = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return tuple(kinds)


def _load_cuda(ort: Any, provider: Provider) -> None:
    """Load CUDA's libraries from their wheels, if they came so; what onnxruntime prints meanwhile is no result."""
    if provider.device == "cuda" and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()


def _plugin_devices(ort: Any, provider: Provider) -> list[Any]:
    """The device that the provider's own package offers; raises ProviderMissingError if there is none."""
    if not provider.plugin or uninstalled([provider.plugin]):
        raise ProviderMissingError(provider, f"onnxruntime {ort.__version__} does not have it")
    if not hasattr(ort, "register_execution_provider_library"):
        raise ProviderMissingError(provider, f"onnxruntime {ort.__version__} loads no provider packages, 1.23 does")
    if not _devices(ort, provider):
        _register(ort, provider)
    devices = _devices(ort, provider)
    if not devices:
        raise ProviderMissingError(provider, f"its package {provider.plugin} finds no device here that it runs on")
    return devices[:1]


def _devices(ort: Any, provider: Provider) -> list[Any]:
    """Of the provider; OpenVINO's in full float32, the CPU, before its others."""
    found = [device for device in ort.get_ep_devices() if device.ep_name == provider.full_name]
    return sorted(found, key=lambda device: device.ep_metadata.get("ov_device", "CPU") != "CPU")


def _register(ort: Any, provider: Provider) -> None:
    """Load the provider's library; once in a process, as onnxruntime refuses a second time."""
    failed = failures()
    try:
        library = importlib.import_module(provider.plugin).get_library_path()
        ort.register_execution_provider_library(provider.full_name, library)
    except (ImportError, AttributeError, OSError) as error:
        raise ProviderMissingError(provider, one_line(error)) from error
    except failed as error:
        if "already registered" not in str(error):
            raise ProviderMissingError(provider, one_line(error)) from error
