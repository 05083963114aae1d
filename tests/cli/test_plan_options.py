"""``--timesteps``, ``--spacing``, ``--sampler``, ``--ema`` and ``--plot``, in every command that has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmd_export.bundle import Bundle
from mmd_export.cli_options import with_ema
from mmd_export.errors import UsageError
from mmd_export.plan_options import PlanOptions, parse_timesteps
from tests.cli.conftest import Command
from tests.original_unet import random_unet

LISTED = "999,749,499,249"


def test_listed_timesteps_reach_the_graph(command: Command, tmp_path: Path) -> None:
    code, _, err = command("build", "digits", "--target", "onnx", "--timesteps", "900, 30", "--out", tmp_path / "b")
    assert code == 0, err
    plan = Bundle.open(tmp_path / "b").manifest.plan
    assert [step["timestep"] for step in plan["steps"]] == [900.0, 30.0]
    code, _, err = command("verify", tmp_path / "b")
    assert code == 0, err


def test_sample_and_evaluate_take_the_list(command: Command, tmp_path: Path) -> None:
    pictures = []
    for name, options in (("listed", ("--timesteps", "800,600,400,200,0")), ("named", ("--steps", 5))):
        path = tmp_path / f"{name}.png"
        code, _, err = command("sample", "digits", *options, "--count", 4, "--out", path)
        assert code == 0, err
        pictures.append(np.asarray(Image.open(path)))
    assert np.array_equal(pictures[0], pictures[1])
    code, out, err = command("evaluate", "digits", "--timesteps", "800,0", "--count", 16, "--json", "-")
    assert code == 0, err
    assert json.loads(out)["count"] == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("999,x", "'999,x', of which 'x' is no number"),
        ("", "'', of which '' is no number"),
        ("999,499,499", "holds 499 twice"),
        ("249,999", "from 249 up to 999"),
        ("1000,5", "holds 1000, the model was trained with 1000"),
        ("9,-5", "holds -5, the model was trained with 1000"),
    ],
)
def test_lists_that_no_sampler_can_run(command: Command, tmp_path: Path, text: str, says: str) -> None:
    for arguments in (
        ("build", "digits", "--target", "onnx", "--out", tmp_path / "b"),
        ("finetune", "digits", "--out", tmp_path / "run"),
        ("sample", "digits", "--out", tmp_path / "a.png"),
        ("evaluate", "digits", "--count", 16),
        ("inspect", "digits"),
    ):
        code, _, err = command(*arguments, "--timesteps", text)
        assert code == 2, err
        assert says in err.strip().splitlines()[-1]
        assert "float64 reference" not in err  # nothing was computed before the refusal
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--steps", 3), "--steps is 3, --timesteps lists 4"),
        (("--spacing", "mmd-ddm"), "--timesteps and --spacing mmd-ddm are both given"),
        (("--sampler", "pndm"), "--sampler pndm, which has a grid of its own"),
    ],
)
def test_a_list_beside_what_decides_the_grid_too(command: Command, more: tuple[object, ...], says: str) -> None:
    code, _, err = command("inspect", "digits", "--timesteps", LISTED, *more)
    assert code == 2
    assert says in err


def test_the_grid_of_mmd_ddm(command: Command) -> None:
    code, out, err = command("inspect", "digits", "--steps", 3, "--spacing", "mmd-ddm", "--json", "-")
    assert code == 0, err
    assert [step["timestep"] for step in json.loads(out)["plan"]["steps"]] == [999.0, 666.0, 333.0, 0.0]


def test_an_unknown_sampler_lists_the_known(command: Command) -> None:
    code, _, err = command("inspect", "digits", "--steps", 3, "--sampler", "magic")
    assert code == 2
    assert all(name in err for name in ("ddim", "unipc", "sa-solver"))


def test_help_names_grids_samplers_and_models(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command("build", "--help")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    for expected in ("mmd-ddm", "docs/schedulers.md", "ddim:FILE", "guided:FILE", "python:package.module:attribute"):
        assert expected in words


def test_a_bundle_holds_its_plan(command: Command, digits_bundle: Path, tmp_path: Path) -> None:
    for options in (("--timesteps", "9,5"), ("--sampler", "ddpm"), ("--eta", "0.5"), ("--spacing", "trailing")):
        for arguments in (("sample", digits_bundle, "--out", tmp_path / "a.png"), ("inspect", digits_bundle)):
            code, _, err = command(*arguments, *options)
            assert code == 2
            assert f"was built for one plan of 2 steps, {options[0]} is {options[1]}" in err
    code, _, err = command("inspect", digits_bundle, "--steps", 3)
    assert code == 2
    assert "takes 2 steps, --steps is 3" in err
    assert command("inspect", digits_bundle, "--steps", 2)[0] == 0


def test_any_sampler_can_be_tuned_on_any_list(command: Command, tmp_path: Path) -> None:
    run, bundle = tmp_path / "run", tmp_path / "b"
    config = tmp_path / "a.toml"
    config.write_text('model = "digits"\ntimesteps = [900, 30]\niterations = 1\nbatch_size = 8\nevaluate_count = 16\n')
    code, _, err = command("finetune", "--config", config, "--out", run)
    assert code == 0, err
    code, _, err = command("build", run, "--target", "onnx", "--timesteps", "900,30", "--out", bundle)
    assert code == 0, err
    assert Bundle.open(bundle).manifest.plan["settings"]["timestep_spacing"] == "leading:900,30"
    code, _, err = command("build", run, "--target", "onnx", "--timesteps", "900,31", "--out", tmp_path / "other")
    assert code == 2
    assert "tuned for ddim with 2 steps (leading:900,30), asked for ddim with 2 steps (leading:900,31)" in err


def test_a_probed_sampler_can_be_tuned(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "few.toml").write_text("evaluate_count = 16\n")
    small = ("--config", tmp_path / "few.toml", "--iterations", 1, "--batch-size", 8, "--out", run)
    code, _, err = command("finetune", "digits", "--sampler", "lms", "--steps", 2, *small)
    assert code == 0, err
    code, _, err = command("build", run, "--target", "onnx", "--out", tmp_path / "b")
    assert code == 0, err
    assert Bundle.open(tmp_path / "b").manifest.plan["settings"]["source"] == "probed"


def test_what_no_run_folder_can_hold_is_not_tuned(command: Command, tmp_path: Path) -> None:
    model = "python:tests.foreign_nets:Plain"
    code, _, err = command("finetune", model, "--steps", 2, "--out", tmp_path / "run")
    assert code == 2
    assert "no diffusers config" in err
    assert list(tmp_path.iterdir()) == []


def test_plot_draws_the_plan(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    code, _, err = command("inspect", "digits", "--steps", 8, "--sampler", "unipc", "--plot", path)
    assert code == 0, err
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    code, _, err = command("inspect", "digits", "--plot", tmp_path / "none.png")
    assert code == 2
    assert "give --steps or --timesteps" in err


@pytest.fixture(scope="module")
def ddim_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DDIM's own layout: plain weights and an average that differs."""
    path = tmp_path_factory.mktemp("files") / "ckpt.pth"
    settings = {"base": 32, "multipliers": (1, 2), "layers": 1, "attend": (), "channels": 1}
    plain, average = (random_unet(seed, **settings).state_dict() for seed in (0, 1))
    torch.save([plain, {}, 0, 0, average], path)
    return path


def test_ema_chooses_the_entry(command: Command, ddim_file: Path) -> None:
    hashes = {}
    for ema in ("true", "false"):
        code, out, err = command("inspect", f"ddim:{ddim_file}?sample_size=8", "--ema", ema, "--json", "-")
        assert code == 0, err
        hashes[ema] = json.loads(out)["sha256"]
    code, out, _ = command("inspect", f"ddim:{ddim_file}?ema=false&sample_size=8", "--json", "-")
    assert code == 0
    assert json.loads(out)["sha256"] == hashes["false"] != hashes["true"]


@pytest.mark.parametrize("command_line", [("build", "digits", "--target", "onnx", "--out", "b"), ("sample", "digits")])
def test_ema_of_what_has_none(command: Command, command_line: tuple[object, ...]) -> None:
    code, _, err = command(*command_line, "--ema", "false")
    assert code == 2
    assert "--ema false" in err
    assert "the model is digits" in err


def test_ema_without_a_model(command: Command, tmp_path: Path) -> None:
    code, _, err = command("finetune", "--ema", "false", "--steps", 2, "--out", tmp_path / "run")
    assert code == 2
    assert "--ema false goes with a MODEL" in err


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("ddim:a.pth", "ddim:a.pth?ema=a%26b"),
        ("guided:a.pt?image_size=64", "guided:a.pt?image_size=64&ema=a%26b"),
    ],
)
def test_ema_behind_other_options(model: str, expected: str) -> None:
    assert with_ema(model, "a&b") == expected


def test_parsing_and_asking() -> None:
    assert parse_timesteps(" 9, 5,1") == (9, 5, 1)
    assert [*map(repr, parse_timesteps("1000,62.5"))] == ["1000", "62.5"]
    with pytest.raises(UsageError, match="--timesteps is 9,5; leave it out"):
        PlanOptions(timesteps=(9, 5)).require_bundle("b", 2)
    PlanOptions(steps=2).require_bundle("b", 2)


def test_a_sampler_may_be_named_as_diffusers_names_its_class(command: Command) -> None:
    plans = []
    for sampler in ("EulerDiscreteScheduler", "euler"):
        code, out, err = command("inspect", "digits", "--steps", 2, "--sampler", sampler, "--json", "-")
        assert code == 0, err
        plans.append(json.loads(out)["plan"])
    assert plans[0] == plans[1]
