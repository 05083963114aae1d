"""The reader and the op rules of reference evaluation, against torch, exact answers and damaged bytes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmd_runtime.mil import blobs
from mmd_runtime.mil.blobs import Blobs, tensor, unpacked
from mmd_runtime.mil.evaluate import RULES, Evaluator, UnknownOpError
from mmd_runtime.mil.program import Op, Program, Ref, Type
from mmd_runtime.mil.wire import MalformedError, Message

DRAW = np.random.default_rng(0)
F: Any = functional  # called with lists of tensors, which its annotations do not foresee


def of(dtype: Any, values: Any) -> Any:
    return np.array(values, dtype)


def normal(*shape: int) -> Any:
    return DRAW.standard_normal(shape).astype(np.float32)


def tensors(*arrays: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def close(actual: Any, expected: torch.Tensor, atol: float = 2e-6) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=atol)


# --- rules against torch


@pytest.mark.parametrize(
    ("shape", "kernel", "settings"),
    [
        ((2, 3, 9, 8), (5, 3, 3, 3), {"stride": 1, "padding": 1}),
        ((2, 3, 9, 8), (5, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
        ((1, 4, 9, 8), (6, 2, 3, 3), {"stride": 2, "padding": 0, "groups": 2}),
        ((1, 4, 11, 8), (6, 4, 3, 3), {"padding": 2, "dilation": 2}),
        ((2, 4, 6, 5), (3, 4, 1, 1), {}),
        ((2, 4, 9), (3, 4, 3), {"padding": 1}),
    ],
)
def test_conv(shape: tuple[int, ...], kernel: tuple[int, ...], settings: dict[str, Any]) -> None:
    x, weight, bias = normal(*shape), normal(*kernel), normal(kernel[0])
    spatial = len(shape) - 2
    pairs = {key: np.broadcast_to(settings.get(key, default), spatial) for key, default in DEFAULTS.items()}
    args = {
        "x": x, "weight": weight, "bias": bias, "pad_type": "custom", "pad": np.repeat(pairs["padding"], 2),
        "strides": pairs["stride"], "dilations": pairs["dilation"], "groups": settings.get("groups", 1),
    }  # fmt: skip
    call = F.conv1d if spatial == 1 else F.conv2d
    close(RULES["conv"](args), call(*tensors(x, weight, bias), **settings), 1e-5)


DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}


@pytest.mark.parametrize("size", [7, 8])
def test_conv_that_keeps_its_size(size: int) -> None:
    x, weight = normal(1, 2, size, size), normal(3, 2, 3, 3)
    given = {"x": x, "weight": weight, "strides": [1, 1]}
    expected = F.conv2d(*tensors(x, weight), padding="same")
    close(RULES["conv"](given | {"pad_type": "same"}), expected, 1e-5)
    inside = RULES["conv"](given | {"pad_type": "valid"})
    close(inside, expected[:, :, 1:-1, 1:-1], 1e-5)
    assert RULES["conv"](given | {"pad_type": "same", "strides": [2, 2]}).shape == (1, 3, 4, 4)


def test_products() -> None:
    x, y, bias = normal(2, 3, 4), normal(2, 5, 4), normal(5)
    close(RULES["matmul"]({"x": x, "y": y, "transpose_y": True}), torch.from_numpy(x) @ torch.from_numpy(y).mT)
    close(RULES["linear"]({"x": x, "weight": y[0], "bias": bias}), F.linear(*tensors(x, y[0], bias)))
    q, k, v, mask = normal(2, 3, 4), normal(2, 5, 4), normal(2, 5, 6), normal(3, 5)
    given = {"query": q, "key": k, "value": v, "attn_mask": mask}
    expected = F.scaled_dot_product_attention(*tensors(q, k, v), attn_mask=torch.from_numpy(mask))
    close(RULES["scaled_dot_product_attention"](given), expected)


def test_norms() -> None:
    x, gamma, beta = normal(2, 3, 4, 5) + 2, normal(3), normal(3)
    close(
        RULES["layer_norm"]({"x": x, "axes": [2, -1], "epsilon": np.float32(1e-3)}),
        F.layer_norm(torch.from_numpy(x), (4, 5), eps=1e-3),
    )
    wide = normal(5)
    close(
        RULES["layer_norm"]({"x": x, "axes": [-1], "gamma": wide, "beta": wide, "epsilon": 1e-5}),
        F.layer_norm(torch.from_numpy(x), (5,), *tensors(wide, wide)),
    )
    scaled = {"x": x, "gamma": gamma, "beta": beta, "epsilon": 1e-5}
    close(RULES["instance_norm"](scaled), F.instance_norm(torch.from_numpy(x), None, None, *tensors(gamma, beta)))
    mean, variance = normal(3), normal(3) ** 2
    expected = F.batch_norm(*tensors(x, mean, variance, gamma, beta))
    close(RULES["batch_norm"](scaled | {"mean": mean, "variance": variance}), expected, 1e-5)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("silu", F.silu), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("relu", F.relu), ("exp", torch.exp),
        ("gelu", F.gelu), ("erf", torch.erf), ("softplus", F.softplus), ("square", torch.square), ("sin", torch.sin),
        ("softmax", lambda x: torch.softmax(x, -1)), ("round", torch.round),
    ],
)  # fmt: skip
def test_elementwise(kind: str, call: Any) -> None:
    x = 3 * normal(4, 50)
    close(RULES[kind]({"x": x}), call(torch.from_numpy(x)))


def test_other_formulas() -> None:
    x = normal(2, 3, 4, 6)
    tanh = {"x": x, "mode": "TANH_APPROXIMATION"}
    close(RULES["gelu"](tanh), F.gelu(torch.from_numpy(x), approximate="tanh"))
    pooled = {"x": x, "kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "valid"}
    close(RULES["avg_pool"](pooled), F.avg_pool2d(torch.from_numpy(x), 2))
    up = {"x": x, "scale_factor_height": np.float32(2), "scale_factor_width": np.float32(3)}
    close(RULES["upsample_nearest_neighbor"](up), F.interpolate(torch.from_numpy(x), scale_factor=(2.0, 3.0)))
    sized = {"x": x, "target_size_height": 7, "target_size_width": 9}
    close(RULES["resize_nearest_neighbor"](sized), F.interpolate(torch.from_numpy(x), size=(7, 9)))
    close(RULES["reduce_mean"]({"x": x, "axes": [1, -1], "keep_dims": True}), torch.from_numpy(x).mean((1, -1), True))
    close(RULES["pad"]({"x": x, "pad": [1, 2, 0, 3], "mode": "constant"}), F.pad(torch.from_numpy(x), (0, 3, 1, 2)))


def test_values_that_move() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(RULES["reshape"]({"x": x, "shape": [0, -1]}), x.reshape(2, 12))
    np.testing.assert_array_equal(RULES["transpose"]({"x": x, "perm": [2, 0, 1]}), x.transpose(2, 0, 1))
    assert RULES["expand_dims"]({"x": x, "axes": [0, -1]}).shape == (1, 2, 3, 4, 1)
    assert RULES["squeeze"]({"x": x[:1], "axes": [0]}).shape == (3, 4)
    np.testing.assert_array_equal(RULES["concat"]({"values": [x, x], "axis": 1}), np.concatenate([x, x], 1))
    first, second = RULES["split"]({"x": x, "split_sizes": [1, 3], "axis": 2})
    np.testing.assert_array_equal(np.concatenate([first, second], 2), x)
    assert [part.shape for part in RULES["split"]({"x": x, "num_splits": 3, "axis": 1})] == [(2, 1, 4)] * 3
    cut = {"x": x, "begin": [1, 0, 3], "end": [0, 0, 0], "stride": [1, 2, -2]}
    cut |= {"begin_mask": [False, True, False], "end_mask": [False, True, True], "squeeze_mask": [True, False, False]}
    np.testing.assert_array_equal(RULES["slice_by_index"](cut), x[1, ::2, 3::-2])
    np.testing.assert_array_equal(RULES["reverse"]({"x": x, "axes": of(np.int32, [1])}), x[:, ::-1])
    np.testing.assert_array_equal(RULES["reverse"]({"x": x}), x[::-1, ::-1, ::-1])
    np.testing.assert_array_equal(RULES["slice_by_size"]({"x": x, "begin": [0, 1, 0], "size": [2, 1, -1]}), x[:, 1:2])
    np.testing.assert_array_equal(RULES["gather"]({"x": x, "indices": of(np.int32, [2, 0]), "axis": 1}), x[:, [2, 0]])
    with pytest.raises(MalformedError, match="index 3 of gather is outside of 3 rows"):
        RULES["gather"]({"x": x, "indices": of(np.int32, [3]), "axis": 1})


# --- half precision


def test_products_of_half_precision_are_summed_wide_and_rounded_once() -> None:
    x, y = normal(4, 600).astype(np.float16), normal(600, 4).astype(np.float16)
    result = RULES["matmul"]({"x": x, "y": y})
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result, (x.astype(np.float32) @ y.astype(np.float32)).astype(np.float16))


@pytest.mark.parametrize("kind", ["layer_norm", "instance_norm"])
def test_a_norm_overflows_in_half_precision_and_stays_finite(kind: str) -> None:
    x = 2000 * normal(1, 2, 30)
    args: dict[str, Any] = {"epsilon": np.float32(1e-5)} | ({"axes": [2]} if kind == "layer_norm" else {})
    right = RULES[kind](args | {"x": x})
    wrong = RULES[kind](args | {"x": x.astype(np.float16)})
    assert wrong.dtype == np.float16
    assert np.isfinite(wrong).all()
    assert np.abs(right).max() > 1
    assert np.abs(wrong).max() < 1e-3


def test_a_mixture_of_types_is_widened_as_numpy_does() -> None:
    assert RULES["add"]({"x": of(np.float16, [1]), "y": of(np.float32, [1])}).dtype == np.float32
    assert RULES["cast"]({"x": of(np.float32, [1e6, 0.1]), "dtype": "fp16"}).tolist() == [np.inf, np.float16(0.1)]


# --- weights of less than 16 bits


def test_packed_numbers() -> None:
    data = np.array([0b01_10_11_00, 0b11], np.uint8)  # the example of the MIL reference
    assert unpacked(data, 2, 5).tolist() == [0, 3, 2, 1, 3]
    values = np.arange(64, dtype=np.uint8)
    bits = np.unpackbits(values[:, None], axis=1, bitorder="little")[:, :6]
    assert unpacked(np.packbits(bits, bitorder="little"), 6, 64).tolist() == values.tolist()
    assert tensor(np.array([0x8F], np.uint8), "int4", (2,), "").tolist() == [-1, -8]


def test_weights_of_few_bits() -> None:
    table = np.array([1.0, 5.0, 9.0, 13.0], np.float16)
    packed = {"indices": np.array([0b01_10_11_00, 0b11], np.uint8), "lut": table, "shape": of(np.uint32, [5])}
    assert RULES["constexpr_lut_to_dense"](packed).tolist() == [1, 13, 9, 5, 13]
    tables = np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float16).reshape(2, 1, 4, 1)
    indices = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], np.uint8).reshape(6, 2)
    dense = RULES["constexpr_lut_to_dense"]({"indices": indices, "lut": tables})
    assert dense.tolist() == [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]
    data, scale = of(np.int8, [[1, -2], [3, 4]]), of(np.float16, [0.5, 2])
    zero = of(np.int8, [0, 1])
    affine = {"quantized_data": data, "scale": scale, "zero_point": zero, "axis": 0}
    assert RULES["constexpr_affine_dequantize"](affine).tolist() == [[0.5, -1], [4, 6]]
    by_block = {"data": of(np.int8, [[1, 2, 3, 4]]), "scale": of(np.float16, [[1, 10]])}
    assert RULES["constexpr_blockwise_shift_scale"](by_block).tolist() == [[1, 2, 30, 40]]


# --- files


def storage(path: Path, data: bytes, kind: int = 2, sentinel: int = 0xDEADBEEF, version: int = 2) -> Path:
    header = struct.pack("<II", 1, version).ljust(64, b"\0")
    record = struct.pack("<IIQQQ", sentinel, kind, len(data), 128, 0).ljust(64, b"\0")
    path.write_bytes(header + record + data)
    return path


def test_blobs(tmp_path: Path) -> None:
    values = normal(3, 4)
    found = Blobs(storage(tmp_path / "weight.bin", values.tobytes())).read(64, "fp32", (3, 4))
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("changes", "offset", "message"),
    [
        ({"kind": 1}, 64, "holds fp16, the program says fp32"),
        ({"sentinel": 7}, 64, "starts with 0x7, not 0xdeadbeef"),
        ({"version": 1}, 64, "no blob storage of version 2"),
        ({"data": b"\0" * 44}, 64, "has 44 bytes, fp32 .* takes 48"),
        ({}, 4096, "lies behind the end"),
    ],
)
def test_damaged_blobs(tmp_path: Path, changes: dict[str, Any], offset: int, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        Blobs(storage(tmp_path / "weight.bin", **{"data": b"\0" * 48, **changes})).read(offset, "fp32", (3, 4))


def test_wire() -> None:
    data = bytes.fromhex("08 96 01 12 03 61 62 63 1a 04 01 ff ff 03 22 02 08 05".replace(" ", ""))
    message = Message(memoryview(data))
    assert message.number(1) == 150
    assert message.text(2) == "abc"
    assert message.integers(3) == [1, 65535]
    nested = message.message(4)
    assert nested is not None
    assert nested.number(1) == 5
    assert message.number(9, 7) == 7
    assert Message(memoryview(b"\x08" + b"\xff" * 9 + b"\x01")).integers(1) == [-1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x12\x05ab", "behind the end of its message"),
        (b"\x08\xff", "ends within a number"),
        (b"\x08" + b"\xff" * 11, "more than ten bytes"),
        (b"\x0b", "wire type 3 is unknown"),
        (b"\x0d\x00", "fixed field ends behind"),
    ],
)
def test_damaged_wire(data: bytes, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        Message(memoryview(data))


# --- the evaluator


PAIR = Type("fp32", (2,))


def add_one(kind: str = "add", declared: Type = PAIR) -> Program:
    one = Op("const", "one", {}, (("one", PAIR),), {"val": np.ones(2, np.float32)})
    ops = [one]
    for name, source in (("a", "x"), ("b", "a")):
        ops.append(Op(kind, name, {"x": (Ref(source),), "y": (Ref("one"),)}, ((name, declared),), {}))
    return Program(8, "CoreML7", {"x": PAIR}, ("b",), tuple(ops), ())


def test_it_runs_from_inputs_or_from_values_in_between() -> None:
    evaluator = Evaluator(add_one())
    x = of(np.float32, [0, 1])
    results = evaluator.run({"x": x}, ["b", "a"])
    assert {name: value.tolist() for name, value in results.items()} == {"a": [1, 2], "b": [2, 3]}
    assert evaluator.run({"a": 10 * x}, ["b"])["b"].tolist() == [1, 11]
    with pytest.raises(MalformedError, match="'x' is given by no op and no input"):
        evaluator.run({}, ["b"])


def test_it_holds_ops_to_what_they_declare() -> None:
    for declared in (Type("fp32", (3,)), Type("fp16", (2,))):
        with pytest.raises(MalformedError, match=r"op 'a' \(add\) gives 'a' as float32 \(2,\), it declares fp"):
            Evaluator(add_one(declared=declared)).run({"x": np.zeros(2, np.float32)}, ["b"])
    with pytest.raises(UnknownOpError, match="op 'a' is 'gru'"):
        Evaluator(add_one("gru"))


def test_every_type_of_the_format_has_a_size() -> None:
    assert set(blobs._TYPES.values()) <= blobs.NUMPY.keys() | blobs.BITS.keys()
