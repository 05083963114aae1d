"""Target ``coreml``: an ML Program of the whole sampler, ``model.mlpackage``, converted on any system."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.errors import NotAvailableError
from mmd_export.runtime import Availability, uninstalled
from mmd_export.target_options import TargetOptions
from mmd_export.targets import Compiled, CompileOptions

if TYPE_CHECKING:
    from mmd_export.program import SamplerProgram


class CoreMLTarget:
    """ML Program for iOS 16 / macOS 13 or newer, one batch size.

    fp32; fp16 with float32 where the probe of the trajectory says that half precision does not reach; w8, w6, w4: fp16
    with weights of so many bits, int8 or a palette. Inputs, outputs and sampler state are float32. uint8 is an image
    output, which takes batch 1 and 1 or 3 channels.
    """

    name = "coreml"
    format = "mlpackage"
    artefact = "model.mlpackage"
    modules: tuple[str, ...] = ("torch", "coremltools")
    precisions: tuple[str, ...] = ("fp32", "fp16", "w8", "w6", "w4")
    outputs: tuple[str, ...] = ("float32", "uint8")
    forms: tuple[str, ...] = ("unrolled",)
    options: tuple[str, ...] = ("deployment_target", "compute_units")
    several_batches = False
    extra = "coreml"

    def availability(self) -> Availability:
        if missing := uninstalled(self.modules):
            return Availability(False, f"{missing} not installed", "pip install 'mmd-export[tune,coreml]'")
        return Availability(True, f"coremltools {version('coremltools')}")

    def require_options(self, precision: str, options: TargetOptions) -> None:  # noqa: ARG002 - ChecksOptions
        """Raise for names that are unknown."""
        from mmd_export.coreml.convert import checked_system, checked_units

        checked_system(options.deployment_target), checked_units(options.compute_units)

    def require_images(self, batch: int | None, channels: int) -> None:
        """Raise for what no image of Core ML can hold."""
        if batch != 1 or channels not in (1, 3):
            raise NotAvailableError(
                f"target coreml gives uint8 as one picture of 1 or 3 channels, asked are {batch} of {channels}; "
                "use --batch 1, or --output float32"
            )

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """``model.mlpackage``; one program gives the same bytes."""
        from mmd_export.coreml.capture import capture
        from mmd_export.coreml.convert import SYSTEMS, Wanted, checked_system, checked_units, convert
        from mmd_export.coreml.package import write_package
        from mmd_export.coreml.probe import find_ends, find_islands, find_phases

        system, units = checked_system(options.target.deployment_target), checked_units(options.target.compute_units)
        channels = (program.shape if program.decoder is None else program.decoder.shape)[0]
        if options.output == "uint8":
            self.require_images(program.batch, channels)
        captured = capture(program, options.output)
        islands: frozenset[str] = frozenset()
        if options.precision != "fp32":
            options.notify("probing the ranges of the trajectory")
            islands = find_islands(captured.program, program) | find_ends(captured) | find_phases(captured)
        options.notify("converting with coremltools")
        wanted = Wanted(options.precision, SYSTEMS[system], options.output, channels, islands)
        model = convert(captured, wanted)
        graph = write_package(model, folder / self.artefact, {"compute_units": units})
        toolchain = {name: version(name) for name in ("torch", "coremltools")}
        return Compiled(graph, toolchain, {"deployment_target": system, "compute_units": units})


TARGET = CoreMLTarget()
