"""Settings from a TOML file and the command line, and how they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from mmd_export.cli import app
from mmd_export.errors import UsageError
from mmd_finetune.setting_names import KEYS_ONLY, flag_of
from mmd_finetune.settings import FinetuneSettings, make_settings

CONFIGS = Path(__file__).parents[2] / "finetune/configs"
GIVEN: dict[str, Any] = {"model": "digits", "steps": 5, "out": "run"}


def test_the_digits_config_states_the_defaults() -> None:
    from_file = make_settings({"out": "run"}, CONFIGS / "digits.toml")
    assert from_file == make_settings(GIVEN)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_published_config_is_valid(path: Path) -> None:
    make_settings({"out": "run"}, path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-paper.toml")), ids=lambda path: path.name)
def test_a_pair_of_configs_compares_with_the_same_images_few_of_a_large_data_set(path: Path) -> None:
    ours = path.with_name(path.name.replace("-paper", ""))
    fractions = {make_settings({"out": "run"}, each).holdout_fraction for each in (path, ours)}
    expected = {"imagenet64": 0.01, "church256": 0.1, "celeba64": 0.1}
    assert fractions == {expected.get(ours.stem, 0.0)}


def test_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('steps = 4\nfeatures = ["pixels"]\nseed = 7\n')
    settings = make_settings(GIVEN | {"seed": None, "kernel": "cubic"}, tmp_path / "a.toml")
    assert (settings.steps, settings.seed, settings.kernel, settings.features) == (5, 7, "cubic", ("pixels",))


def test_features_by_comma() -> None:
    assert make_settings(GIVEN | {"features": "digits-conv, pixels"}).features == ("digits-conv", "pixels")


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        make_settings(GIVEN).seed = 1


def test_public_has_no_place_of_this_machine(tmp_path: Path) -> None:
    places = {"model": str(tmp_path / "base"), "data": str(tmp_path / "d.npz"), "out": tmp_path}
    encoders = {"features": f"clip:{tmp_path}/vit?size=32,pixels", "holdout": f"inception:{tmp_path}/pt.pth"}
    public = make_settings(GIVEN | places | encoders).public()
    assert (public["features"], public["holdout"]) == (["clip:vit?size=32", "pixels"], ["inception:pt.pth"])
    assert (public["model"], public["data"]) == ("base", "d.npz")
    assert str(tmp_path) not in str(public)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "^--steps is 0; it must be at least 1$"),
        ({"batch_size": 1}, "--batch-size is 1; it must be at least 2"),
        ({"learning_rate": 0.0}, "^--lr is 0; it must be above 0$"),
        ({"learning_rate": float("nan")}, "--lr is nan"),
        ({"ema_decay": 1.0}, "^ema_decay is 1; it must be below 1$"),
        ({"seed": -1}, "--seed is -1; it must be at least 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"iterations": 0}, "--iterations is 0"),
        ({"iterations": "many"}, "^--iterations is 'many'; a whole number is expected$"),
        ({"features": ()}, "^--features is empty; name at least 1$"),
        ({"rate_decay": "step"}, "^rate_decay is 'step'; choose 'constant' or 'cosine'$"),
        ({"batchsize": 3}, "'batchsize' is unknown; known: model, steps, out"),
        ({"features": ("digits-mlp",)}, "^--holdout digits-mlp is also in --features"),
        ({"holdout": "digits-mlp,digits-conv"}, "--holdout digits-conv is also in --features"),
        ({"holdout": "digits-mlp,digits-mlp"}, "--holdout digits-mlp,digits-mlp names an encoder twice"),
        ({"holdout": ()}, "--holdout is empty"),
        ({"balance": "loud"}, "--balance is 'loud'; choose 'auto', 'untuned' or 'equal'"),
        ({"resize": "squash"}, "--resize is 'squash'; choose 'crop' or 'stretch'"),
        ({"crop": "1,2,3"}, "^--crop is '1,2,3': '1,2,3' is not LEFT,TOP,WIDTH,HEIGHT"),
        ({"holdout_fraction": 1.0}, "--holdout-fraction is 1; it must be below 1"),
        ({"holdout_fraction": -0.1}, "--holdout-fraction is -0.1"),
        ({"features": "pixels,pixels"}, "--features pixels,pixels names an encoder twice"),
        ({"out": None}, "^--out is missing; name the run folder to make$"),
        ({"landmarks": 64}, "^--landmarks is 64, but --reference is bank; leave it out, or give --reference nystrom$"),
        ({"reference": "all"}, "--reference is 'all'; choose 'bank', 'batch' or 'nystrom'"),
        ({"estimator": "u"}, "--estimator is 'u'; choose 'unbiased' or 'biased'"),
        ({"autocast": "fp16"}, "--autocast is 'fp16'; choose 'off' or 'bf16'"),
        ({"model": None}, "^MODEL is missing; name the model to tune, such as digits$"),
        ({"metrics": "recal"}, "^--metrics is 'recal': 'recal' is not one of "),
        ({"plan_learning_rate": 1.0}, "^--plan-lr is 1, but --learn is weights; leave it out, or give --learn plan$"),
        ({"micro_batch_size": 0}, "--micro-batch-size is 0; it must be at least 1"),
    ],
)
def test_wrong_values_name_setting_and_value(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_settings({**GIVEN, **wrong})


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("lr = 1e-4\n")
    with pytest.raises(UsageError, match=r"a\.toml\): 'lr' is unknown"):
        make_settings(GIVEN, tmp_path / "a.toml")


def test_a_value_is_named_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("learning_rate = -1\n")
    with pytest.raises(UsageError, match=r"a\.toml\): learning_rate is -1; it must be above 0"):
        make_settings(GIVEN, tmp_path / "a.toml")
    with pytest.raises(UsageError, match="--lr is -2; it must be above 0"):
        make_settings(GIVEN | {"learning_rate": -2.0}, tmp_path / "a.toml")


def test_every_setting_is_named_by_an_option_that_exists() -> None:
    command = typer.main.get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts} | {"MODEL"}
    named = {flag_of(name) for name in FinetuneSettings.model_fields if name not in KEYS_ONLY}
    assert named <= options
    assert not {"--" + name.replace("_", "-") for name in KEYS_ONLY} & options


def test_a_file_that_is_missing_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.toml cannot be read: No such file"):
        make_settings(GIVEN, tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("= 3")
    with pytest.raises(UsageError, match=r"a\.toml is not TOML"):
        make_settings(GIVEN, tmp_path / "a.toml")


def test_defaults_are_for_the_built_in_digits() -> None:
    settings = FinetuneSettings(model="digits", steps=5, out=Path("run"))
    assert (settings.data, settings.features, settings.holdout) == (
        "digits",
        ("digits-conv", "pixels"),
        ("digits-mlp",),
    )
