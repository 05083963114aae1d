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
# A protobuf message holds less than 2 GiB (https://protobuf.dev/programming-guides/proto-limits): above this weights
# go into a file of their own beside the graph, as ONNX external data.
LARGEST_FILE = 2**31 - 2**27
DATA_SUFFIX = "_data"
_NODE_BYTES = 2048  # what a node takes at most
_INLINE_BYTES = 1024  # shapes and numbers of the plan stay in the graph, where shape inference reads them


class OnnxTarget:
    """ONNX, opset 20, float32; ``model.onnx_data`` beside it where one file would pass ``largest_file`` bytes."""

    name = "onnx"
    format = "onnx"
    artefact = "model.onnx"
    precisions: tuple[str, ...] = ("fp32",)
    outputs: tuple[str, ...] = ("float32", "uint8")
    forms: tuple[str, ...] = ("unrolled", "loop")
    extra = "onnx"

    def __init__(self, largest_file: int = LARGEST_FILE) -> None:
        self.largest_file = largest_file

    def availability(self) -> Availability:
        missing = [name for name in ("torch", "onnx", "onnxscript", "onnx_ir") if find_spec(name) is None]
        if missing:
            return Availability(False, f"{', '.join(missing)} not installed", "pip install 'mmd-export[tune,onnx]'")
        return Availability(True, f"onnx {version('onnx')}, opset {OPSET}")

    def compile(self, program: SamplerProgram, folder: Path, options: CompileOptions) -> Compiled:
        """``model.onnx`` [+ ``model.onnx_data``]: checked by onnx.checker, linted; one program gives the same bytes."""
        from mmd_export.onnx_compose import GraphSpec, compose
        from mmd_export.onnx_lint import report, require_clean
        from mmd_export.onnx_loop import compose_loop

        spec = GraphSpec(program.shape, program.batch, program.conditions, options.output, decoder_call(program))
        constants = [
            [value.detach().cpu().numpy() for value in program.constants(k)] for k in range(program.plan.step_count)
        ]
        write = compose_loop if chosen_form(options.form, program.plan.step_count) == "loop" else compose
        model = write(one_call(program), program.plan, constants, spec)
        clean_up(model)
        require_clean(model, program.conditions)
        save(model, folder / self.artefact, self.largest_file)
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


def decoder_call(program: SamplerProgram) -> tuple[ir.Model, tuple[int, int, int]] | None:
    """The captured decoder as an ONNX model, and the shape of its image; float32 whatever the precision.

    Constants are folded, but onnxscript's rewrite rules are left out: their x + 0 -> x takes everything below 1e-8 for
    0, such as AutoencoderDC's x / (y + 1e-15), which is then 0 / 0 (onnxscript/rewriter/_pattern_ir.py, abs_tol,
    0.7.2). Call ``optimize``, as for the network, once that tolerance is gone.
    """
    import torch
    from onnx_ir.passes import Sequential
    from onnx_ir.passes import common as passes
    from onnxscript.optimizer import fold_constants

    if program.decoder is None:
        return None
    with quiet_export():
        exported = torch.onnx.export(
            program.decoder.call, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            external_data=False,
        )  # fmt: skip
    assert exported is not None
    model: ir.Model = exported.model
    fold_constants(model, onnx_shape_inference=True)
    Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    )(model)
    return model, program.decoder.shape


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


def save(model: ir.Model, path: Path, largest_file: int = LARGEST_FILE) -> None:
    """Write, then check the file in full (shapes inferred, strictly); the copy in memory is gone by then.

    What would be larger than ``largest_file`` has its weights in ``<path>_data``; they are streamed into it.
    """
    import onnx
    import onnx_ir as ir

    data = path.with_name(path.name + DATA_SUFFIX)
    if file_size(model) > largest_file:
        ir.save(model, path, external_data=data.name, size_threshold_bytes=_INLINE_BYTES)
    else:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        path.unlink()
        data.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()[0]
        raise NotAvailableError(f"the ONNX graph fails onnx.checker: {reason}") from error


def file_size(model: ir.Model) -> int:
    """At most so many bytes as one file; nothing is serialised to find out."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    nodes = sum(1 for _ in model.graph.all_nodes())
    return sum(weight.nbytes for weight in weights if weight is not None) + _NODE_BYTES * nodes


TARGET = OnnxTarget()
