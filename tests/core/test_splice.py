"""Parts put in the places of the operator that stands for them: the same numbers, weights once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmd_export.torch_compilers.executorch import DECODER, NETWORK, lowered
from mmd_export.torch_compilers.splice import splice


class Outer(nn.Module):
    """Two calls of the network with different constants, then the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.tensor([0.5]))
        self.register_buffer("second", torch.tensor([-2.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = lowered([x, self.first], NETWORK, list(x.shape))
        y = x - 0.25 * lowered([y, self.second], NETWORK, list(x.shape))
        image: Tensor = lowered([y], DECODER, [x.shape[0], 2, *x.shape[2:]])
        return image.clamp(-1.0, 1.0)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        output: Tensor = self.layer(x) * time
        return output


def test_it_is_the_chain_of_its_parts() -> None:
    torch.manual_seed(0)
    network, decoder, x = Network().eval(), nn.Conv2d(1, 2, 1).eval(), torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        parts = {
            NETWORK: torch.export.export(network, (x, torch.ones(1))),
            DECODER: torch.export.export(decoder, (x,)),
        }
        outer = torch.export.export(Outer(), (x,), strict=False)
        whole = splice(outer, parts, lowered._opoverload)
        y = x - 0.25 * network(network(x, torch.tensor([0.5])), torch.tensor([-2.0]))
        torch.testing.assert_close(whole.module()(x), decoder(y).clamp(-1.0, 1.0), rtol=0, atol=0)
    assert set(whole.state_dict) == {
        "first", "second", "network.layer.weight", "network.layer.bias", "decoder.weight", "decoder.bias"
    }  # fmt: skip
    placeholders = [node for node in whole.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(whole.graph_signature.input_specs) == 7
    assert all(node.target is not lowered._opoverload for node in whole.graph.nodes)
