"""What an engine is tied to: written into ``manifest.hardware``, compared before anything is deserialised. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from mmd_export.errors import BundleError, NotAvailableError
from mmd_export.trt.device import Device
from mmd_export.trt.library import LIBRARIES, Library, system

# TensorRT-RTX compiles for listed compute capabilities, not for an operating system:
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/engine-compatibility.html
ANY_SYSTEM = "any"


@dataclass(frozen=True)
class LockFacts:
    """The facts. An engine runs where each of them holds.

    Args:
        library: ``tensorrt`` or ``tensorrt-rtx``.
        version: its release; another one refuses the engine unless it was built with --version-compat.
        system: operating system and processor, or ``any``.
        capabilities: compute capabilities, comma-separated; ``8.0+`` stands for that one and all newer.
        onnx_sha256: of the graph that was compiled; a stripped engine takes its weights from it.
        gpu: the GPU that it was built on, ``none`` where there was none.
        driver: of that GPU, for people.
        cuda: the CUDA of that driver; an older major release cannot run the kernels.
        version_compat: ``yes`` where newer releases load it too.
    """

    library: str
    version: str
    system: str
    capabilities: str
    onnx_sha256: str
    gpu: str = "none"
    driver: str = "none"
    cuda: str = "none"
    version_compat: str = "no"

    def to_dict(self) -> dict[str, str]:
        """As in the manifest."""
        return asdict(self)

    @classmethod
    def read(cls, bundle: str, hardware: Mapping[str, str] | None) -> LockFacts:
        """The facts of a manifest; raises BundleError where one is missing or unknown."""
        known = [field.name for field in fields(cls)]
        given = hardware or {}
        for name in (*known, *given):
            if name not in known or name not in given:
                says = "lacks" if name not in given else "has the unknown"
                raise BundleError(f"bundle {bundle}: manifest.hardware {says} {name!r}; rebuild the bundle")
        return cls(**given)


def require_lock(bundle: str, facts: LockFacts, library: Library, version: str, device: Device) -> None:
    """Raise NotAvailableError that names the first fact which does not hold here, with both values."""
    if facts.library not in LIBRARIES:
        raise BundleError(f"bundle {bundle}: manifest.hardware names the library {facts.library!r}; rebuild the bundle")
    for what, built, here, holds in (
        ("library", facts.library, library.name, facts.library == library.name),
        (f"{library.title} version", facts.version, version, version_fits(facts, version)),
        ("system", facts.system, system(), facts.system in (ANY_SYSTEM, system())),
        ("compute capability", facts.capabilities, device.capability, capability_fits(facts, device.capability)),
        ("CUDA of the driver", facts.cuda, device.cuda, cuda_fits(facts, device.cuda)),
    ):  # fmt: skip
        if not holds:
            raise NotAvailableError(
                f"bundle {bundle}: its engine was built for {what} {built}, here is {here}; "
                "finalize the deferred bundle on this machine, or build again here"
            )


def version_fits(facts: LockFacts, version: str) -> bool:
    """The same release; any newer one where the engine is version-compatible."""
    if facts.version == version:
        return True
    return facts.version_compat == "yes" and numbers(version) >= numbers(facts.version)


def capability_fits(facts: LockFacts, capability: str) -> bool:
    """Whether the GPU's capability is listed, or above one that is listed with a plus."""
    for listed in facts.capabilities.split(","):
        if listed == capability:
            return True
        if listed.endswith("+") and numbers(capability) >= numbers(listed[:-1]):
            return True
    return False


def cuda_fits(facts: LockFacts, cuda: str) -> bool:
    """Whether the driver runs the CUDA that the engine was built under: no older major release."""
    return facts.cuda == "none" or numbers(cuda)[:1] >= numbers(facts.cuda)[:1]


def numbers(text: str) -> tuple[int, ...]:
    """``10.13.2.6`` as numbers; whatever is none ends it."""
    found: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)
