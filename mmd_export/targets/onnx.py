"""Target ``onnx``: one network call through torch.onnx, K of them composed with the plan, one file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mmd_export.errors import NotAvailableError
from mmd_export.runtime import Availability
from mmd_export.targets import Compiled, CompileOptions

if TYPE_CHECKING:
    import onnx_ir as ir

    from mmd_export.program import SamplerProgram

OPSET = 20  # the newest that TensorRT 10, onnxruntime and the web runtimes all read
# benchmarks/results/forms.json: loading an unrolled graph grows faster than its steps, a loop's takes the same at any.
LOOP_ABOVE = 20
PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir")


class OnnxTarget:
    """ONNX, opset 20, float32."""

    name = "onnx"
    format = "onnx"
    artefact = "model.onnx"
    precisions: tuple[str, ...] = ("fp32",)
    outputs: tuple[str, ...] = ("float32", "uint8")
    forms: tuple[str, ...] = ("unrolled", "loop")
    extra = "onnx"

    def availability(self) -> Availability:
        missing = [name for name in ("torch", "onnx", "onnxscript", "onnx_ir") if find_spec(name) is None]
        if missing:
            return Availability(False, f"{', '.join(missing)} not installed", "pip install 'mmd-export[tune,onnx]'")
        return Availability(True, f"onnx {version('onnx')}, opset {OPSET}")

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """``model.onnx``: checked by onnx.checker and linted; the same program gives the same bytes."""
        from mmd_export.onnx_compose import GraphSpec, compose
        from mmd_export.onnx_lint import report, require_clean
        from mmd_export.onnx_loop import compose_loop

        spec = GraphSpec(program.shape, program.batch, program.conditions, options.output)
        constants = [
            [value.detach().cpu().numpy() for value in program.constants(k)] for k in range(program.plan.step_count)
        ]
        write = compose_loop if chosen_form(options.form, program.plan.step_count) == "loop" else compose
        model = write(one_call(program), program.plan, constants, spec)
        clean_up(model)
        require_clean(model, program.conditions)
        save(model, folder / self.artefact)
        toolchain = {name: version(name) for name in PACKAGES}
        folded = [value for k in range(program.plan.step_count) for value in program.constants(k)]
        facts = {"folded_values": len(folded), "folded_bytes": sum(value.nbytes for value in folded)}
        return Compiled(report(model, program.batch or 1).to_dict() | facts, toolchain)


def chosen_form(form: str, steps: int) -> str:
    """``form`` itself, or what ``auto`` stands for."""
    if form == "auto":
        return "loop" if steps > LOOP_ABOVE else "unrolled"
    return form


def one_call(program: SamplerProgram) -> ir.Model:
    """The captured call as an ONNX model with inputs (x, *conditions, *constants)."""
    import torch
    from onnxscript.optimizer import optimize

    with quiet_export():
        exported = torch.onnx.export(
            program.step, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False, external_data=False
        )
        assert exported is not None
        model: ir.Model = optimize(exported.model, num_iterations=1)  # a second one finds nothing that tidy_call leaves
    tidy_call(model)
    return model


@contextmanager
def quiet_export() -> Iterator[None]:
    """torch.onnx warns of a missing torchvision and of deprecations inside torch; neither is the user's to act on."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def tidy_call(model: ir.Model) -> None:
    """What need not be done again for every copy of the call: constants as initialisers, no Identity."""
    from onnx_ir.passes import Sequential
    from onnx_ir.passes import common as passes

    Sequential(passes.LiftConstantsToInitializersPass(lift_all_constants=True), passes.IdentityEliminationPass())(model)


def clean_up(model: ir.Model) -> None:
    """Equal constants once, nothing unused, no metadata, topological order."""
    from onnx_ir.passes import Sequential
    from onnx_ir.passes import common as passes

    Sequential(
        passes.DeduplicateInitializersPass(size_limit=2**20),
        passes.RemoveUnusedNodesPass(),
        passes.TopologicalSortPass(),
        passes.ClearMetadataAndDocStringPass(),
    )(model)


def save(model: ir.Model, path: Path) -> None:
    """Write, then check the file in full (shapes inferred, strictly); the copy in memory is gone by then."""
    import onnx
    import onnx_ir as ir

    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        path.unlink()
        reason = str(error).strip().splitlines()[0]
        raise NotAvailableError(f"the ONNX graph fails onnx.checker: {reason}") from error


TARGET = OnnxTarget()
