"""Draw images on a Triton server from the bundle in ``models/``, or prove that it answers as the reference does."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmd_export.bundle import Bundle
from mmd_export.errors import MmdExportError, NotAvailableError, UsageError, one_line
from mmd_export.pictures import save_grid
from mmd_export.triton_config import model_name, tensor_shapes
from mmd_runtime.app import Sampler

MODELS = Path(__file__).parent / "models"
DTYPES = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8"}
WAITS = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between tries, where a full queue refused a request


class TritonSession:
    """The model of a bundle on a server, asked for one batch at a time."""

    def __init__(self, bundle: Bundle, url: str) -> None:
        try:
            self._grpc: Any = importlib.import_module("tritonclient.grpc")
        except ImportError as error:
            raise NotAvailableError(f"no client of Triton here ({error}); pip install -r requirements.txt") from error
        self._name, self._url, self._shapes = model_name(bundle.manifest), url, tensor_shapes(bundle.manifest)
        self._client = self._grpc.InferenceServerClient(url)
        try:
            self._check(bundle, self._client.get_model_metadata(self._name))
        except self._grpc.InferenceServerException as error:
            raise NotAvailableError(
                f"no model {self._name} on a Triton server at {url}: {one_line(error)}; start the server on models/"
            ) from error

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of one batch; a request that a full queue refused is sent again."""
        given = [self._input(name, array) for name, array in inputs.items()]
        waits = iter(WAITS)
        while True:
            try:
                return {"sample": self._client.infer(self._name, given).as_numpy("sample")}
            except self._grpc.InferenceServerException as error:
                wait = next(waits, None) if "UNAVAILABLE" in str(error.status()) else None
                if wait is None:
                    raise MmdExportError(f"the server at {self._url} refused a request: {one_line(error)}") from error
                time.sleep(wait)

    def _input(self, name: str, array: NDArray[Any]) -> Any:
        """One input as the server wants it: labels (B,) go as (B, 1) where the server knows of the batch."""
        shaped = array.reshape(len(array), 1) if len(self._shapes[name]) > array.ndim else array
        given = self._grpc.InferInput(name, list(shaped.shape), DTYPES[array.dtype.name])
        given.set_data_from_numpy(np.ascontiguousarray(shaped))
        return given

    def _check(self, bundle: Bundle, found: Any) -> None:
        """Raise UsageError unless the server's model has the inputs and outputs of the bundle."""
        tensors = {each.name: (each.datatype, tuple(each.shape)) for each in (*found.inputs, *found.outputs)}
        specs = (*bundle.manifest.inputs, *bundle.manifest.outputs)
        says = {spec.name: (DTYPES[spec.dtype], self._shapes[spec.name]) for spec in specs}
        if tensors != says:
            raise UsageError(
                f"model {self._name} at {self._url} has {tensors}, the bundle says {says}; serve this project's models/"
            )


def only_bundle() -> Path:
    """The bundle of this project: the version folder of the one model in ``models/``."""
    found = sorted(MODELS.glob("*/1"))
    if len(found) != 1:
        raise UsageError(f"{MODELS} holds {len(found)} models, not one; choose with --bundle models/NAME/1")
    return found[0]


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 4 self-test failed, 5 bundle damaged, and the others of mmd-export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle folder (default: the one in models/)")
    parser.add_argument("--url", default="localhost:8001", help="host and port of the server's gRPC")
    parser.add_argument("--seed", type=int, default=0, help="image i of a seed is the same everywhere")
    parser.add_argument("--count", type=int, default=16, help="how many images")
    parser.add_argument("--class-label", type=int, help="what a model with classes is to draw")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="PNG file to write")
    parser.add_argument("--self-test", action="store_true", help="run the golden noise and compare")
    options = parser.parse_args(arguments)
    try:
        bundle = Bundle.open(options.bundle or only_bundle())
        sampler = Sampler(bundle, f"Triton at {options.url}", TritonSession(bundle, options.url))
        if options.self_test:
            report = sampler.self_test()
            print(report)
            return 0 if report.passed else 4
        label = options.class_label
        told = {} if label is None else {"class_labels": np.full(options.count, label, np.int64)}
        save_grid(sampler.sample(options.seed, options.count, conditions=told), options.out)
    except MmdExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.out}: {options.count} images of seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
