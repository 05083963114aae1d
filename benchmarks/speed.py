"""One graph against diffusers' own pipeline and a roofline, batch 1, CPU -> benchmarks/results/speed.json.

Everything in one interleaved run: DDIMPipeline as a user calls it, the sampler in torch, a one-step session called K
times, the one graph as ``--device cpu`` builds it, the one for any device, and what was tried on the former to be rid
of layout reorders round its convolutions:

- ``no blocked layout``: onnxruntime's NCHWc transformer off (optimisation level extended instead of all);
- ``layer norm``: the InstanceNormalization inside GroupNorm as LayerNormalization over the same numbers.

The roofline is the best of many float32 matrix products with the same threads, measured in the same run: 1024 x 1024 in
onnxruntime and 2048 x 2048 in torch, whichever is faster a product's operation. The fraction is (multiply-adds of the
network, counted by torch, times 2) / seconds / roofline. Each run comes after a rest of 0.1 s. The reorders are the
ReorderInput and ReorderOutput nodes of each graph after onnxruntime's own optimisation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import RESULTS, save_cifar10, save_small, write_result
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.checkpoint import Checkpoint, load_checkpoint
from mmd_export.latency import measure
from mmd_export.reference import sampler_of
from mmd_export.step_session import per_step_session
from mmd_export.target_options import TargetOptions

STEPS = 5
MODELS = {"ddpm-cifar10 architecture": save_cifar10, "16x16, 1.6 M parameters": save_small}
SEED = 0
GEMMS = {"sgemm in onnxruntime": 1024, "sgemm in torch": 2048}  # their sizes
Call = Callable[[], NDArray[Any]]


def pipeline_call(model: Path) -> Call:
    """diffusers' DDIMPipeline on the same weights; its noise comes from a seed that the graph's does too."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet, scheduler = UNet2DModel.from_pretrained(model), DDIMScheduler.from_pretrained(model)
    pipeline = DDIMPipeline(unet=unet.eval(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def call() -> NDArray[Any]:
        generator = torch.Generator().manual_seed(SEED)
        images: NDArray[Any] = pipeline(generator=generator, num_inference_steps=STEPS, output_type="np").images
        return images.transpose(0, 3, 1, 2) * 2.0 - 1.0

    return call


def session(model: bytes | str, level: str = "ALL", optimised: Path | None = None) -> Any:
    """``optimised``: where onnxruntime writes what it made of the graph."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if optimised is not None:
        settings.optimized_model_filepath = str(optimised)
    settings.inter_op_num_threads = 1
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def reorders(model: bytes | str, level: str = "ALL") -> int:
    """Nodes that only move values between onnxruntime's blocked layout and the plain one."""
    with tempfile.TemporaryDirectory() as scratch:
        session(model, level, Path(scratch) / "optimised.onnx")
        optimised = onnx.load(Path(scratch) / "optimised.onnx", load_external_data=False)
    return sum(node.op_type.startswith("Reorder") for node in optimised.graph.node)


def with_layer_norm(path: Path) -> bytes:
    """InstanceNormalization over (N, groups, rest) is LayerNormalization over the last axis, without an affine part."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    lengths = {name: dims[-1].dim_value for name, dims in shapes.items() if dims}
    nodes = [node for node in model.graph.node if node.op_type == "InstanceNormalization"]
    for length in sorted({lengths[node.input[0]] for node in nodes}):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(length, np.float32), f"ones.{length}"))
    for node in nodes:
        (epsilon,) = (attribute.f for attribute in node.attribute if attribute.name == "epsilon")
        inputs = [node.input[0], f"ones.{lengths[node.input[0]]}"]
        node.CopyFrom(
            helper.make_node("LayerNormalization", inputs, list(node.output), node.name, axis=-1, epsilon=epsilon)
        )
    serialized: bytes = model.SerializeToString()
    return serialized


def onnxruntime_gemm(size: int) -> Call:
    """One square float32 product: 2 size^3 operations."""
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    shape = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [size, size])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [size, size])
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([product], "gemm", [shape], [out], [numpy_helper.from_array(weight, "w")])
    opset = [helper.make_opsetid("", 20)]
    opened = session(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())
    return lambda: opened.run(None, {"x": weight})[0]


def torch_gemm(size: int) -> Call:
    """The same in torch."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))

    def call() -> NDArray[Any]:
        product: NDArray[Any] = (matrix @ matrix).numpy()
        return product

    return call


def network_flops(checkpoint: Checkpoint) -> int:
    """Of one call at batch 1; a multiply-add counts as two."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        checkpoint.denoiser(torch.zeros(1, *checkpoint.shape), torch.tensor([500]))
    return int(counter.get_total_flops())


def variants(path: Path) -> dict[str, tuple[bytes | str, str]]:
    """The one graph and what was tried on it: model and optimisation level."""
    return {
        "one graph": (str(path), "ALL"),
        "one graph, no blocked layout": (str(path), "EXTENDED"),
        "one graph, layer norm": (with_layer_norm(path), "ALL"),
    }


def candidates(model: Path, bundle: Bundle, any_device: Bundle, checkpoint: Checkpoint) -> dict[str, Call]:
    plan = checkpoint.plan_for(STEPS, sampler="ddim")
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, *checkpoint.shape, generator=generator)
    feeds = {"noise": noise.numpy()}
    sampler = sampler_of(checkpoint, plan)
    per_step = per_step_session(checkpoint, plan, 1, torch.get_num_threads())

    def eager() -> NDArray[Any]:
        with torch.inference_mode():
            image: NDArray[Any] = sampler(noise).numpy()
        return image

    def graph(source: bytes | str, level: str) -> Call:
        opened = session(source, level)
        return lambda: opened.run(None, feeds)[0]

    graphs = {name: graph(*source) for name, source in variants(bundle.artefact_path).items()}
    graphs["one graph for any device"] = graph(str(any_device.artefact_path), "ALL")
    return {
        "one graph": graphs.pop("one graph"),
        "diffusers pipeline": pipeline_call(model),
        "torch eager": eager,
        "per-step session": lambda: per_step(feeds),
        **graphs,
        "sgemm in onnxruntime": onnxruntime_gemm(GEMMS["sgemm in onnxruntime"]),
        "sgemm in torch": torch_gemm(GEMMS["sgemm in torch"]),
    }


def measure_model(name: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        model = MODELS[name](Path(scratch) / "model", "v_prediction")
        bundle, any_device = (
            build(
                BuildOptions(
                    str(model), "onnx", Path(scratch) / f"bundle-{device}", steps=STEPS, sampler="ddim", verify=False,
                    of_target=TargetOptions(device=device),
                )
            )
            for device in ("cpu", None)
        )  # fmt: skip
        checkpoint = load_checkpoint(str(model))
        calls = candidates(model, bundle, any_device, checkpoint)
        expected = calls["one graph"]()
        errors = {key: float(np.abs(call() - expected).max()) for key, call in calls.items() if key not in GEMMS}
        report = measure(calls, rounds, warmup=10, rest=0.1)
        flops = STEPS * network_flops(checkpoint)
        graphs = variants(bundle.artefact_path) | {"one graph for any device": (str(any_device.artefact_path), "ALL")}
        found = {key: reorders(*source) for key, source in graphs.items()}
    rates = {key: 2 * size**3 / min(report.seconds[key]) for key, size in GEMMS.items()}
    rates["one graph"] = flops / min(report.seconds["one graph"])
    fraction = rates["one graph"] / max(rates[key] for key in GEMMS)
    result = {
        "rounds": rounds,
        "takes": {key: vars(report.ratio(key, "one graph")) for key in calls if key not in ("one graph", *GEMMS)},
        "largest_difference": errors,
        "reorders": found,
        "operations": flops,
        "best_gflops": {key: round(rate / 1e9, 1) for key, rate in rates.items()},
        "fraction_of_sgemm_roofline": round(fraction, 3),
    }
    print(name, result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    arguments = parser.parse_args()
    results = {name: measure_model(name, arguments.rounds) for name in MODELS}
    write_result(arguments.out, "benchmarks/speed.py", {"steps": STEPS, "models": results})


if __name__ == "__main__":
    main()
