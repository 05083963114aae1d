"""What the contract does not ask of executorch, torch (AOTInductor) and coreai: bytes, states, and what they refuse."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

from mmd_export import environment
from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.environment import cpu_kind, why_no_cuda
from mmd_export.errors import BundleError, NotAvailableError
from mmd_export.runtime import RunOptions
from mmd_export.target_options import TargetOptions
from mmd_export.targets import get_target
from mmd_export.torch_compilers import inductor
from mmd_export.torch_compilers.inductor import hardware, private_folders, settings, without_paths
from mmd_runtime.aotinductor import _usable_device
from mmd_runtime.registry import get_runtime, runtime_for
from tests.export.bundles import make
from tests.older import needs

STEPS = 3
NAMES = ("coreai", "executorch", "torch")
PACKAGES = {"coreai": "coreai", "executorch": "executorch", "torch": "torch"}
OPTIONS = RunOptions(threads=1)
each_target = pytest.mark.parametrize("name", NAMES)


def options(name: str, out: Path, network: str = "Plain", **changes: Any) -> BuildOptions:
    if not (found := get_target(name).availability()).available:
        pytest.skip(f"target {name}: {found.detail}; {found.install}")
    return BuildOptions(model=f"python:tests.foreign_nets:{network}", target=name, out=out, steps=STEPS, **changes)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Two convolutions, three steps, bytes as output, batch 2; with each target that is here."""
    folder = tmp_path_factory.mktemp("built")
    usable = [name for name in NAMES if get_target(name).availability().available]
    return {name: build(options(name, folder / name, output="uint8", batch="2")) for name in usable}


def bundle_of(built: dict[str, Bundle], name: str) -> Bundle:
    if name not in built:
        pytest.skip(f"target {name}: {get_target(name).availability().detail}")
    return built[name]


@each_target
def test_bytes_are_those_of_the_reference(name: str, built: dict[str, Bundle]) -> None:
    bundle = bundle_of(built, name)
    golden = bundle.golden()
    session = runtime_for(bundle.manifest.format).open(bundle, OPTIONS)
    sample = session.run({"noise": golden.noise[:2]})["sample"]
    assert sample.dtype == np.uint8
    assert sample.shape == (2, 8, 8, 1)
    assert np.abs(sample.astype(int) - golden.sample[:2]).max() <= 1
    assert bundle.manifest.parity is not None
    assert ("state.3 teacher-forced" in bundle.manifest.parity) == (name != "torch")


@each_target
def test_weights_are_stored_once(name: str, built: dict[str, Bundle]) -> None:
    bundle = bundle_of(built, name)
    files = [path for path in bundle.folder.rglob("*") if path.relative_to(bundle.folder).parts[0].startswith("model.")]
    data = b"".join(path.read_bytes() for path in files if path.is_file())
    from tests.foreign_nets import Plain

    weight = Plain().last.weight.detach().numpy()
    layouts = {weight.tobytes(), weight.transpose(0, 2, 3, 1).tobytes()}  # XNNPACK has channels last
    assert sum(data.count(layout) for layout in layouts) == 1


def test_executorch_says_what_is_not_delegated(built: dict[str, Bundle]) -> None:
    counts = bundle_of(built, "executorch").manifest.graph.op_counts
    assert counts["XnnpackBackend"] == STEPS  # both convolutions of a call in one delegate
    assert counts["aten::round.out"] == 1
    assert "aten::convolution.out" not in counts


@pytest.mark.parametrize(
    ("name", "network", "operator"),
    [
        ("torch", "Custom", "foreign_nets.twice"),
        ("executorch", "Inverse", "linalg_check_errors"),
        *((name, *lacking) for name in ("coreai", "executorch") for lacking in (("Custom", "twice"), ("Bessel", "j0"))),
    ],
)
def test_an_operator_that_it_lacks_is_named(name: str, network: str, operator: str, tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match=rf"^target {name}.*{operator}") as error:
        build(options(name, tmp_path / "out", network))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@each_target
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_truncated_artefact_is_a_damaged_bundle(
    name: str, keep: float, built: dict[str, Bundle], tmp_path: Path
) -> None:
    whole = bundle_of(built, name)
    folder = Path(shutil.copytree(whole.folder, tmp_path / "cut"))
    largest = max((path for path in folder.rglob("*") if "model." in str(path) and path.is_file()), key=_size)
    data = largest.read_bytes()
    largest.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(BundleError, match=r"has .* bytes, the manifest says"):
        Bundle.open(folder)
    unchecked = Bundle(folder, whole.manifest)  # as if its maker had sealed it so
    runtime = runtime_for(whole.manifest.format)
    with pytest.raises(BundleError, match=r"model\.\w+ cannot be loaded: .*; rebuild the bundle") as error:
        runtime.open(unchecked, OPTIONS)
    assert "\n" not in str(error.value)


def _size(path: Path) -> int:
    return path.stat().st_size


@each_target
def test_a_missing_package_is_named_with_its_line(
    name: str, built: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, wanted = bundle_of(built, name), options(name, tmp_path / "out")
    found = importlib.util.find_spec
    hidden = PACKAGES[name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda each: None if each == hidden else found(each))
    monkeypatch.setattr("mmd_export.runtime.find_spec", importlib.util.find_spec)
    with pytest.raises(NotAvailableError, match=rf"target {name} cannot build here: {hidden} not .*; pip install") as e:
        build(wanted)
    assert e.value.exit_code == 3
    with pytest.raises(NotAvailableError, match=r"not installed; pip install"):
        runtime_for(bundle.manifest.format).open(bundle, OPTIONS)


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = options("torch", tmp_path / "out")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotAvailableError, match=r"target torch cannot build here: no C\+\+ compiler .*apt-get install"):
        build(wanted)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(NotAvailableError, match=f"--device cuda .*: torch {re.escape(torch.__version__)} "):
        build(options("torch", tmp_path / "out", of_target=TargetOptions(device="cuda")))
    assert not list(tmp_path.iterdir())


def test_why_torch_finds_no_gpu() -> None:
    assert why_no_cuda("2.13.0+cpu", None).startswith("torch 2.13.0+cpu is built without CUDA; install a CUDA build")
    assert why_no_cuda("2.13.0", "13.0").endswith("where nvidia-smi shows one, its CUDA Version 13.0 or newer")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vectors": "SVE256"}, "is code for vectors SVE256, this machine has"),
        ({"vectors": "DEFAULT"}, "is code for vectors DEFAULT, this machine has"),  # of before it had a baseline
        ({"machine": "riscv64"}, "is code for machine riscv64, this machine has"),
        ({"system": "Plan9"}, "is code for system Plan9, this machine has"),
        ({"device": "cuda", "compute_capability": "3.5"}, "CUDA|compute_capability 3.5"),
    ],
)
def test_code_of_another_machine_is_not_loaded(changes: dict[str, str], says: str, built: dict[str, Bundle]) -> None:
    bundle = bundle_of(built, "torch")
    assert bundle.manifest.hardware is not None
    other = bundle.manifest.model_copy(update={"hardware": {**bundle.manifest.hardware, **changes}})
    with pytest.raises(NotAvailableError, match=says):
        runtime_for("pt2").open(Bundle(bundle.folder, other), OPTIONS)


SVE = {"bf16": True, "sve": True, "sve_max_length": 256}


@pytest.mark.parametrize(
    ("machine", "word", "flags", "march", "vectors"),
    [
        ("x86_64", "AVX512", {}, "x86-64-v4", "AVX512"),
        ("x86_64", "AVX2", {}, "x86-64-v3", "AVX2"),
        ("x86_64", "NO AVX", {}, "x86-64", "x86-64"),
        ("aarch64", "DEFAULT", {"bf16": True, "neon": True}, "armv8-a", "armv8-a"),
        ("aarch64", "DEFAULT", {**SVE, "bf16": False}, "armv8-a", "armv8-a"),
        ("aarch64", "SVE256", SVE, "armv8-a", "SVE256"),
        ("aarch64", "DEFAULT", {**SVE, "sve2": True, "sve_max_length": 128}, "armv8-a", "SVE2-128"),
        ("arm64", "DEFAULT", {}, None, "DEFAULT"),
        ("ppc64le", "VSX", {}, None, "VSX"),
    ],
)
def test_code_is_for_what_the_manifest_says(
    machine: str, word: str, flags: dict[str, Any], march: str | None, vectors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never for ``native``, which torch adds on Linux where nothing is chosen."""
    needs("torch", "2.13", "it compiles for native alone, so the manifest names the processor")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: word)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    chosen = settings(Path("folder"))
    assert chosen.get("cpp.march") == march
    assert hardware("cpu")["vectors"] == vectors
    if machine == "aarch64" and sys.platform == "linux":  # what Inductor adds by itself
        (added,) = valid_vec_isa_list.__wrapped__()
        assert ("sve" in added.build_arch_flags()) == vectors.startswith("SVE")
        assert ("sve2" in added.build_arch_flags()) == vectors.startswith("SVE2-")


def test_code_for_native_is_for_one_processor(built: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(built, "torch")
    monkeypatch.setattr(inductor, "_has_option", lambda name: name != "cpp.march")
    monkeypatch.setattr("sys.platform", "linux")
    assert "cpp.march" not in settings(Path("folder"))
    native = Bundle(bundle.folder, bundle.manifest.model_copy(update={"hardware": hardware("cpu")}))
    assert _usable_device(native) == "cpu"
    here = cpu_kind()
    real = environment._cpu_info
    monkeypatch.setattr(environment, "_cpu_info", lambda key: ["fpu"] if key in ("flags", "Features") else real(key))
    with pytest.raises(NotAvailableError, match=f"is code for cpu {re.escape(here)}, this machine has .*, [0-9a-f]+;"):
        _usable_device(native)


def test_code_that_needs_no_vectors_runs_where_there_are_some(
    built: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(built, "torch")
    assert bundle.manifest.hardware is not None
    changes = {"machine": "x86_64", "vectors": "x86-64"}
    plain = bundle.manifest.model_copy(update={"hardware": {**bundle.manifest.hardware, **changes}})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for word in ("NO AVX", "AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda known=word: known)
        assert _usable_device(Bundle(bundle.folder, plain)) == "cpu"


def test_paths_are_blanked_in_text_alone() -> None:
    folders = ("/opt/env", "/usr")
    text = b"at /opt/env/include/a.h:3\0weights \x01/usr\x02 and /usr/lib/b.so\0"
    found = without_paths(text, folders)
    assert len(found) == len(text)
    assert found == b"at ////////" + b"/include/a.h:3\0weights \x01/usr\x02 and ////" + b"/lib/b.so\0"


def test_where_torch_lies_is_private() -> None:
    folders = private_folders("/scratch/x")
    assert {"/scratch/x", str(Path(torch.__file__).parent), str(Path.home()), sys.prefix} <= set(folders)
    assert list(folders) == sorted(folders, key=lambda folder: (-len(folder), folder))


@pytest.mark.parametrize("name", ["aotinductor", "torch"])
def test_the_number_of_threads_is_set_where_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP has one for each thread that starts parallel regions: the one that opened it need not be the one."""
    places: list[tuple[str, int, int]] = []

    def ran(*given: Any) -> Any:
        places.append(("ran", threading.get_ident(), 0))
        return given[0]

    def chain(_: Any, inputs: Any) -> Any:
        return {"sample": ran(inputs["noise"])}

    monkeypatch.setattr(torch, "set_num_threads", lambda count: places.append(("set", threading.get_ident(), count)))
    monkeypatch.setattr("mmd_runtime.aotinductor._usable_device", lambda _: "cpu")
    monkeypatch.setattr("mmd_runtime.aotinductor._load", lambda _: ran)
    monkeypatch.setattr("mmd_runtime.torch._sampler", lambda *_: None)
    monkeypatch.setattr("mmd_export.reference.run_chain", chain)
    bundle = make(tmp_path / "b")
    session = get_runtime(name).open(bundle, RunOptions(threads=3))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(session.run, {"noise": bundle.golden().noise[:1]}).result()
    (_, caller, _) = places[-1]
    assert caller != threading.get_ident()
    assert places[-2:] == [("set", caller, 3), ("ran", caller, 0)]
