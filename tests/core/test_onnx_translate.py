"""Translation to ONNX changes no number: what an optimiser may drop, and what it may not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mmd_export.errors import NotAvailableError
from mmd_export.onnx_translate import translate

X = torch.linspace(-1.0, 1.0, 12).reshape(1, 1, 3, 4)


class Expression(nn.Module):
    """A module out of one expression of x."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return {
            "tiny epsilon": lambda: x / (torch.relu(x) * 0.0 + 1e-15) * 1e-15,
            "nearly one": lambda: (x * 1.000001 - x) * 1e6,
            "neutral": lambda: torch.relu((x * 1.0) / 1.0 + 0.0 - 0.0),
            "there and back": lambda: torch.relu(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
            "casts": lambda: torch.relu(x.to(torch.float32).to(torch.float32)),
        }[self.name]()


def translated(name: str) -> tuple[ir.Model, Tensor]:
    module = Expression(name).eval()
    with torch.no_grad():
        return translate(torch.export.export(module, (X,), strict=False)), module(X)


@pytest.mark.parametrize("name", ["tiny epsilon", "nearly one", "neutral", "there and back", "casts"])
def test_it_computes_what_torch_computes(name: str) -> None:
    model, expected = translated(name)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {model.graph.inputs[0].name: X.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["neutral", "there and back", "casts"])
def test_what_changes_nothing_is_gone(name: str) -> None:
    model, _ = translated(name)
    assert [node.op_type for node in model.graph] == ["Relu"]


def test_a_number_that_is_only_nearly_neutral_stays() -> None:
    model, _ = translated("nearly one")
    assert [node.op_type for node in model.graph].count("Mul") == 2


def test_an_operator_that_torch_onnx_lacks_is_named_in_one_line() -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = torch.special.bessel_j0(x)
            return found

    program = torch.export.export(Bessel(), (torch.zeros(2, 2),))
    with pytest.raises(NotAvailableError, match=r"^torch.onnx cannot translate it: .*bessel_j0") as error:
        translate(program)
    assert "\n" not in str(error.value)
