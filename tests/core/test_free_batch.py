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
from mmd_export.errors import UsageError
from mmd_export.program import SamplerProgram, export_program
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan
from mmd_export.targets import CompileOptions, get_target
from mmd_export.unroll import UnrolledSampler

SHAPE = (1, 4, 4)


def wave(timestep: Tensor, images: int) -> Tensor:
    """(images,), a number of the timestep."""
    return torch.sin(timestep.to(torch.get_default_dtype()) + 1).expand(images)


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


class GuidedTokens(TimeAsToken):
    """The rows of the folded token are those of both halves, and lie in its second dimension."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        a, b = super().forward(torch.cat([x, x.flip(3)]), timestep).chunk(2)
        return a + 2 * (a - b)


class TimeAsContext(nn.Module):
    """Keys and values are of the time alone, and become rows of each head by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        context = wave(timestep, x.shape[0]).reshape(-1, 1, 1) * torch.linspace(-1, 1, 12).reshape(3, 4)
        seen: Tensor = self.attention(x.reshape(-1, 4, 4), context, context)[0]
        return seen.reshape(x.shape)


class GuidedByTime(nn.Module):
    """Each half has its own number beside the time: its rows differ, half after half."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.unknown = (nn.Parameter(torch.zeros(1, 1, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = wave(timestep, x.shape[0]).reshape(-1, 1, 1, 1)
        both = torch.exp(torch.cat([time + self.known, time + self.unknown]))
        a, b = (torch.cat([x, x.flip(3)]) * both).chunk(2)
        return a + 2 * (a - b)


class Places(nn.Module):
    """Each image is four rows of its own place: rows differ, image after image."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 4, 4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = wave(timestep, x.shape[0]).reshape(-1, 1, 1)
        return (x.reshape(-1, 4) * (time + self.places).reshape(-1, 4)).reshape(x.shape)


class MixedOperands(nn.Module):
    """No operand has the shape of the result but through the time."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = wave(timestep, x.shape[0]).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        scaled = torch.addcmul(time, x, 1 + time)  # as adaptive layer norm is often written
        return torch.cat([x.mean() * time, torch.lerp(scaled, time, 0.25)], 1).sum(1, keepdim=True)


class FilledInPlace(nn.Module):
    """The textbook's embedding, written into an empty one; the state is added to it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        embedding = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        embedding[:, 0::2] = wave(timestep, x.shape[0])[:, None]
        embedding[:, 1::2] = torch.cos(wave(timestep, x.shape[0]))[:, None]
        time: Tensor = self.linear(embedding)
        time.add_(x.flatten(1))
        time[:, 8:] += x.flatten(1)[:, :8]
        return time.reshape(x.shape)


class GuidedForATime(GuidedByTime):
    """Guidance in the late steps alone: in the first its rows are equal."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = wave(timestep, x.shape[0]).reshape(-1, 1, 1, 1)
        late = (timestep < 250).to(x.dtype)
        both = torch.exp(torch.cat([time + late * self.known, time]))
        a, b = (torch.cat([x, x.flip(3)]) * both).chunk(2)
        return a + 2 * (a - b)


class GuidedNorm(nn.Module):
    """Scale and shift of each half, taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.unknown = (nn.Parameter(torch.zeros(1, 2)) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = wave(timestep, x.shape[0])[:, None]
        scale, shift = torch.cat([time + self.known, time + self.unknown]).chunk(2, dim=1)
        both = torch.cat([x, x.flip(3)]) * scale[..., None, None] + shift[..., None, None]
        a, b = both.chunk(2)
        return a + 2 * (a - b)


class Masked(GuidedByTime):
    """What must not be seen is minus infinity, of all rows."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = wave(timestep, x.shape[0]).reshape(-1, 1, 1, 1)
        bias = torch.cat([time + self.known, time + self.unknown]).expand(-1, 1, 1, 4)
        bias = bias.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)
        both = torch.softmax(torch.cat([x, x.flip(3)]) * torch.exp(bias) + bias, -1)
        a, b = both.chunk(2)
        return a + 2 * (a - b)


class Switched(nn.Module):
    """What the time decides is a yes or a no."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.where((timestep.expand(x.shape[0]) > 250).reshape(-1, 1, 1, 1), x, torch.tanh(x))


class Padded(nn.Module):
    """The state is written into what depends on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        wide = torch.zeros(x.shape[0], 1, 6, 6, dtype=x.dtype)
        wide[:, :, 1:-1, 1:-1] = x
        y: Tensor = self.conv(wide) * wave(timestep, 1)
        return y


class OneMore(nn.Module):
    """A row more than there are images, whose mean it adds."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = wave(timestep, x.shape[0] + 1).reshape(-1, 1, 1, 1)
        rows = torch.cat([x.mean((1, 2, 3), keepdim=True) * 0, time]).sum(0, keepdim=True)
        return x * rows / (x.shape[0] + 1)


class TokensFirst(nn.Module):
    """Two values of the time, equal for all tokens, in one product: each has the shape of the result, nothing else."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        tokens = x.reshape(x.shape[0], 4, 4).permute(1, 0, 2)
        time = (wave(timestep, x.shape[0]).reshape(1, -1, 1) * torch.linspace(-1, 1, 4)).expand(4, -1, -1)
        tokens = torch.addcmul(time, tokens.mean((0, 2), keepdim=True), 2 * time)
        return tokens.permute(1, 0, 2).reshape(x.shape)


NETWORKS: dict[str, nn.Module] = {
    "channel": TimeAsChannel(),
    "token": TimeAsToken(),
    "matrix": TimeAsMatrix(),
    **{how: Guided(how) for how in ("chunk", "split", "sizes", "tensor_split")},
    "guided tokens": GuidedTokens(),
    "context": TimeAsContext(),
    "guided by time": GuidedByTime(),
    "places": Places(),
    "guided for a time": GuidedForATime(),
    "guided norm": GuidedNorm(),
    "masked": Masked(),
    "mixed operands": MixedOperands(),
    "one more": OneMore(),
    "padded": Padded(),
    "switched": Switched(),
    "tokens first": TokensFirst(),
    "filled in place": FilledInPlace(),
}
# The folded values of one call: of one image, whatever the batch.
FOLDED = {
    "channel": [(1, 1, 4, 4)],
    "token": [(1, 1, 4)],
    "matrix": [(1, 4, 4)],
    "guided tokens": [(1, 1, 4)],
    "context": [(3, 1, 4), (3, 1, 4)],
    "guided by time": [(1, 1, 1, 1), (1, 1, 1, 1)],
    "places": [(1, 4, 4)],
    "guided for a time": [(1, 1, 1, 1), (1, 1, 1, 1)],
    "guided norm": [(1, 2), (1, 2)],
    "masked": [(1, 1, 1, 1), (1, 1, 1, 1)],
    "mixed operands": [(1, 1, 4, 4), (1, 1, 4, 4)],
    "one more": [(1,)],
    "padded": [(1,)],
    "switched": [(1, 1, 1, 1)],
    "tokens first": [(4, 1, 4), (4, 1, 4)],
    "filled in place": [(1, 16)],
}


@pytest.fixture(scope="module", params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    for weight in NETWORKS[name].parameters():
        nn.init.normal_(weight, std=0.3)
    return NETWORKS[name].eval()


def program_of(network: nn.Module, batch: int | None) -> SamplerProgram:
    return export_program(network, make_plan(SchedulerConfig(prediction_type="v_prediction"), 2), SHAPE, batch)


@pytest.fixture(scope="module")
def program(network: nn.Module) -> SamplerProgram:
    return program_of(network, None)


def assert_the_same(program: SamplerProgram, network: nn.Module, batch: int) -> None:
    """Every call again after the other: nothing of one is left in the next."""
    x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))
    plain, runner = AtTimesteps(network, program.plan.timesteps), program.runner()
    with torch.no_grad():
        for k in (1, 0, 1):
            torch.testing.assert_close(program.denoiser(x, k), plain(x, k), rtol=0, atol=1e-6)
            torch.testing.assert_close(runner(x, k), plain(x, k), rtol=0, atol=1e-6)
        assert float((plain(x, 0) - plain(x, 1)).abs().max()) > 1e-3  # the timestep matters


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_captured_call_is_the_network(network: nn.Module, program: SamplerProgram, batch: int) -> None:
    assert_the_same(program, network, batch)


def test_of_one_batch_size_too(network: nn.Module) -> None:
    assert_the_same(program_of(network, 3), network, 3)


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


def test_names_of_weights_may_be_alike_or_no_names_of_python() -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.SiLU(), nn.Conv2d(1, 1, 1))
            self.conv_1 = nn.Conv2d(1, 1, 1)
            self.parts = nn.ModuleDict({"a-b": nn.Conv2d(1, 1, 1)})

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            y: Tensor = self.parts["a-b"](self.conv(x) + self.conv_1(x) * wave(timestep, 1))
            return y

    network = Alike().eval()
    program = program_of(network, None)
    assert_the_same(program, network, 2)
    assert set(program.step.state_dict) == {name for name, _ in network.named_parameters()}


def test_a_shared_weight_is_one_input() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 1, 3, padding=1)
            self.last = self.first

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            y: Tensor = self.last(torch.relu(self.first(x)) * wave(timestep, 1))
            return y

    network = Tied().eval()
    program = program_of(network, None)
    assert_the_same(program, network, 2)
    assert len(program.step.state_dict) == 2


def test_what_a_static_graph_cannot_be_told_is_one_line() -> None:
    class OfANumber(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x * timestep.item()

    class OfTimeAlone(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return wave(timestep, x.shape[0]).reshape(-1, 1, 1, 1).expand(x.shape)

    with pytest.raises(
        UsageError, match=r"reads the timestep as a Python number \(item\); compute with it as a tensor"
    ):
        program_of(OfANumber(), None)
    with pytest.raises(UsageError, match="output does not depend on its input x"):
        program_of(OfTimeAlone(), None)
