"""The torch reference: the unrolled sampler itself, eager, float32. It alone needs torch and a checkpoint."""

from __future__ import annotations

import importlib.metadata
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mmd_export.bundle import Bundle
from mmd_export.errors import NotAvailableError, UsageError
from mmd_export.runtime import Array, Arrays, Availability, ChainSession, RunOptions, Session, uninstalled
from mmd_runtime.chunks import check_inputs

if TYPE_CHECKING:
    from mmd_export.unroll import UnrolledSampler

INSTALL = "pip install 'mmd-export[tune]'"


class TorchRuntime:
    """Opens any bundle whose checkpoint is at hand; chosen by name only, never by format."""

    name = "torch"
    formats: tuple[str, ...] = ()
    modules: tuple[str, ...] = ("torch", "diffusers")
    unseen = ""

    def availability(self) -> Availability:
        if missing := uninstalled(self.modules):
            return Availability(False, f"{missing} not installed", INSTALL)
        return Availability(True, f"torch {importlib.metadata.version('torch')}, CPU")

    def open(self, bundle: Bundle, options: RunOptions) -> Session:
        return _TorchSession(bundle, options)

    def open_chain(self, bundle: Bundle, options: RunOptions) -> ChainSession:
        return _TorchSession(bundle, options)


class _TorchSession:
    """The sampler of a bundle's checkpoint and plan."""

    def __init__(self, bundle: Bundle, options: RunOptions) -> None:
        if not (found := RUNTIME.availability()).available:
            raise NotAvailableError(f"runtime torch: {found.detail}; {found.install}")
        from mmd_export.torch_device import use_threads

        self._use_threads = partial(use_threads, options.threads)
        self._use_threads()
        self.bundle = bundle
        self.sampler = _sampler(bundle, options)
        self.uint8 = bundle.manifest.spec("sample").dtype == "uint8"

    def run(self, inputs: Arrays) -> dict[str, Array]:
        return {"sample": self.run_chain(inputs)["sample"]}

    def run_chain(self, inputs: Arrays) -> dict[str, Array]:
        from mmd_export.reference import run_chain, to_uint8

        check_inputs(self.bundle, inputs)
        self._use_threads()
        results = run_chain(self.sampler, dict(inputs))
        return results | {"sample": to_uint8(results["sample"])} if self.uint8 else results

    def run_step(self, step: int, known: Arrays) -> Array:
        import torch

        self._require_known(step, known)
        tensors: dict[tuple[str, int], Any] = {}
        for s, noise in enumerate(known.get("step_noise", ())):
            tensors["noise", s] = torch.from_numpy(np.ascontiguousarray(noise))
        tensors["state", 0] = self.sampler.plan.initial_scale * torch.from_numpy(known["noise"])
        for k in range(1, step):
            tensors["state", k] = torch.from_numpy(known[f"state.{k}"])
        told = {spec.name: spec for spec in self.bundle.manifest.inputs if spec.name not in ("noise", "step_noise")}
        conditions = {name: torch.from_numpy(known[name]) for name in told}
        update = self.sampler.plan.steps[step - 1].update
        earlier = {term.index for term in update if term.source in ("output", "clean")} - {step - 1}
        with torch.inference_mode():
            for k in sorted(earlier):  # a multistep plan reads older outputs: those of the given states
                self.sampler.observe(k, tensors, conditions)
            self.sampler.advance(step - 1, tensors, conditions)
        result: Array = tensors["state", step].numpy()
        return result

    def _require_known(self, step: int, known: Arrays) -> None:
        """Raise UsageError unless ``step`` exists and everything that it starts from is given."""
        name, steps = self.bundle.name, self.sampler.plan.step_count
        if not 1 <= step <= steps:
            raise UsageError(f"bundle {name}: step {step} is asked for; it has steps 1 to {steps}")
        needed = [*(spec.name for spec in self.bundle.manifest.inputs), *(f"state.{k}" for k in range(1, step))]
        if missing := [each for each in needed if each not in known]:
            raise UsageError(f"bundle {name}: step {step} starts from '{missing[0]}', given: {sorted(known)}; add it")


def _sampler(bundle: Bundle, options: RunOptions) -> UnrolledSampler:
    """The unrolled sampler of the checkpoint that the bundle was built from, told apart by its hash."""
    from mmd_export.checkpoint import BUILT_IN, load_matching
    from mmd_export.plan import StepPlan
    from mmd_export.reference import sampler_of

    wanted, model = bundle.manifest.checkpoint, options.checkpoint
    if model is None and wanted.name not in BUILT_IN:
        raise UsageError(
            f"bundle {bundle.name}: runtime torch needs its checkpoint {wanted.name!r}; pass --checkpoint MODEL"
        )
    checkpoint = options.read(bundle) if options.read else load_matching(model or wanted.name, wanted)
    return sampler_of(checkpoint, StepPlan.from_dict(bundle.manifest.plan))


RUNTIME = TorchRuntime()
