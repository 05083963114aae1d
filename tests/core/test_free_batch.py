"""Networks whose sizes follow a free batch in ways that do not broadcast: the same numbers for every batch size."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from mmd_export.batch import BatchSpec
from mmd_export.denoiser import AtTimesteps
from mmd_export.program import SamplerProgram, export_program
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan
from mmd_export.targets import CompileOptions, get_target
from mmd_export.unroll import UnrolledSampler

SHAPE = (1, 4, 4)


def wave(timestep: Tensor, images: int) -> Tensor:
    """(images,), a number of the timestep."""
    return torch.sin(timestep.to(torch.get_default_dtype())).expand(images)


class TimeAsChannel(nn.Module):
    """As of small networks: the time is one more channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = wave(timestep, x.shape[0]).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        y: Tensor = self.conv(torch.cat([x, time], 1))
        return y


class TimeAsToken(nn.Module):
    """As of U-ViT, tokens first: the time is one more token."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        tokens = x.reshape(x.shape[0], 4, 4).permute(1, 0, 2)
        time = wave(timestep, x.shape[0]).reshape(1, -1, 1).expand(1, -1, 4)
        tokens = torch.cat([time, tokens])
        seen: Tensor = self.attention(tokens, tokens, tokens)[0]
        return seen[1:].permute(1, 0, 2).reshape(x.shape)


class TimeAsMatrix(nn.Module):
    """Its matrix is one for each image."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        matrices = wave(timestep, x.shape[0]).reshape(-1, 1, 1) * torch.ones(1, 4, 4)
        return torch.bmm(x.reshape(-1, 4, 4), matrices).reshape(x.shape)


class Guided(TimeAsChannel):
    """Guidance inside the network, its halves taken apart by ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        both = torch.cat([x, x.flip(3)])
        time = wave(timestep, both.shape[0]).reshape(-1, 1, 1, 1)
        both = super().forward(both, timestep) / (2 + time)
        if self.how == "chunk":
            a, b = both.chunk(2)
        elif self.how == "split":
            a, b = both.split(x.shape[0])
        elif self.how == "sizes":
            a, b = both.split([x.shape[0], x.shape[0]], dim=0)
        else:
            a, b = both.tensor_split(2)
        return a + 2 * (a - b)


NETWORKS: dict[str, nn.Module] = {
    "channel": TimeAsChannel(),
    "token": TimeAsToken(),
    "matrix": TimeAsMatrix(),
    **{how: Guided(how) for how in ("chunk", "split", "sizes", "tensor_split")},
}


# The folded values of one call: of one image, whatever the batch.
FOLDED = {"channel": [(1, 1, 4, 4)], "token": [(1, 1, 4)], "matrix": [(1, 4, 4)]}


@pytest.fixture(scope="module", params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    for weight in NETWORKS[name].parameters():
        nn.init.normal_(weight, std=0.3)
    return NETWORKS[name].eval()


@pytest.fixture(scope="module")
def program(network: nn.Module) -> SamplerProgram:
    return export_program(network, make_plan(SchedulerConfig(prediction_type="v_prediction"), 2), SHAPE, None)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_captured_call_is_the_network(network: nn.Module, program: SamplerProgram, batch: int) -> None:
    x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))
    plain, runner = AtTimesteps(network, program.plan.timesteps), program.runner()
    with torch.no_grad():
        for k in range(2):
            torch.testing.assert_close(program.denoiser(x, k), plain(x, k), rtol=0, atol=1e-6)
            torch.testing.assert_close(runner(x, k), plain(x, k), rtol=0, atol=1e-6)
        assert float((plain(x, 0) - plain(x, 1)).abs().max()) > 1e-3  # the timestep matters


def test_the_time_path_is_folded_for_one_image(name: str, program: SamplerProgram) -> None:
    shapes = [tuple(value.shape) for value in program.constants(0)]
    assert shapes == FOLDED.get(name, [(1, 1, 4, 4), (1, 1, 1, 1)])


def test_the_graph_is_the_sampler_for_every_batch(network: nn.Module, program: SamplerProgram, tmp_path: Path) -> None:
    get_target("onnx").compile(program, tmp_path, CompileOptions(batch=BatchSpec.parse("1..5")))
    held = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not {op for op in held if "Sequence" in op}
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    sampler = UnrolledSampler(AtTimesteps(network, program.plan.timesteps), program.plan)
    for batch in (1, 2, 5):
        noise = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = sampler(noise)
        (sample,) = session.run(None, {"noise": noise.numpy()})
        torch.testing.assert_close(torch.from_numpy(sample), expected, rtol=0, atol=1e-5)
