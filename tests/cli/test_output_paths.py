"""Where results may be written: tried before any work, and never inside a bundle."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Command, fails


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sample", "--out", "grid.jpg"), "--out is grid.jpg, pictures are written as PNG; name it grid.png"),
        (("inspect", "--plot", "plan.pdf"), "--plot is plan.pdf, pictures are written as PNG; name it plan.png"),
        (("evaluate", "--plot", "values.svg"), "--plot is values.svg, pictures are written as PNG; name it values.png"),
        (("inspect", "--json", "."), "--json . cannot be written: it is a folder; name another file"),
        (("verify", "--junit", f"{__file__}/a.xml"), f"/a.xml cannot be written: {__file__} is no folder; name"),
        (("bench", "--summary", "."), "--summary . cannot be written: it is a folder; name another file"),
        (("bench", "--save-baseline", "."), "--save-baseline . cannot be written: it is a folder; name another file"),
        (("sample", "--out", "."), "--out . cannot be written: it is a folder; name another file"),
        (("report", "-o", "."), "--out . cannot be written: it is a folder; name another file"),
        (("evaluate", "--plot", "."), "--plot . cannot be written: it is a folder; name another file"),
        (("inspect", "--plot", "."), "--plot . cannot be written: it is a folder; name another file"),
        (("sample", "--out", f"{__file__}/a.png"), f"/a.png cannot be written: {__file__} is no folder; name"),
        (("report", "--out", f"{__file__}/a.html"), f"/a.html cannot be written: {__file__} is no folder; name"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(
    command: Command, arguments: tuple[str, ...], says: str
) -> None:
    name, *options = arguments
    fails(command, 2, says, name, "nowhere", *options)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, in which even root can make nothing")
def test_a_place_is_tried_and_its_rights_are_not_believed(command: Command) -> None:
    fails(command, 2, "--json /proc/a.json cannot be written: /proc: ", "inspect", "nowhere", "--json", "/proc/a.json")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, in which even root can make nothing")
def test_where_a_link_leads_is_tried(command: Command, tmp_path: Path) -> None:
    link = tmp_path / "a.json"
    link.symlink_to("/proc/a.json")
    fails(command, 2, f"--json {link} cannot be written: /proc: ", "inspect", "nowhere", "--json", link)


@pytest.mark.parametrize(
    ("name", "options", "flag"),
    [
        ("sample", (), "--out grid.png"),
        ("report", (), "--out report.html"),
        ("verify", ("--json", "new/verify.json"), "--json new/verify.json"),
        ("verify", ("--junit", "-"), "--junit -"),
        ("bench", ("--save-baseline", "ratio.json"), "--save-baseline ratio.json"),
        ("evaluate", ("--plot", "values.png"), "--plot values.png"),
    ],
)
def test_nothing_is_written_into_a_bundle(
    command: Command,
    digits_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: tuple[str, ...],
    flag: str,
) -> None:
    """Its files are sealed: one more, and it is refused for good."""
    before = sorted(digits_bundle.rglob("*"))
    monkeypatch.chdir(digits_bundle)
    says = f"{flag} cannot be written: {digits_bundle.resolve()} is a bundle, which takes no other files; name another"
    fails(command, 2, says, name, ".", *options)
    assert sorted(digits_bundle.rglob("*")) == before


def test_the_commands_of_a_card_leave_the_bundle_as_it_is(
    command: Command, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(digits_bundle, tmp_path / "b"))
    monkeypatch.chdir(bundle)
    said = re.findall(r"`mmd-export ((?:verify|sample) .*?)`", (bundle / "README.md").read_text(encoding="utf-8"))
    assert [line.split()[0] for line in said] == ["verify", "sample"]
    for line in (*said, said[0]):
        code, _, err = command(*line.split())
        assert code == 0, err
    assert (tmp_path / "grid.png").is_file()
