"""Kit ``cpp``: compiled with warnings as errors, run plain and under sanitizers, against Python and the attacks."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.commands.embed import EmbedOptions, embed
from mmd_export.noise import normal, sampler_noise
from mmd_export.pictures import grid
from mmd_runtime.app import open_bundle
from tests.attacks import ATTACKS, Attack
from tests.export.bundles import UNDRAWN, undrawn
from tests.kits.cpp_builds import Build, call, configure_and_build, libraries
from tests.kits.engines import engine_bundle
from tests.kits.wrong import with_other_artefact, with_other_sample, with_truncated_bytes, with_unknown_ranges
from tests.models import LABELS, TWO_LEVELS, save_model
from tests.project.checks import ROOT

C_PROGRAM = Path(__file__).parent / "c_program"
MANY = 1_000_000


@pytest.fixture(scope="module")
def project(digits_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("projects") / "cpp"
    embed(EmbedOptions(digits_onnx, "cpp", out))
    return out


@pytest.fixture(scope="module")
def plain(project: Path) -> Build:
    """As C++20 and a shared library; the other build is C++17 and static."""
    return configure_and_build(project, project / "build", "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_CXX_STANDARD=20")


@pytest.fixture(scope="module")
def sanitized(project: Path) -> Build:
    """As a part of a program in C, with AddressSanitizer, its leak check and UndefinedBehaviorSanitizer.

    Any finding ends the program with an exit code and a message of its own.
    """
    options = (f"-DKIT={project}", "-DMMD_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug")
    return Build(configure_and_build(C_PROGRAM, project / "build-sanitized", *options).folder / "kit")


@pytest.fixture(scope="module")
def kit(plain: Build) -> ctypes.CDLL:
    library = ctypes.CDLL(str(plain.library))
    library.mmd_last_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def digits_openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "digits-openvino"
    build(BuildOptions("digits", "openvino", out, steps=2, verify=False))
    return out


@pytest.fixture(scope="session")
def tiny_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    model = save_model(folder / "tiny", **TWO_LEVELS)  # halves and doubles images
    build(BuildOptions(str(model), "executorch", folder / "tiny-1", steps=1, verify=False))
    return folder / "tiny-1"


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a plain bundle has not, all at once: noisy steps, classes, three channels as bytes, several batch sizes."""
    folder = tmp_path_factory.mktemp("bundles")
    model = save_model(folder / "model", in_channels=3, out_channels=3, **LABELS)
    build(
        BuildOptions(
            str(model), "onnx", folder / "all", steps=3, eta=1.0, output="uint8", batch="2,5", verify=False
        )
    )  # fmt: skip
    return folder / "all"


def test_the_project_tests_itself(plain: Build, project: Path) -> None:
    done = plain.run("--self-test", cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("self-test passed: digits-2 in onnxruntime 1.")
    assert done.stdout.endswith(" ms a batch\n")
    tested = call(["ctest", "--test-dir", plain.folder])
    assert "100% tests passed, 0 tests failed out of 2" in tested.stdout


def test_the_sources_build_without_a_bundle_beside_them(tmp_path: Path) -> None:
    done = call(["cmake", "-S", ROOT / "runtimes/cpp", "-B", tmp_path, *libraries()])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no bundle in" in done.stdout


@pytest.mark.parametrize("what", [*UNDRAWN, "bytes of a class"])
def test_a_picture_is_tried_only_where_a_seed_and_a_class_give_one(what: str, everything: Path, tmp_path: Path) -> None:
    drawn = what not in UNDRAWN
    bundle = everything if drawn else undrawn(tmp_path / "undrawn", what).folder
    embed(EmbedOptions(bundle, "cpp", tmp_path / "project"))
    done = call(["cmake", "-S", tmp_path / "project", "-B", tmp_path / "build", *libraries()])
    assert done.returncode == 0, done.stdout + done.stderr
    tests = call(["ctest", "--test-dir", tmp_path / "build", "--show-only", "--verbose"]).stdout
    assert re.findall(r"Test +#\d+: (.+)", tests) == ["self-test", *(["picture"] if drawn else [])]
    assert ('"--class-label" "0"' in tests) == drawn


def test_openvino_runs_its_bundles(plain: Build, digits_openvino: Path) -> None:
    done = plain.run("--bundle", digits_openvino, "--threads", 1, "--self-test")
    assert done.returncode == 0, done.stderr
    assert "passed: digits-2 in openvino 20" in done.stdout


def test_the_picture_is_that_of_python(plain: Build, digits_onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "seven.png"
    done = plain.run("--bundle", digits_onnx, "--seed", 7, "--count", 5, "--first", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    expected = grid(open_bundle(digits_onnx).sample(seed=7, count=5, first=2))[:, :, 0]
    found = np.asarray(Image.open(out))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # a value may lie just beside x.5
    assert len(np.unique(found)) > 20


def test_a_large_picture_in_color_is_whole(plain: Build, everything: Path, tmp_path: Path) -> None:
    """The writer of PNG, beyond one block of 65,535 bytes, as Pillow reads it."""
    out = tmp_path / "many.png"
    done = plain.run("--bundle", everything, "--count", 20, "--class-label", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    labels = np.full(20, 3, dtype=np.int64)
    expected = grid(open_bundle(everything).sample(seed=0, count=20, conditions={"class_labels": labels}))
    found = np.asarray(Image.open(out).convert("RGB"))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_every_attack_is_refused(attack: Attack, attacks: Path, sanitized: Build) -> None:
    done = sanitized.run("--bundle", attacks / attack.id, "--self-test")
    assert done.returncode == 5, done.stderr
    assert attack.says in done.stderr
    assert len(done.stderr.splitlines()) == 1, "not one line"


def test_nothing_leaks_and_nothing_is_undefined(
    sanitized: Build, digits_onnx: Path, digits_openvino: Path, tiny_pte: Path, everything: Path, tmp_path: Path
) -> None:
    for bundle in (digits_onnx, digits_openvino, tiny_pte, everything):
        labels = ["--class-label", 1] if bundle == everything else []
        for action in (["--self-test"], ["--count", 3, "--out", tmp_path / "a.png", *labels]):
            done = sanitized.run("--bundle", bundle, *action)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""


def test_executorch_runs_its_bundles(plain: Build, tiny_pte: Path) -> None:
    done = plain.run("--bundle", tiny_pte, "--self-test")
    assert done.returncode == 0, done.stderr
    assert "passed: tiny-1 in executorch, " in done.stdout
    done = plain.run("--bundle", tiny_pte, "--threads", 1, "--self-test")
    assert done.returncode == 3
    assert "ExecuTorch chooses its threads itself" in done.stderr


def test_an_engine_runs_each_batch_in_its_profile(sanitized: Build, tmp_path: Path) -> None:
    """In a stand-in of TensorRT: three golden images are a run of two and a run of one."""
    done = sanitized.run("--bundle", engine_bundle(tmp_path / "engine", "1 2", 1, 2), "--self-test")
    assert done.returncode == 0, done.stderr
    assert "passed: digits-2 in tensorrt 10.13, 3 images" in done.stdout


@pytest.mark.parametrize(("version_compat", "code"), [(True, 0), (False, 5)])
def test_code_in_an_engine_runs_where_the_lock_says_that_it_is_there(
    version_compat: bool, code: int, plain: Build, tmp_path: Path
) -> None:
    engine = engine_bundle(tmp_path / "engine", "1 lean", 1, version_compat=version_compat)
    done = plain.run("--bundle", engine, "--self-test")
    assert done.returncode == code, done.stderr
    assert ("model.plan cannot be loaded: TensorRT: the engine holds host code" in done.stderr) == (code == 5)


def test_a_label_that_the_model_does_not_know(plain: Build, everything: Path, tmp_path: Path) -> None:
    done = plain.run("--bundle", everything, "--class-label", 5, "--out", tmp_path / "none.png")
    assert done.returncode == 2, done.stderr
    assert "input 'class_labels' holds 5 to 5, the manifest says 0 to 4" in done.stderr


def test_a_run_that_fails_is_no_damaged_bundle(plain: Build, everything: Path, tmp_path: Path) -> None:
    unknown = with_unknown_ranges(everything, tmp_path / "unknown")
    refused = plain.run("--bundle", unknown, "--class-label", 999, "--out", tmp_path / "none.png")
    engine = plain.run("--bundle", engine_bundle(tmp_path / "engine", "3", 1), "--self-test")
    for done, library in ((refused, "onnxruntime"), (engine, "TensorRT")):
        assert done.returncode == 1, done.stderr
        assert f": {library} failed while running it: " in done.stderr
        assert "rebuild" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_library_shows_what_the_header_marks_and_no_more(plain: Build) -> None:
    """Hidden by default, as on Windows: a program finds what it links, and nothing of the inside."""
    shown = call(["nm", "-DC", "--defined-only", plain.library]).stdout
    for name in ("Tensor::Tensor(mmd::DType,", "Batch::next(long) const", "Manifest::find(", "Sampler::run("):
        assert f" mmd::{name}" in shown
    assert "mmd::Backend" not in shown


def test_classes_bytes_noisy_steps_and_batches(plain: Build, kit: ctypes.CDLL, everything: Path) -> None:
    done = plain.run("--bundle", everything, "--self-test")
    assert done.returncode == 0, done.stderr
    assert "(tolerance 1)" in done.stdout
    labels = np.arange(8, dtype=np.int64) % 5
    expected = open_bundle(everything).sample(seed=2**63 + 5, count=8, first=3, conditions={"class_labels": labels})
    found = sampled(kit, everything, 2**63 + 5, 3, np.zeros_like(expected), labels)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert np.abs(found.astype(int) - found[:1].astype(int)).max() > 20


def sampled(
    kit: ctypes.CDLL, bundle: Path, seed: int, first: int, images: NDArray[Any], labels: NDArray[np.int64]
) -> NDArray[Any]:
    sampler = ctypes.c_void_p()
    assert kit.mmd_open(str(bundle).encode(), 1, ctypes.byref(sampler)) == 0, kit.mmd_last_error()
    try:
        place = images.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(images.nbytes)
        given = labels.ctypes.data_as(ctypes.c_void_p)
        status = kit.mmd_sample(sampler, ctypes.c_uint64(seed), first, len(images), given, place, size)
        assert status == 0, kit.mmd_last_error()
    finally:
        kit.mmd_close(sampler)
    return images


class GivenTensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p), ("dtype", ctypes.c_int), ("rank", ctypes.c_size_t),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("data", ctypes.c_void_p),
    )  # fmt: skip


def test_inputs_of_the_callers_own(kit: ctypes.CDLL, digits_onnx: Path) -> None:
    noise = sampler_noise(11, 3, (1, 8, 8), 0)["noise"]
    shape = (ctypes.c_int64 * 4)(*noise.shape)
    given = GivenTensor(b"noise", 0, 4, shape, noise.ctypes.data)
    images, sampler = np.zeros_like(noise), ctypes.c_void_p()
    assert kit.mmd_open(str(digits_onnx).encode(), 1, ctypes.byref(sampler)) == 0
    size = ctypes.c_size_t(images.nbytes)
    assert kit.mmd_run(sampler, ctypes.byref(given), 1, images.ctypes.data_as(ctypes.c_void_p), size) == 0
    np.testing.assert_allclose(images, open_bundle(digits_onnx).sample(seed=11, count=3), atol=1e-5)
    given.name = b"nose"
    assert kit.mmd_run(sampler, ctypes.byref(given), 1, images.ctypes.data_as(ctypes.c_void_p), size) == 2
    assert b"input 'nose' is unknown" in kit.mmd_last_error()
    kit.mmd_close(sampler)


@pytest.mark.parametrize(("seed", "stream", "image"), [(7, 0, 0), (2**64 - 1, 3, 2**32 - 1)])
def test_a_million_values_of_a_seed_are_those_of_python(kit: ctypes.CDLL, seed: int, stream: int, image: int) -> None:
    found = np.zeros(MANY, dtype=np.float32)
    place = found.ctypes.data_as(ctypes.c_void_p)
    assert kit.mmd_normal(ctypes.c_uint64(seed), stream, ctypes.c_uint32(image), place, ctypes.c_size_t(MANY)) == 0
    expected = normal(seed, (1, 1, MANY), range(image, image + 1), stream).reshape(-1)
    steps = np.abs(found.view(np.int32).astype(np.int64) - expected.view(np.int32))
    # Where numpy computes ln, cos and sin by other instructions than the C library, a float64 may differ in its last
    # bit, which moves about one float32 in 2^27 by one step; on most machines none of a million differs.
    assert steps.max() <= 1
    assert np.count_nonzero(steps) <= 2


@pytest.mark.parametrize(("offset", "says"), [(0.001, ""), (5e-5, r" mean error \S+e-05 \(limit 1\.25e-05\)")])
def test_a_wrong_image_fails_the_self_test(
    offset: float, says: str, plain: Build, digits_onnx: Path, tmp_path: Path
) -> None:
    """By more than the tolerance in one value, or by less in all."""
    done = plain.run("--bundle", with_other_sample(digits_onnx, tmp_path / "wrong", offset), "--self-test")
    assert done.returncode == 4
    assert re.match(f"self-test FAILED{says}: digits-2 in onnxruntime", done.stdout), done.stdout


def test_bytes_that_are_truncated_fail_the_self_test(plain: Build, everything: Path, tmp_path: Path) -> None:
    """No byte is off by more than the one level that rounding may take."""
    done = plain.run("--bundle", with_truncated_bytes(everything, tmp_path / "truncated"), "--self-test")
    assert done.returncode == 4
    assert re.match(r"self-test FAILED mean error \S+ \(limit 0\.0128\): ", done.stdout), done.stdout
    assert "largest error 1 (tolerance 1)" in done.stdout


def test_an_artefact_that_does_not_load_is_one_line(sanitized: Build, digits_onnx: Path, tmp_path: Path) -> None:
    done = sanitized.run("--bundle", with_other_artefact(digits_onnx, tmp_path / "broken", b"onnx?"), "--self-test")
    assert done.returncode == 5
    assert "model.onnx cannot be loaded: onnxruntime: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seed", "-1"], "--seed is '-1'; give a whole number from 0 to 18446744073709551615"),
        (["--seed", "18446744073709551616"], "give a whole number"),
        (["--count", "0"], "0 images from 0 on; ask for one or more"),
        (["--first", "4294967295", "--count", "2"], "ask for one or more below 2^32"),
        (["--cuont", "3"], "--cuont is unknown"),
        (["--class-label", "3"], "input 'class_labels' is unknown; leave it out"),
        (["--bundle", "nowhere"], "nowhere is not a bundle: it has no manifest.json"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(
    arguments: list[str], says: str, plain: Build, project: Path, tmp_path: Path
) -> None:
    done = plain.run(*arguments, "--out", tmp_path / "none.png", cwd=project)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def c_program(sanitized: Build) -> Path:
    """The program in C that the kit was compiled for."""
    return sanitized.folder.parent / "use_from_c"


def test_a_c_program_uses_it(c_program: Path, digits_onnx: Path) -> None:
    done = call([c_program, digits_onnx, "draw"])
    assert done.returncode == 0, done.stderr
    value = open_bundle(digits_onnx).sample(seed=7)[0, 0, 0, 0]
    text, found = done.stdout.rsplit(" ", 1)
    assert text == f"1 x 8 x 8 of type 0, {Bundle.open(digits_onnx).golden().count} images, first value"
    assert abs(float(found) - float(value)) < 1e-5


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("small", "images hold 256 bytes, the buffer 255; give one of that size"),
        ("null", "sampler or images is NULL"),
        ("labels", "input 'class_labels' is unknown"),
    ],
)
def test_a_c_program_is_told_what_is_wrong(action: str, says: str, c_program: Path, digits_onnx: Path) -> None:
    done = call([c_program, digits_onnx, action])
    assert done.returncode == 2
    assert says in done.stderr


def test_the_leak_check_can_fail(c_program: Path, digits_onnx: Path) -> None:
    done = call([c_program, digits_onnx, "leak"], environment={"ASAN_OPTIONS": "exitcode=23"})
    assert done.returncode == 23
    assert "LeakSanitizer: detected memory leaks" in done.stderr
