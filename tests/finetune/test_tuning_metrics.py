"""Further metrics and TensorBoard events of a run: logged at each evaluation, deciding nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmd_export.errors import UsageError
from mmd_finetune import task
from mmd_finetune.curve import draw_curve, scalars
from mmd_finetune.loop import Report, tune
from mmd_finetune.metrics import frechet
from mmd_finetune.metrics.bootstrap import Measured
from mmd_finetune.metrics.suite import Features, measure
from mmd_finetune.settings import FinetuneSettings, make_settings
from mmd_finetune.task import prepare
from mmd_finetune.tensorboard import TensorBoard
from tests.finetune.runs import changed, events_of


def lines(settings: FinetuneSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (settings.out / "log.jsonl").read_text().splitlines()]


def assert_within(intervals: dict[str, Any], values: dict[str, Any]) -> None:
    assert intervals.keys() == values.keys()
    for encoder, by_name in intervals.items():
        assert by_name.keys() == values[encoder].keys()
        assert all(low <= values[encoder][name] <= high for name, (low, high) in by_name.items())


def test_metrics_are_logged_at_each_evaluation_and_change_nothing(
    tiny_settings: FinetuneSettings, tmp_path: Path
) -> None:
    tune(tiny_settings)
    more = tiny_settings.model_copy(update={"out": tmp_path / "more", "metrics": ("recall", "kid")})
    tune(more)
    logged = lines(more)
    assert [line["iteration"] for line in logged if "metrics" in line] == [0, 2, 4, 6]
    for line in logged:
        assert ("metrics" in line) == ("intervals" in line) == ("held_out" in line)
        if "metrics" in line:
            assert set(line["metrics"]) == {"recall", "kid"}
            assert_within(line["intervals"], {"digits-mlp": {"frechet": line["held_out"], **line["metrics"]}})
    plain = [
        {key: line[key] for key in ("iteration", "loss", "held_out") if key in line} for line in lines(tiny_settings)
    ]
    assert plain == [{key: line[key] for key in ("iteration", "loss", "held_out") if key in line} for line in logged]
    with Image.open(more.out / "curve.png") as wide, Image.open(tiny_settings.out / "curve.png") as narrow:
        assert wide.size[0] == pytest.approx(2 * narrow.size[0], abs=2)  # four curves instead of two


def test_the_curve_shows_the_intervals(tmp_path: Path) -> None:
    bare = [{"iteration": i, "loss": 1.0, "held_out": 3.0 - i, "metrics": {"recall": 0.5 + 0.1 * i}} for i in range(3)]
    bounds = {"digits-mlp": {"frechet": [-0.5, 3.5], "recall": [0.4, 0.8]}, "pixels": {"frechet": [9.0, 9.9]}}
    pictures = []
    for lines_of_a_log in (bare, [line | {"intervals": bounds} for line in bare]):
        draw_curve(lines_of_a_log, tmp_path / "curve.png")
        with Image.open(tmp_path / "curve.png") as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.int16)
        pale_blue = (pixels[..., 2] - pixels[..., 0] > 20) & (pixels[..., 0] > 150)
        pictures.append([int(part.sum()) for part in np.array_split(pale_blue, 3, axis=1)])
    without, with_bands = pictures
    assert max(without) < 2_000  # the rims of the lines
    assert with_bands[0] < 2_000
    assert min(with_bands[1:]) > 20_000


def test_points_without_an_interval_are_left_out(tmp_path: Path) -> None:
    earlier = {"iteration": 0, "held_out": 3.0}  # of a release that logged none
    unknown = earlier | {"intervals": {"digits-mlp": {"frechet": [None, None]}}}
    assert scalars(unknown) == scalars(earlier) == {"held_out": 3.0}
    whole = {"iteration": 2, "held_out": 2.0, "intervals": {"digits-mlp": {"frechet": [1.5, 2.5]}}}
    assert scalars(whole)["intervals/digits-mlp/frechet/high"] == 2.5
    draw_curve([earlier, unknown, whole], tmp_path / "curve.png")
    draw_curve([], tmp_path / "empty.png")


def test_the_distance_is_measured_once(tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    work, asked = prepare(changed(tiny_settings, metrics="frechet,recall")), list[str]()

    def counted(names: Sequence[str], sets: Features) -> dict[str, Measured]:
        asked.extend(names)
        return measure(names, sets)

    monkeypatch.setattr(task, "measure", counted)
    assert set(work.judge(torch.zeros(16, 1, 8, 8))["digits-mlp"]) == {"frechet", "recall"}
    assert asked == ["frechet", "recall"]


def test_evaluations_share_what_depends_on_the_real_images_alone(
    tiny_settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int] = []

    def counted(features: Tensor) -> frechet.Side:
        sides.append(len(features))
        return decomposed(features)

    decomposed = frechet.decomposed
    monkeypatch.setattr(frechet, "decomposed", counted)
    tune(changed(tiny_settings, iterations=1))
    # the real images; the samples untuned, after the iteration, and of both for the result
    assert sides == [1437, 16, 16, 16, 16]


def test_images_without_finite_features_are_infinitely_far(
    tiny_settings: FinetuneSettings, caplog: pytest.LogCaptureFixture
) -> None:
    work = prepare(changed(tiny_settings, metrics="recall"))
    images = torch.zeros(16, 1, 8, 8)
    images[3] = float("nan")
    assert work.judge(images) == {"digits-mlp": {"frechet": Measured(float("inf"))}}
    assert "digits-mlp gives an image no finite features; no metric is measured" in caplog.text


def test_every_held_out_encoder_measures_and_the_result_has_intervals(
    tiny_settings: FinetuneSettings, caplog: pytest.LogCaptureFixture
) -> None:
    settings = changed(
        tiny_settings, iterations=1, features=("digits-conv",), holdout="digits-mlp,pixels", holdout_fraction=0.3,
        metrics="recall,memorisation,copying",
    )  # fmt: skip
    result = tune(settings)
    last = lines(settings)[-1]
    assert last["metrics_by_encoder"].keys() == result.metrics.keys() == {"digits-mlp", "pixels"}
    assert last["metrics"] == last["metrics_by_encoder"]["digits-mlp"]
    assert set(last["metrics"]) == {"recall", "memorisation"}
    assert "copying is left out" in caplog.text  # 16 samples leave no cell for it
    card = (settings.out / "README.md").read_text()
    for encoder, by_name in result.metrics.items():
        assert set(by_name) == {"recall", "memorisation"}
        for name, sides in by_name.items():
            assert all(side["low"] <= side["value"] <= side["high"] for side in sides.values())
            assert f"| {name}, `{encoder}` | {sides['before']['value']:.4g} (" in card
    assert json.loads((settings.out / "result.json").read_text())["metrics"] == result.metrics
    assert tune(settings, resume=True) == result


@pytest.mark.parametrize(
    ("fraction", "said"),
    [(0.6, "held-out images, .* to at most 0.5"), (0.003, "needs more than 5 held-out images, there are")],
)
def test_a_split_that_leaves_metrics_undefined_is_refused_before_the_run(
    fraction: float, said: str, tiny_settings: FinetuneSettings
) -> None:
    with pytest.raises(UsageError, match=said):
        tune(changed(tiny_settings, holdout_fraction=fraction, metrics="memorisation,recall"))
    assert not tiny_settings.out.exists()


@pytest.mark.parametrize("metrics", ["fid", "recall,recall", "memorisation"])
def test_metrics_that_cannot_be_measured_are_refused(metrics: str) -> None:
    with pytest.raises(UsageError, match=f"metrics is '{metrics}'.*is not one of frechet, kid"):
        make_settings({"model": "digits", "steps": 2, "out": "run", "metrics": metrics})


def test_too_few_samples_for_the_neighbours_are_refused_before_the_run() -> None:
    with pytest.raises(UsageError, match="--metrics recall needs more than 5 samples, evaluate_count is 4"):
        make_settings({"model": "digits", "steps": 2, "out": "run", "metrics": "recall", "evaluate_count": 4})


def test_events_are_those_of_the_log(tiny_settings: FinetuneSettings) -> None:
    encoders = {"features": ("digits-conv",), "holdout": ("digits-mlp", "pixels")}
    settings = tiny_settings.model_copy(update={"metrics": ("kid",), **encoders})
    seen: list[Report] = []
    with TensorBoard(settings.out, seen.append) as observer:
        tune(settings, observer=observer)
    found, logged = events_of(settings.out), lines(settings)
    assert len(seen) == settings.iterations
    for tag, name in (("loss", "loss"), ("held_out", "held_out")):
        expected = [(line["iteration"], pytest.approx(line[name], rel=1e-5)) for line in logged if name in line]
        assert [(event.step, event.value) for event in found.Scalars(tag)] == expected
    assert [event.step for event in found.Scalars("metrics/kid")] == [0, 2, 4, 6]
    assert [event.step for event in found.Scalars("losses/digits-conv")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in found.Scalars("held_out_by_encoder/pixels")] == [0, 2, 4, 6]
    for side, tag in enumerate(("low", "high")):
        bounds = [line["intervals"]["pixels"]["frechet"][side] for line in logged[::2]]
        events = found.Scalars(f"intervals/pixels/frechet/{tag}")
        assert [event.value for event in events] == pytest.approx(bounds, rel=1e-5)
    assert set(found.Tags()["images"]) == {"before", "after"}


def test_a_resumed_run_has_every_point_once(tiny_settings: FinetuneSettings) -> None:
    class StoppedError(Exception):
        pass

    def stop(report: Report) -> None:
        if report.iteration == 3:
            raise StoppedError

    with pytest.raises(StoppedError), TensorBoard(tiny_settings.out, stop) as observer:
        tune(tiny_settings, observer=observer)
    with TensorBoard(tiny_settings.out) as observer:
        tune(tiny_settings, resume=True, observer=observer)
    assert [event.step for event in events_of(tiny_settings.out).Scalars("loss")] == [1, 2, 3, 4, 5, 6]
