"""What a timing depends on: the processor, its clocks and load, the GPU, the versions. No host name, user or path."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "mmd-export",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "torch",
    "diffusers",
    "coremltools",
    "executorch",
    "tensorrt",
    "tensorrt-rtx",
)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_CLOCKS = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_GPU = ("name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu")
SAME_MACHINE = ("system", "machine", "cpu", "cores", "cores_usable", "gpu")


def describe_environment() -> dict[str, Any]:
    """JSON-ready facts; a fact that this system does not tell is None."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": usable,
        "governor": _line(_CLOCKS / "scaling_governor"),
        "clock_mhz": _clock_mhz(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "thread_variables": {name: os.environ[name] for name in _THREADS if name in os.environ},
        "load_before": load(),
    }


def machine(environment: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for two timings to be of one machine."""
    system, _, rest = str(environment.get("platform", "")).partition(" ")
    gpu = environment.get("gpu") or {}
    facts = environment | {"system": system, "machine": rest.rpartition(" ")[2], "gpu": gpu.get("name")}
    return {name: facts.get(name) for name in SAME_MACHINE}


def load() -> list[float] | None:
    """Load average over 1, 5 and 15 minutes, where the system keeps one."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def why_no_cuda(version: str, cuda: str | None) -> str:
    """What to do about a torch of ``version``, built for ``cuda``, that finds no GPU."""
    if cuda is None:
        return f"torch {version} is built without CUDA; install a CUDA build of it (https://pytorch.org)"
    return f"torch {version} finds no GPU; run it where nvidia-smi shows one, its CUDA Version {cuda} or newer"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _cpu_info(key: str) -> list[str]:
    """The values of one key of /proc/cpuinfo, one a core."""
    text = _line(Path("/proc/cpuinfo")) or ""
    return [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key)]


def _clock_mhz() -> float | None:
    """Of the first core, now."""
    if (kilohertz := _line(_CLOCKS / "scaling_cur_freq")) is not None:
        return round(int(kilohertz) / 1000, 1)
    clocks = _cpu_info("cpu MHz")
    return round(float(clocks[0]), 1) if clocks else None


def _gpu() -> dict[str, str] | None:
    """The first GPU as nvidia-smi sees it, with its clocks; None where there is none."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    first = done.stdout.strip().splitlines()[:1] if done.returncode == 0 else []
    values = [value.strip() for value in first[0].split(",")] if first else []
    return dict(zip(_GPU, values, strict=True)) if len(values) == len(_GPU) else None


def cpu_kind() -> str:
    """The processor's name and a hash of what it can do, by /proc/cpuinfo: clouds give many kinds one name."""
    facts = [*_cpu_info("CPU implementer")[:1], *_cpu_info("CPU part")[:1]]  # ARM
    able = sorted({word for key in ("flags", "Features") for value in _cpu_info(key)[:1] for word in value.split()})
    return f"{cpu_model()}, {hashlib.sha256(' '.join([*facts, *able]).encode()).hexdigest()[:12]}"


def cpu_model() -> str:
    """The processor's name from the operating system, else its architecture."""
    if names := _cpu_info("model name"):
        return names[0]
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()
