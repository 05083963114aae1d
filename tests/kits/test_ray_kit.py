"""Kit ``ray``: what it takes and gives, its batches, the attacks, and one service that is really started."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.commands.embed import EmbedOptions, embed
from mmd_export.pictures import grid
from mmd_runtime.app import open_bundle
from tests.attacks import ATTACKS, Attack
from tests.contract.required import skip
from tests.kits.projects import module_of
from tests.kits.wrong import with_other_sample
from tests.models import LABELS, save_model
from tests.project.checks import PACKAGES, ROOT

if importlib.util.find_spec("ray") is None:
    skip("kit", "ray", "ray missing; pip install 'ray[serve]'")

PATH = os.pathsep.join(str((ROOT / package).parent) for package in PACKAGES)
START_SECONDS, STOP_SECONDS = 120, 60
SMALL = {"max_count": 8, "max_ongoing_requests": 2, "max_queued_requests": 2, "cpus": 0.5}


@pytest.fixture(scope="module")
def project(digits_batched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With limits so small that a test reaches them."""
    out = tmp_path_factory.mktemp("projects") / "ray"
    embed(EmbedOptions(digits_batched, "ray", out))
    config = yaml.safe_load((out / "serve.yaml").read_text())
    config["applications"][0]["args"] |= SMALL
    (out / "serve.yaml").write_text(yaml.safe_dump(config))
    return out


@pytest.fixture(scope="module")
def app(project: Path) -> ModuleType:
    return module_of(project / "app.py")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional model of 5 classes, whose steps take noise, 1 to 4 images a run."""
    folder = tmp_path_factory.mktemp("bundles")
    save_model(folder / "model", seed=2, **LABELS)
    out = folder / "labelled"
    build(BuildOptions(str(folder / "model"), "onnx", out, steps=2, sampler="ddpm", batch="1..4", verify=False))
    return out


def test_the_settings_of_the_file_are_those_of_the_kit(app: ModuleType) -> None:
    settings, http = app.read_config(ROOT / "runtimes/ray/serve.yaml")
    assert settings == app.Settings()
    assert http["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("applications: []", "is not a config of this service"),
        ("http_options: {}\napplications: [{args: {replicas: 0}}]", "args.replicas: Input should be greater"),
        ("http_options: {}\napplications: [{args: {replica: 1}}]", "args.replica: Extra inputs"),
        ("applications: [", "is not a config of this service"),
    ],
)
def test_a_wrong_setting_is_a_usage_error(
    text: str, says: str, app: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    assert app.main(["--config", str(tmp_path / "serve.yaml")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_self_test_needs_no_server(app: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--self-test"]) == 0
    assert "self-test passed: digits-2 in onnxruntime" in capsys.readouterr().out


def test_a_wrong_image_fails_the_self_test(app: ModuleType, digits_batched: Path, tmp_path: Path) -> None:
    wrong = with_other_sample(digits_batched, tmp_path / "wrong", 0.001)
    assert app.main(["--bundle", str(wrong), "--self-test"]) == 4
    with pytest.raises(app.ParityError, match="self-test FAILED"):
        app.Painter(app.Settings(bundle=wrong))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_every_attack_is_refused(
    attack: Attack, attacks: Path, app: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything of Ray is started; by its other entry too, which ``serve run`` and ``serve deploy`` take."""
    assert app.main(["--bundle", str(attacks / attack.id)]) == 5
    error = capsys.readouterr().err
    assert attack.says in error
    assert error.count("\n") == 1
    with pytest.raises(app.MmdExportError) as caught:
        app.build(app.Settings(bundle=attacks / attack.id))
    assert attack.says in str(caught.value)


def test_an_order_is_what_was_asked(app: ModuleType, labelled: Path) -> None:
    manifest = Bundle.open(labelled).manifest
    order = app.one_order(app.Wanted(seed=7, count=3, first=2, class_label=4), manifest, 8)
    assert (order.seed, order.count, order.first) == (7, 3, 2)
    assert order.conditions["class_labels"].tolist() == [4]
    assert order.conditions["class_labels"].dtype == np.int64


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"count": 9, "class_label": 1}, "count is 9, this service draws up to 8"),
        ({}, "condition class_labels is missing"),
        ({"class_label": 1, "conditions": {"mask": [1.0]}}, "condition mask is unknown"),
        ({"conditions": {"class_labels": 1.5}}, "condition class_labels is float64, the graph takes int64"),
        ({"conditions": {"class_labels": [1]}}, "condition class_labels has shape (1,)"),
        ({"conditions": {"class_labels": [[1], [1, 2]]}}, "condition class_labels is no array"),
        ({"conditions": {"class_labels": "one"}}, "condition class_labels is str"),
    ],
)
def test_an_order_that_the_graph_does_not_take(
    fields: dict[str, Any], says: str, app: ModuleType, labelled: Path
) -> None:
    with pytest.raises(app.RefusedError) as caught:
        app.one_order(app.WantedWithConditions(**fields), Bundle.open(labelled).manifest, 8)
    assert says in caught.value.line
    assert caught.value.status == 422


def orders(app: ModuleType, labels: list[int]) -> list[tuple[Any, int]]:
    """One image each, of different seeds and places."""
    told = [{"class_labels": np.array([label])} for label in labels]
    return [(app.Order(seed, 1, seed % 3, each), seed % 3) for seed, each in enumerate(told)]


@pytest.mark.parametrize("fixed", [False, True])
def test_images_drawn_together_are_those_drawn_alone(fixed: bool, app: ModuleType, labelled: Path) -> None:
    sampler = open_bundle(labelled, threads=1)
    asked = orders(app, [3, 0, 4])
    together = app.draw_together(sampler, asked, fixed)
    tolerance = sampler.bundle.manifest.tolerance.atol
    for (order, image), found in zip(asked, together, strict=True):
        alone = sampler.sample(order.seed, 1, image, order.conditions)
        assert np.abs(found - alone).max() <= tolerance
    distances = [np.abs(together[0] - other).max() for other in together[1:]]
    assert min(distances) > 0.1, "the images are too alike for a mixed-up one to show"


def test_with_a_fixed_batch_the_company_does_not_matter(app: ModuleType, labelled: Path) -> None:
    sampler = open_bundle(labelled, threads=1)
    asked = orders(app, [3, 0, 4, 1])
    whole = app.draw_together(sampler, asked, fixed=True)
    for place, each in enumerate(asked):
        (alone,) = app.draw_together(sampler, [each], fixed=True)
        np.testing.assert_array_equal(alone, whole[place])


def test_an_order_that_fails_does_not_fail_the_others(app: ModuleType, labelled: Path) -> None:
    sampler = open_bundle(labelled, threads=1)
    found = app.draw_together(sampler, orders(app, [3, 99, 4]))
    assert [isinstance(each, app.MmdExportError) for each in found] == [False, True, False]
    assert "onnxruntime failed while running it" in str(found[1])


def test_a_static_graph_draws_one_by_one(app: ModuleType, digits_onnx: Path) -> None:
    sampler = open_bundle(digits_onnx, threads=1)
    found = app.draw_together(sampler, [(app.Order(seed, 1, 0, {}), 0) for seed in range(3)])
    for seed, each in enumerate(found):
        np.testing.assert_array_equal(each, sampler.sample(seed))


def test_answers_hold_the_images(app: ModuleType, digits_onnx: Path) -> None:
    images = open_bundle(digits_onnx).sample(seed=7, count=3)
    raw = app.answer(images, "raw")
    shape = tuple(map(int, raw.headers["x-shape"].split(",")))
    np.testing.assert_array_equal(np.frombuffer(raw.body, raw.headers["x-dtype"]).reshape(shape), images)
    np.testing.assert_array_equal(np.load(io.BytesIO(app.answer(images, "npz").body))["sample"], images)
    picture = np.asarray(Image.open(io.BytesIO(app.answer(images, "png").body)))
    np.testing.assert_array_equal(picture, grid(images)[:, :, 0])


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, bytes, Any]:
    """Status, body and headers of one request, without asking again."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def processes_with(mark: str) -> list[int]:
    """Those whose environment has the mark: the service and all that it started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found


@dataclass
class Started:
    """A service: its address, that of its metrics, the process, and the mark of all processes that belong to it."""

    url: str
    metrics: str
    process: subprocess.Popen[str]
    mark: str


@pytest.fixture(scope="module")
def started(project: Path) -> Iterator[Started]:
    mark, port, metrics = f"mmd-{uuid.uuid4().hex}", free_port(), free_port()
    environment = {**os.environ, "PYTHONPATH": PATH, "MMD_TEST_MARK": mark}
    command = [sys.executable, "app.py", "--port", port, "--metrics-port", metrics, "--num-cpus", 1]
    process = subprocess.Popen(
        list(map(str, command)), cwd=project, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}/images"), line
        yield Started(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics", process, mark)
    finally:
        for number in processes_with(mark):  # nothing is left but after a failure
            os.kill(number, signal.SIGKILL)
        process.wait(STOP_SECONDS)


def within(seconds: float, true: Callable[[], bool]) -> bool:
    """Whether it comes true in that time."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.25)
    return found


def test_a_service_from_start_to_stop(started: Started, digits_batched: Path, project: Path, tmp_path: Path) -> None:
    """One start for everything that needs one: it takes seconds."""
    answers_are_the_direct_ones(started.url, digits_batched)
    wrong_requests_are_one_line(started.url)
    too_many_requests_are_told_so(started.url)
    a_painter_that_dies_loses_nothing(started, digits_batched)
    the_client_gets_a_picture(started.url, project, tmp_path)
    health_says_which_bundle(started.url, digits_batched)
    assert within(60, lambda: metrics_are_there(started.metrics)), ask(started.metrics)[1]
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(STOP_SECONDS) == 0
    assert within(10, lambda: processes_with(started.mark) == []), "processes were left behind"


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


def a_painter_that_dies_loses_nothing(started: Started, bundle: Path) -> None:
    """Killed in the middle of many requests: Ray starts another one, and every request ends with its image."""
    sampler, client = open_bundle(bundle, threads=1), module_of(ROOT / "runtimes/ray/client.py")
    (painter,) = painters_of(started.mark)

    def one(seed: int) -> tuple[int, Any]:
        if seed == 20:
            os.kill(painter, signal.SIGKILL)
        return seed, np.load(io.BytesIO(client.fetch(f"{started.url}/images?seed={seed}&format=npz")))["sample"]

    with ThreadPoolExecutor(4) as pool:
        for seed, found in pool.map(one, range(40)):
            assert np.abs(found - sampler.sample(seed)).max() <= sampler.bundle.manifest.tolerance.atol
    assert painters_of(started.mark) != [painter]


def painters_of(mark: str) -> list[int]:
    """The processes that hold the model, by the title that Ray gives them."""
    titles = {number: (Path("/proc") / str(number) / "cmdline").read_bytes() for number in processes_with(mark)}
    return [number for number, title in titles.items() if title.startswith(b"ray::ServeReplica:images:Painter")]


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


def test_no_service_is_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = module_of(project / "client.py")
    assert client.main(["--url", f"http://127.0.0.1:{free_port()}", "--patience", "0"]) == 3
    assert "Connection refused" in capsys.readouterr().err


def test_when_no_painter_is_left_the_answer_is_503(app: ModuleType) -> None:
    class Handle:
        """Whose every painter dies."""

        def __init__(self) -> None:
            self.draw, self.asked = self, 0

        async def remote(self, _: str) -> None:
            self.asked += 1
            raise app.RayActorError

        def inc(self) -> None: ...

    api = object.__new__(app.Api)  # with what ``_asked`` reads
    api._painter = api._retries = handle = Handle()
    with pytest.raises(app.RefusedError, match="503"):
        asyncio.run(api._asked("draw", "order"))
    assert handle.asked == app.TRIES
