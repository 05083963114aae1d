"""A bundle behind HTTP, with Ray Serve: images of a seed, drawn in batches with those of other requests.

``Api`` reads a request, checks it and writes the answer; ``Painter`` holds the model and draws. A painter that dies in
the middle of a request loses nothing: another one draws the same images again, as a seed says all about them.
"""

# No `from __future__ import annotations`: a method that Ray sends to a replica keeps of the globals only what its code
# names, so FastAPI could not look up there what its annotations name (Ray 2.60, FastAPI 0.165).

import argparse
import asyncio
import io
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: the service tells nobody of itself

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Histogram

from mmd_export.bundle import Bundle, Manifest
from mmd_export.conditions import outside
from mmd_export.errors import MmdExportError, ParityError, UsageError, one_line
from mmd_export.pictures import grid
from mmd_runtime.app import Sampler, open_bundle

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "serve.yaml"
TRIES = 5  # of a request whose painter died
BUSY = {"Retry-After": "1"}
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
Status = dict[str, str]
Arrays = dict[str, NDArray[Any]]


class Settings(BaseModel):
    """``args`` of ``serve.yaml``."""

    model_config = ConfigDict(extra="forbid")

    bundle: Path = Path("bundle")
    runtime: str | None = None
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    threads: int = Field(1, ge=0)
    batch_wait_seconds: float = Field(0.002, ge=0)
    fixed_batch: bool = False
    max_count: int = Field(64, ge=1)
    max_ongoing_requests: int = Field(32, ge=1)
    max_queued_requests: int = Field(128, ge=1)

    @property
    def folder(self) -> Path:
        """Of the bundle; a relative one lies beside this file."""
        return HERE / self.bundle


class Wanted(BaseModel):
    """What a request asks for: images ``first`` ... ``first + count - 1`` of ``seed``."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(0, ge=0, lt=2**64)
    count: int = Field(1, ge=1)
    first: int = Field(0, ge=0, lt=2**32)
    class_label: int | None = Field(None, ge=0, lt=2**63)
    format: Literal["png", "npz", "raw"] = "png"


class WantedWithConditions(Wanted):
    """The same as JSON, with inputs that no address can hold: for each, the value that all images share."""

    conditions: dict[str, Any] = {}


@dataclass(frozen=True)
class Order:
    """A request that was checked. ``conditions``: inputs besides noise, one row each."""

    seed: int
    count: int
    first: int
    conditions: Arrays


class RefusedError(Exception):
    """An answer that is one line and a status."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(status, line)
        self.status, self.line = status, " ".join(line.split())


def one_order(wanted: Wanted, manifest: Manifest, max_count: int) -> Order:
    """Compare the request with what the graph takes; RefusedError says what, both values and the next move."""
    if wanted.count > max_count:
        raise RefusedError(422, f"count is {wanted.count}, this service draws up to {max_count} a request; ask again")
    given = dict(wanted.conditions) if isinstance(wanted, WantedWithConditions) else {}
    if wanted.class_label is not None:
        given["class_labels"] = wanted.class_label
    specs = {spec.name: spec for spec in manifest.inputs if spec.name not in ("noise", "step_noise")}
    for name in sorted(set(given) ^ set(specs)):
        what = "missing" if name in specs else "unknown"
        raise RefusedError(422, f"condition {name} is {what}, bundle {manifest.name} takes {sorted(specs) or 'none'}")
    rows = {}
    for name, spec in specs.items():
        row, shape = as_array(name, given[name]), tuple(spec.shape[1:])
        if row.dtype.kind not in ("if" if spec.dtype == "float32" else "i"):
            raise RefusedError(422, f"condition {name} is {row.dtype.name}, the graph takes {spec.dtype}")
        if row.shape != shape or not np.isfinite(row).all():
            raise RefusedError(422, f"condition {name} has shape {row.shape}, the graph takes finite {shape}")
        if found := outside(row, spec.below):
            raise RefusedError(422, "condition {} holds {}, the graph knows {}".format(name, *found))
        rows[name] = row[np.newaxis].astype(spec.dtype)
    return Order(wanted.seed, wanted.count, wanted.first, rows)


def as_array(name: str, value: Any) -> NDArray[Any]:
    """Numbers of JSON as an array; RefusedError if they are none, or lists of different lengths."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise RefusedError(422, f"condition {name} is no array: {error}") from None


class Painter:
    """Holds the model. Images of all requests that wait are drawn together, as many as the graph takes."""

    def __init__(self, settings: Settings) -> None:
        self._sampler = open_bundle(settings.folder, settings.runtime, settings.threads)
        self._fixed = settings.fixed_batch
        if not (report := self._sampler.self_test(rounds=1)).passed:
            raise ParityError(str(report))
        batched: Any = self._one  # the decorator's own type leaves out what it adds
        batched.set_max_batch_size(self._sampler.bundle.manifest.batch.largest)
        batched.set_batch_wait_timeout_s(settings.batch_wait_seconds)

    async def draw(self, order: Order) -> NDArray[Any] | str:
        """The images of an order, as the graph gives them, or why there are none.

        Each image goes into whatever batch comes next.
        """
        parts = await asyncio.gather(*(self._one((order, order.first + i)) for i in range(order.count)))
        errors = [str(part) for part in parts if isinstance(part, MmdExportError)]
        return errors[0] if errors else np.concatenate([part for part in parts if isinstance(part, np.ndarray)])

    async def self_test(self) -> tuple[bool, str]:
        """Whether the golden noise gives the golden images, and the line that says so."""
        report = await asyncio.to_thread(self._sampler.self_test)
        return report.passed, str(report)

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0)
    async def _one(self, asked: list[tuple[Order, int]]) -> list[NDArray[Any] | MmdExportError]:
        """One image each, (1, C, H, W) or (1, H, W, C), or why there is none."""
        return await asyncio.to_thread(draw_together, self._sampler, asked, self._fixed)


def draw_together(
    sampler: Sampler, asked: list[tuple[Order, int]], fixed: bool = False
) -> list[NDArray[Any] | MmdExportError]:
    """Images of different orders in one run. If it fails, each by itself, so that an order fails for itself alone.

    ``fixed``: the run has the largest batch of the graph, filled up with the last image.
    """
    try:
        rows = [sampler.noise(order.seed, 1, image) | order.conditions for order, image in asked]
        if fixed:
            rows += [rows[-1]] * (sampler.bundle.manifest.batch.largest - len(rows))
        axes = {spec.name: spec.batch_axis for spec in sampler.bundle.manifest.inputs}
        images = sampler.run({name: np.concatenate([row[name] for row in rows], axis) for name, axis in axes.items()})
        return [images[place : place + 1] for place in range(len(asked))]
    except MmdExportError as error:
        if len(asked) == 1:
            return [error]
        return [answer for each in asked for answer in draw_together(sampler, [each], fixed)]


def answer(images: NDArray[Any], form: str) -> Response:
    """The images as one PNG, side by side; as ``sample`` in an npz file; or as bytes, whose shape is in the headers."""
    if form == "raw":
        little = images.astype(images.dtype.newbyteorder("<"), copy=False)
        facts = {"X-Dtype": images.dtype.name, "X-Shape": ",".join(map(str, images.shape))}
        return Response(little.tobytes(), media_type="application/octet-stream", headers=facts)
    buffer = io.BytesIO()
    if form == "npz":
        np.savez(buffer, sample=images)
        return Response(buffer.getvalue(), media_type="application/x-npz")
    from PIL import Image

    sheet = grid(images)
    Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet).save(buffer, format="PNG")
    return Response(buffer.getvalue(), media_type="image/png")


api = FastAPI(title="images of a seed", docs_url=None, redoc_url=None)


def read_wanted(kind: type[Wanted], fields: Any) -> Wanted:
    """The fields of a request, checked; RefusedError with the first complaint."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise RefusedError(422, f"{place} is {repr(first['input'])[:80]}: {first['msg']}") from None


@serve.ingress(api)
class Api:
    """Reads, checks, asks a painter, and writes the answer."""

    def __init__(self, painter: DeploymentHandle[Any], settings: Settings) -> None:
        self._painter, self._max_count = painter, settings.max_count
        bundle = Bundle.open(settings.folder)
        self._manifest, self._latents = bundle.manifest, bundle.gives_latents
        self._requests = Counter("mmd_requests", "requests for images, by status", tag_keys=("status",))
        self._images = Counter("mmd_images", "images that were drawn")
        self._seconds = Histogram("mmd_request_seconds", "from request to answer, if images were drawn", SECONDS)
        self._retries = Counter("mmd_retries", "orders given again because a painter died")

    @api.get("/images")
    async def images(self, request: Request) -> Response:
        """``/images?seed=7&count=4&format=png``, and ``class_label`` for a model with classes."""
        return await self._answered(Wanted, dict(request.query_params))

    @api.post("/images")
    async def images_of_json(self, request: Request) -> Response:
        """The same fields as JSON, and ``conditions``."""
        try:
            fields = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            fields = f"no JSON, {error}"
        return await self._answered(WantedWithConditions, fields)

    @api.get("/healthz")
    async def health(self) -> Response:
        """200 while painters can be asked, else 503; says which bundle it is."""
        facts = {"bundle": self._manifest.name, "manifest_sha256": self._manifest.manifest_sha256}
        status = (await asyncio.to_thread(serve.status)).applications
        mine = status[serve.get_replica_context().app_name].deployments["Painter"]
        running = sum(count for state, count in mine.replica_states.items() if str(state) == "RUNNING")
        ready = "ok" if running else f"no painter runs: {mine.status.value}"
        return JSONResponse({"status": ready, "painters": running, **facts}, 200 if running else 503)

    @api.get("/self-test")
    async def self_test(self) -> Response:
        """Golden noise on one painter: 200 if its images are right, else 500."""
        try:
            passed, line = await self._asked("self_test")
        except RefusedError as refused:
            return JSONResponse({"detail": refused.line}, refused.status, BUSY if refused.status == 503 else None)
        return JSONResponse({"passed": passed, "detail": line}, 200 if passed else 500)

    async def _answered(self, kind: type[Wanted], fields: Any) -> Response:
        """Images, or one line with its status."""
        start = time.perf_counter()
        try:
            response = await self._drawn(read_wanted(kind, fields))
            self._seconds.observe(time.perf_counter() - start)
        except MmdExportError as error:
            response = JSONResponse({"detail": str(error)}, 400)
        except RefusedError as refused:
            response = JSONResponse({"detail": refused.line}, refused.status, BUSY if refused.status == 503 else None)
        self._requests.inc(tags={"status": str(response.status_code)})
        return response

    async def _drawn(self, wanted: Wanted) -> Response:
        """The images of a request; RefusedError or MmdExportError."""
        if self._latents and wanted.format == "png":
            raise RefusedError(422, "format is png, this bundle gives latents; ask for npz or raw")
        images = await self._asked("draw", one_order(wanted, self._manifest, self._max_count))
        if isinstance(images, str):
            raise RefusedError(400, images)
        self._images.inc(len(images))
        return await asyncio.to_thread(answer, images, wanted.format)

    async def _asked(self, method: str, *arguments: Any) -> Any:
        """What a painter says. One that died is replaced; RefusedError 503 if all are busy or none is left."""
        for attempt in range(TRIES):
            try:
                return await getattr(self._painter, method).remote(*arguments)
            except (BackPressureError, DeploymentUnavailableError) as error:
                raise RefusedError(503, "too many requests wait; ask again later") from error
            except RayActorError:
                self._retries.inc()
                await asyncio.sleep(0.1 * 2**attempt)
            except RayTaskError as error:
                raise RefusedError(500, f"a painter failed: {error.cause}") from error
        raise RefusedError(503, f"{TRIES} painters died over this request; ask again later")


def build(settings: Settings) -> Any:
    """The application, for ``serve run`` and ``serve deploy``; refuses a damaged bundle before anything is started."""
    Bundle.open(settings.folder)
    painter = serve.deployment(
        num_replicas=settings.replicas, max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )(Painter)  # fmt: skip
    # The painters' limits are reached first, so that the answer to one request too many has a line of text.
    most = 2 * (settings.max_queued_requests + settings.replicas * settings.max_ongoing_requests)
    asked = serve.deployment(
        max_ongoing_requests=most, max_queued_requests=most, ray_actor_options={"num_cpus": 0}
    )(Api)  # fmt: skip
    return asked.bind(painter.bind(settings), settings)


def read_config(path: Path) -> tuple[Settings, dict[str, Any]]:
    """``args`` and ``http_options`` of ``serve.yaml``; UsageError in one line."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Settings(**config["applications"][0]["args"]), dict(config["http_options"])
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: args.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        raise UsageError(f"{path} is not a config of this service: {one_line(error)}") from None


def serve_until_stopped(settings: Settings, http: dict[str, Any], cpus: int | None, metrics_port: int) -> None:
    """Start Ray on this machine and the service in it; SIGINT or SIGTERM stops both."""
    stopped = threading.Event()
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, namespace="serve",
        object_store_memory=256 * 2**20, _metrics_export_port=metrics_port,
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # after `init`, whose own handler of SIGTERM aborts (Ray 2.60)
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options=http)
        serve.run(build(settings), name="images", route_prefix="/")
        print(f"http://{http['host']}:{http['port']}/images?seed=7 (metrics: port {metrics_port})", flush=True)
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 4 self-test failed, 5 bundle damaged, and the others of mmd-export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: serve.yaml beside this file")
    parser.add_argument("--bundle", type=Path, help="a bundle folder instead of the one in the config")
    parser.add_argument("--port", type=int, help="of HTTP, instead of the one in the config")
    parser.add_argument("--metrics-port", type=int, default=8080, help="where Prometheus may ask for metrics")
    parser.add_argument("--num-cpus", type=int, help="how many CPUs Ray counts here (default: all)")
    parser.add_argument("--self-test", action="store_true", help="run the golden noise without a server, and compare")
    options = parser.parse_args(arguments)
    try:
        settings, http = read_config(options.config)
        if options.bundle is not None:
            settings = settings.model_copy(update={"bundle": options.bundle.absolute()})
        sampler = open_bundle(settings.folder, settings.runtime, settings.threads)
        if options.self_test:
            report = sampler.self_test()
            print(report)
            return 0 if report.passed else 4
        del sampler
        http |= {"port": options.port} if options.port is not None else {}
        serve_until_stopped(settings, http, options.num_cpus, options.metrics_port)
    except MmdExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
