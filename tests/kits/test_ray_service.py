"""Kit ``ray``: one service that is really started, asked, overloaded, robbed of its painter, and stopped."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.ray_service import Started, cluster, free_port, started
from mmd_export.bundle import Bundle
from mmd_runtime.app import open_bundle
from tests.kits.projects import module_of, require_ray
from tests.project.checks import PACKAGES, ROOT

require_ray()
PATH = os.pathsep.join(str((ROOT / package).parent) for package in PACKAGES)


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, bytes, Any]:
    """Status, body and headers of one request, without asking again."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


@pytest.fixture(scope="module")
def service(ray_project: Path) -> Iterator[Started]:
    with started(ray_project, 1, {"PYTHONPATH": PATH}) as found:
        yield found


def within(seconds: float, true: Callable[[], bool]) -> bool:
    """Whether it comes true in that time."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.25)
    return found


def test_a_service_from_start_to_stop(
    service: Started, digits_batched: Path, ray_project: Path, tmp_path: Path
) -> None:
    """One start for everything that needs one: it takes seconds."""
    answers_are_the_direct_ones(service.url, digits_batched)
    wrong_requests_are_one_line(service.url)
    too_many_requests_are_told_so(service.url)
    a_painter_that_dies_loses_nothing(service, digits_batched)
    the_client_gets_a_picture(service.url, ray_project, tmp_path)
    health_says_which_bundle(service.url, digits_batched)
    assert within(60, lambda: metrics_are_there(service.metrics)), ask(service.metrics)[1]
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(60) == 0
    assert within(10, lambda: service.processes() == {}), "processes were left behind"


def test_serve_deploy_starts_it_on_a_cluster(ray_project: Path, tmp_path: Path) -> None:
    """As the README of the project says: ``ray start`` in its folder, then ``serve deploy``."""
    project = shutil.copytree(ray_project, tmp_path / "project")
    config = yaml.safe_load((project / "serve.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = free_port()
    (project / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {"PYTHONPATH": PATH, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    url = f"http://127.0.0.1:{config['http_options']['port']}"

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=project, env=os.environ | environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with cluster(project, 2, environment) as address:
        run("-m", "ray.serve.scripts", "deploy", "serve.yaml", "--address", address)
        assert within(120, lambda: is_healthy(url)), run("-m", "ray.serve.scripts", "status", "--address", address)
        assert "self-test passed: digits-2" in run("client.py", "--url", url, "--self-test")


def is_healthy(url: str) -> bool:
    """Not before the service listens, and not while its application is still being deployed."""
    with suppress(urllib.error.URLError, ConnectionError):
        return ask(f"{url}/healthz")[0] == 200
    return False


def answers_are_the_direct_ones(url: str, bundle: Path) -> None:
    """Requests that meet in the same batches, each with its own seed."""
    sampler = open_bundle(bundle, threads=1)
    client = module_of(ROOT / "runtimes/ray/client.py")

    def one(seed: int) -> tuple[int, Any]:
        body = client.fetch(f"{url}/images?seed={seed}&count=2&first=3&format=npz")
        return seed, np.load(io.BytesIO(body))["sample"]

    with ThreadPoolExecutor(4) as pool:
        for seed, found in pool.map(one, range(2**64 - 12, 2**64)):
            expected = sampler.sample(seed, 2, first=3)
            assert np.abs(found - expected).max() <= sampler.bundle.manifest.tolerance.atol


def wrong_requests_are_one_line(url: str) -> None:
    for query, status, says in (
        ("seed=-1", 422, "seed is '-1': Input should be greater than or equal to 0"),
        ("seed=x", 422, "seed is 'x': "),
        ("count=0", 422, "count is '0': "),
        ("count=9", 422, "count is 9, this service draws up to 8"),
        ("format=gif", 422, "format is 'gif': Input should be 'png', 'npz' or 'raw'"),
        ("class_label=1", 422, "condition class_labels is unknown, bundle digits-2 takes none"),
        ("sede=7", 422, "sede is '7': Extra inputs"),
        ("first=4294967295&count=2", 400, "is 4294967296, the generator takes 0 to 4294967295"),
    ):
        found, body, _ = ask(f"{url}/images?{query}")
        detail = json.loads(body)["detail"]
        assert (found, says in detail, "\n" in detail) == (status, True, False), (query, found, detail)
    assert ask(f"{url}/nothing")[0] == 404
    status, body, headers = ask(f"{url}/images", {"seed": 7, "count": 2, "format": "raw"})
    assert (status, headers["X-Shape"], len(body)) == (200, "2,1,8,8", 512)
    assert ask(f"{url}/images", {"seed": [7]})[0] == 422


def too_many_requests_are_told_so(url: str) -> None:
    """2 at the painter and 2 that wait; of 40 at once some are told to come back, and those answered are right."""
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda seed: ask(f"{url}/images?seed={seed}&count=8&format=raw"), range(40)))
    assert {status for status, _, _ in found} == {200, 503}
    busy = next((body, headers) for status, body, headers in found if status == 503)
    assert json.loads(busy[0])["detail"] == "too many requests wait; ask again later"
    assert busy[1]["Retry-After"] == "1"


def a_painter_that_dies_loses_nothing(service: Started, bundle: Path) -> None:
    """Killed in the middle of many requests: Ray starts another one, and every request ends with its image."""
    sampler, client = open_bundle(bundle, threads=1), module_of(ROOT / "runtimes/ray/client.py")
    (painter,) = service.painters()

    def one(seed: int) -> tuple[int, Any]:
        if seed == 20:
            os.kill(painter, signal.SIGKILL)
        return seed, np.load(io.BytesIO(client.fetch(f"{service.url}/images?seed={seed}&format=npz")))["sample"]

    with ThreadPoolExecutor(4) as pool:
        for seed, found in pool.map(one, range(40)):
            assert np.abs(found - sampler.sample(seed)).max() <= sampler.bundle.manifest.tolerance.atol
    assert service.painters() != [painter]


def the_client_gets_a_picture(url: str, project: Path, out: Path) -> None:
    for arguments in (["--self-test"], ["--seed", "7", "--count", "4", "--out", str(out / "seven.png")]):
        command = [sys.executable, "client.py", "--url", url, *arguments]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "self-test passed: digits-2" in done.stdout or "4 images of seed 7" in done.stdout
    assert np.asarray(Image.open(out / "seven.png")).std() > 20
    command = [sys.executable, "client.py", "--url", url, "--count", "9"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "status 422: count is 9" in done.stderr


def health_says_which_bundle(url: str, bundle: Path) -> None:
    status, body, _ = ask(f"{url}/healthz")
    facts = json.loads(body)
    assert (status, facts["status"], facts["painters"]) == (200, "ok", 1)
    assert facts["manifest_sha256"] == Bundle.open(bundle).manifest.manifest_sha256


def metrics_are_there(url: str) -> bool:
    """Ray sends them on every few seconds."""
    status, body, _ = ask(url)
    text = body.decode()
    wanted = ("ray_mmd_requests_total{", 'status="200"', 'status="503"', "ray_mmd_images_total{")
    return status == 200 and all(each in text for each in (*wanted, "ray_mmd_request_seconds_bucket{"))
