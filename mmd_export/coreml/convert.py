"""coremltools' conversion of the captured sampler, and its compression of weights."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmd_export.coreml import half
from mmd_export.coreml.capture import Captured
from mmd_export.errors import NotAvailableError, UsageError, one_line

# iOS and macOS that share an opset; iOS 16 is the first with weights of less than 16 bits.
SYSTEMS = {
    "iOS16": "iOS16", "iOS17": "iOS17", "iOS18": "iOS18", "iOS26": "iOS26",
    "macOS13": "iOS16", "macOS14": "iOS17", "macOS15": "iOS18", "macOS26": "iOS26",
}  # fmt: skip
UNITS = ("all", "cpu", "cpu-gpu", "cpu-ane")
DEFAULT_SYSTEM = "iOS17"
_BITS = {"w8": 8, "w6": 6, "w4": 4}
_LEAST_VALUES = 512  # smaller weights stay as they are: their tables would weigh as much

# coremltools 9.0 imports every framework that it can convert from, if it is installed: 120 MB and 2 s for two of them
# (coremltools/_deps/__init__.py, converters/mil/frontend/torch/load.py). Delete once it imports them when asked.
_OTHER_SOURCES = ("executorch", "sklearn", "tensorflow", "xgboost")

# The passes of coremltools' default pipeline that change something in a captured sampler; the whole graph is validated
# after each, which is most of what conversion costs. Not among them: fuse_elementwise_to_batchnorm, which divides by
# sqrt(1 + 1e-5) where it should by 1 (coremltools 9.0).
_PASSES = (
    "update_output_dtypes", "noop_elimination", "const_elimination", "sanitize_input_output_names",
    "divide_to_multiply", "fuse_pad_conv", "merge_consecutive_reshapes", "merge_consecutive_transposes",
    "fuse_transpose_matmul", "expand_high_rank_reshape_and_transpose", "const_deduplication",
    "dedup_op_and_var_names", "add_fp16_cast", "update_output_dtypes", "const_elimination", "cast_optimization",
    "const_deduplication", "topological_reorder", "dead_code_elimination",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """``islands``: nodes that stay float32. ``output``: float32 or uint8, an image of ``channels``."""

    precision: str
    system: str
    output: str
    channels: int
    islands: frozenset[str]


def checked_system(system: str | None) -> str:
    """The deployment target, in coremltools' spelling; raises UsageError for an unknown one."""
    wanted = system or DEFAULT_SYSTEM
    known = {name.lower(): name for name in SYSTEMS}
    if wanted.lower() not in known:
        raise UsageError(f"--deployment-target {wanted!r} is unknown; known: {', '.join(SYSTEMS)}")
    return known[wanted.lower()]


def checked_units(units: str | None) -> str:
    """The compute units; raises UsageError for unknown ones."""
    if units not in (None, *UNITS):
        raise UsageError(f"--compute-units {units!r} is unknown; known: {', '.join(UNITS)}")
    return units or "all"


def convert(captured: Captured, wanted: Wanted) -> Any:
    """An MLModel that was not loaded, so that this works on any system."""
    ct = coremltools()
    keep = half.Float32(captured.plan | wanted.islands, captured.last)
    with _quiet():
        try:
            return ct.convert(
                captured.program,
                outputs=[_output(ct, wanted)],
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, wanted.system),
                compute_precision=ct.precision.FLOAT32,  # half precision is a pass of ours
                pass_pipeline=_pipeline(ct, wanted.precision, keep),
                skip_model_load=True,
            )
        except (
            NotImplementedError,
            ValueError,
            RuntimeError,
            TypeError,
            AssertionError,
        ) as error:  # it raises them all
            raise NotAvailableError(f"coremltools cannot convert it: {one_line(error)}; use --target onnx") from error


def coremltools() -> Any:
    """The package, which ships no types; importing it takes a second."""
    with _quiet(), _without(_OTHER_SOURCES):
        try:
            return importlib.import_module("coremltools")
        except (ImportError, OSError) as error:
            raise NotAvailableError(
                f"coremltools is not available here ({one_line(error)}); pip install 'mmd-export[tune,coreml]'"
            ) from error


@contextlib.contextmanager
def _without(packages: tuple[str, ...]) -> Iterator[None]:
    """As if the packages were not installed: None in sys.modules says so. Those in use already stay."""
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _output(ct: Any, wanted: Wanted) -> Any:
    """Stated, because half precision would otherwise reach the output of the package."""
    if wanted.output == "uint8":
        layout = ct.colorlayout.GRAYSCALE if wanted.channels == 1 else ct.colorlayout.RGB
        return ct.ImageType(name="sample", color_layout=layout)
    return ct.TensorType(name="sample", dtype=importlib.import_module("numpy").float32)


def _pipeline(ct: Any, precision: str, keep: half.Float32) -> Any:
    """The passes; what ``keep`` holds stays float32. The last makes weights int8, one scale a channel, or a palette.

    It is the pass of coremltools.optimize.coreml.linear_quantize_weights or palettize_weights, which would read the
    finished package again and run the whole default pipeline over it.
    """
    passes = [f"common::{name}" for name in _PASSES]
    if precision == "fp32":
        passes.remove(half.REPLACED)
        return ct.PassPipeline(passes, "mmd_export")
    half.register()
    passes[passes.index(half.REPLACED)] = half.PASS
    pipeline = ct.PassPipeline(passes, "mmd_export")
    pipeline.set_options(half.PASS, {"op_selector": lambda op: op not in keep})
    if precision not in _BITS:
        return pipeline
    cto = importlib.import_module("coremltools.optimize.coreml")
    if _BITS[precision] == 8:
        name = "compression::linear_quantize_weights"
        config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=_LEAST_VALUES)
    else:
        name = "compression::palettize_weights"
        config = cto.OpPalettizerConfig(mode="kmeans", nbits=_BITS[precision], weight_threshold=_LEAST_VALUES)
    pipeline.append_pass(name)
    pipeline.set_options(name, {"config": cto.OptimizationConfig(global_config=config)})
    return pipeline


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without coremltools' progress bars and its warnings about versions of other packages."""
    logger, level = logging.getLogger("coremltools"), logging.getLogger("coremltools").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
