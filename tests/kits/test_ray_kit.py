"""Kit ``ray``: what it takes and gives, its batches, and the attacks; without a server."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.ray_service import free_port
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.pictures import grid
from mmd_runtime.app import open_bundle
from tests.attacks import ATTACKS, Attack
from tests.kits.projects import module_of, require_ray
from tests.kits.wrong import with_other_sample
from tests.models import LABELS, save_model
from tests.project.checks import ROOT

require_ray()


@pytest.fixture(scope="module")
def app(ray_project: Path) -> ModuleType:
    return module_of(ray_project / "app.py")


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
        ({"class_label": 5}, "condition class_labels holds 5 to 5, the graph knows 0 to 4"),
        ({"conditions": {"class_labels": -1}}, "condition class_labels holds -1 to -1"),
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
    assert "holds 99 to 99, the manifest says 0 to 4" in str(found[1])


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


def test_no_service_is_one_line(ray_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = module_of(ray_project / "client.py")
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
