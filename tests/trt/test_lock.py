"""Where an engine may run: every fact of its lock, and what is said where one does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmd_export.errors import BundleError, NotAvailableError
from mmd_export.trt.device import Device
from mmd_export.trt.library import RTX, TENSORRT, Library, system
from mmd_export.trt.lock import LockFacts, capability_fits, require_lock, version_fits

DEVICE = Device("a GPU", "8.9", "580.65.06", "13.0")
FACTS = LockFacts("tensorrt", "10.13.2.6", system(), "8.9", "0" * 64, "a GPU", "580.65.06", "13.0")


def check(facts: LockFacts, device: Device = DEVICE, version: str = "10.13.2.6", library: Library = TENSORRT) -> None:
    require_lock("digits-5", facts, library, version, device)


def test_a_lock_that_holds() -> None:
    check(FACTS)
    check(replace(FACTS, system="any", cuda="none", gpu="none"))
    check(FACTS, replace(DEVICE, cuda="13.1", driver="590.1", name="another"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (replace(FACTS, version="10.12.0"), "built for TensorRT version 10.12.0, here is 10.13.2.6"),
        (replace(FACTS, capabilities="9.0"), "built for compute capability 9.0, here is 8.9"),
        (replace(FACTS, capabilities="8.0,12.0"), "built for compute capability 8.0,12.0, here is 8.9"),
        (replace(FACTS, system="plan9-mips"), "built for system plan9-mips, here is "),
        (replace(FACTS, cuda="14.2"), "built for CUDA of the driver 14.2, here is 13.0"),
        (replace(FACTS, library="tensorrt-rtx"), "built for library tensorrt-rtx, here is tensorrt"),
    ],
)
def test_a_lock_that_does_not_hold_names_both_values(facts: LockFacts, message: str) -> None:
    with pytest.raises(NotAvailableError) as error:
        check(facts)
    assert message in str(error.value)
    assert "bundle digits-5: " in str(error.value)
    assert "finalize" in str(error.value)
    assert error.value.exit_code == 3


def test_an_unknown_library_is_damage() -> None:
    with pytest.raises(BundleError, match="names the library 'tensorflow'"):
        check(replace(FACTS, library="tensorflow"))


def test_the_older_driver_is_refused_the_newer_is_not() -> None:
    check(FACTS, replace(DEVICE, cuda="14.0"))
    with pytest.raises(NotAvailableError, match=r"CUDA of the driver 13.0, here is 12.8"):
        check(FACTS, replace(DEVICE, cuda="12.8"))


@pytest.mark.parametrize(
    ("compat", "version", "fits"),
    [
        ("no", "10.13.2.6", True),
        ("no", "10.13.3", False),
        ("yes", "10.13.3", True),
        ("yes", "11.0", True),
        ("yes", "10.9.0", False),  # 9 is less than 13, though not as text
        ("yes", "10.12", False),
    ],
)
def test_versions(compat: str, version: str, fits: bool) -> None:
    assert version_fits(replace(FACTS, version_compat=compat), version) == fits


@pytest.mark.parametrize(
    ("capabilities", "here", "fits"),
    [
        ("8.9", "8.9", True),
        ("8.9", "8.6", False),
        ("8.6,8.9,12.0", "12.0", True),
        ("8.6,8.9,12.0", "12.1", False),
        ("8.0+", "12.0", True),  # 12 is more than 8, though not as text
        ("8.0+", "7.5", False),
        ("", "8.9", False),
    ],
)
def test_capabilities(capabilities: str, here: str, fits: bool) -> None:
    assert capability_fits(replace(FACTS, capabilities=capabilities), here) == fits


def test_facts_go_through_the_manifest() -> None:
    assert LockFacts.read("b", FACTS.to_dict()) == FACTS
    assert all(isinstance(value, str) for value in FACTS.to_dict().values())


def test_facts_that_are_missing_or_unknown_are_damage() -> None:
    whole = FACTS.to_dict()
    with pytest.raises(BundleError, match=r"bundle b: manifest.hardware lacks 'library'; rebuild") as error:
        LockFacts.read("b", None)
    assert error.value.exit_code == 5
    with pytest.raises(BundleError, match="lacks 'capabilities'"):
        LockFacts.read("b", {name: value for name, value in whole.items() if name != "capabilities"})
    with pytest.raises(BundleError, match="has the unknown 'colour'"):
        LockFacts.read("b", whole | {"colour": "green"})


def test_rtx_engines_are_locked_to_their_release() -> None:
    facts = LockFacts("tensorrt-rtx", "1.7.1.116", "any", "8.9,12.0", "0" * 64)
    check(facts, version="1.7.1.116", library=RTX)
    with pytest.raises(NotAvailableError, match=r"TensorRT-RTX version 1.7.1.116, here is 1.8.0"):
        check(facts, version="1.8.0", library=RTX)
