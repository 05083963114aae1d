"""The page: it holds what was measured, asks for nothing from anywhere, and a browser has nothing to say about it."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.cli import app, run
from mmd_export.numbers import latency_rows, parity_rows
from mmd_export.report.model import BundleFacts, Curve, parity_curve, pictures_of
from mmd_export.report.page import render
from tests.report.browser import DARK, LIGHT, look
from tests.report.conftest import Written

TESTS = [
    {"noise": "fresh", "features": "projection", "count": 2000, "mmd2": 1.5e-5, "p_value": 0.431, "level": 0.005,
     "frechet": 0.0123, "passed": True},
]  # fmt: skip
STEP = {"step": 1, "total_max": 1e-6, "local_max": 1e-6, "inherited_max": 0.0, "growth": None, "gain": 1.2}


def call(*arguments: object) -> int:
    return run(app, [str(argument) for argument in arguments])


@pytest.fixture
def page(digits: Path, verified: dict[str, Any], measured: dict[str, Any], written: Written, tmp_path: Path) -> Path:
    out = tmp_path / "report.html"
    files = ("--verify", written("verify.json", verified), "--bench", written("bench.json", measured))
    assert call("report", digits, "-o", out, *files) == 0
    return out


def test_the_page_holds_the_measured_numbers_and_the_pictures(
    page: Path, verified: dict[str, Any], measured: dict[str, Any]
) -> None:
    text = page.read_text()
    for row in (*parity_rows(verified), *latency_rows(measured)):
        for cell in row:
            assert cell.replace("'", "&#39;").replace("<", "&lt;") in text
    assert text.count("data:image/png;base64,") == 3
    assert text.count("<svg ") == 2
    assert "free-running" in text
    assert "teacher-forced" in text
    assert "75 % of what can be compared was compared" in text
    assert "images a second" in text
    assert "host MiB" in text


def test_the_page_asks_for_nothing_and_names_no_place(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert not re.search(r"url\((?!#)", text)
    assert str(Path.home()) + "/" not in text
    assert str(page.parent) not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:href="|url\()#([^")]+)', text):
        assert used in ids


def test_the_same_json_gives_the_same_page(
    page: Path, digits: Path, verified: dict[str, Any], measured: dict[str, Any]
) -> None:
    bundle = Bundle.open(digits)
    facts = BundleFacts(bundle, verified, bundle.golden().sample)
    assert render((facts,), measured) == render((facts,), measured)


def test_a_browser_has_nothing_to_say(page: Path, tmp_path: Path) -> None:
    for scheme, size in ((LIGHT, (390, 844)), (DARK, (1280, 900))):
        shot = tmp_path / f"{scheme}.png"
        look(page, tmp_path, f"--screenshot={shot}", size=size, scheme=scheme)
        pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
        assert pixels.shape == (size[1], size[0])
        median = float(np.median(pixels))
        assert median > 200 if scheme == LIGHT else median < 60
        assert pixels.std() > 10


def test_a_phone_scrolls_tables_but_not_the_page(page: Path, tmp_path: Path) -> None:
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    (tmp_path / "measured.html").write_text(text.replace("</body>", script))
    dom = look(tmp_path / "measured.html", tmp_path, "--dump-dom", size=(390, 844))
    found = re.search(r"<title>(\d+) of (\d+)</title>", dom)
    assert found is not None
    assert found[1] == found[2]
    assert int(found[2]) <= 500  # Chromium makes no window narrower than that without a screenshot


@pytest.mark.parametrize("fault", ['<img src="http://127.0.0.1:9/x.png">', "<script>nothing.there()</script>"])
def test_the_console_is_listened_to(page: Path, tmp_path: Path, fault: str) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", f"{fault}</body>"))
    with pytest.raises(AssertionError, match="the console says"):
        look(broken, tmp_path, "--dump-dom")


def test_the_ladder_may_hold_more(
    digits: Path, verified: dict[str, Any], measured: dict[str, Any], written: Written, tmp_path: Path
) -> None:
    more = copy.deepcopy(verified)
    more["rungs"].append({"rung": 7, "title": "distribution", "verdict": "passed", "tests": TESTS})
    more["error_budget"] = {"steps": [STEP]}
    out = tmp_path / "report.html"
    files = ("--verify", written("verify.json", more), "--bench", written("bench.json", measured))
    assert call("report", digits, "-o", out, *files) == 0
    text = out.read_text()
    assert "Distribution test" in text
    for number in ("0.431", "1.5e-05", "0.0123"):
        assert f"<td>{number}</td>" in text
    assert "Error budget over the steps" in text


def test_a_failed_parity_is_on_the_page(digits: Path, verified: dict[str, Any]) -> None:
    bundle, broken = Bundle.open(digits), copy.deepcopy(verified)
    broken["passed"], broken["rungs"][-1]["verdict"] = False, "failed"
    sample = bundle.golden().sample.copy()
    sample[0, 0, 0, 0] = np.nan
    facts = BundleFacts(bundle, broken, sample)
    found = pictures_of(facts)
    assert found is not None
    assert found.largest == 1.0
    text = render((facts,), {})
    assert '<span class="failed">failed</span>' in text
    assert "<h2>Latency</h2>" not in text


def test_the_curve_is_that_of_rung_6(digits: Path, verified: dict[str, Any]) -> None:
    curve = parity_curve(BundleFacts(Bundle.open(digits), verified))
    assert {kind: [step for step, _ in points] for kind, points in curve.steps.items()} == {
        "free-running": [1, 2],
        "teacher-forced": [1, 2],
    }
    rung = verified["rungs"][-1]
    named = {comparison["name"]: comparison["max_abs"] for comparison in rung["comparisons"]}
    assert curve.steps["free-running"][1] == (2, named["state.2"])
    assert curve.atol == rung["atol"]
    assert parity_curve(BundleFacts(Bundle.open(digits), {})) == Curve({}, None)


def test_the_card_carries_the_numbers_of_the_report(
    digits: Path, verified: dict[str, Any], measured: dict[str, Any], written: Written, tmp_path: Path
) -> None:
    mine, out = tmp_path / "mine", tmp_path / "report.html"
    shutil.copytree(digits, mine)
    files = ("--verify", written("verify.json", verified), "--bench", written("bench.json", measured))
    for _ in range(2):
        assert call("report", mine, "-o", out, *files, "--update-card") == 0
    card, text = Bundle.open(mine).card, out.read_text()
    assert card.count("## Latency") == card.count("## Parity as measured") == 1
    assert "Not measured" not in card
    for row in (*parity_rows(verified), *latency_rows(measured)):
        assert f"| {' | '.join(row)} |" in card
        assert row[1].replace("'", "&#39;") in text
    assert "## Check it where it runs" in card


def test_the_card_of_a_bundle_that_was_not_timed_keeps_its_latency(
    digits: Path, measured: dict[str, Any], written: Written, tmp_path: Path
) -> None:
    mine, other, out = tmp_path / "mine", tmp_path / "other", tmp_path / "report.html"
    shutil.copytree(digits, mine)
    build(BuildOptions("python:tests.foreign_nets:Plain", "onnx", other, steps=1, verify=False))
    card = ("-o", out, "--bench", written("bench.json", measured), "--update-card")
    assert call("report", other, mine, *card) == 0
    assert "Not measured" not in Bundle.open(mine).card
    assert "## Latency\n\nNot measured on this bundle yet: " in Bundle.open(other).card
    assert "## Parity as measured\n" in Bundle.open(other).card


def test_a_damaged_bundle_is_refused(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, out = tmp_path / "damaged", tmp_path / "report.html"
    shutil.copytree(digits, damaged)
    model = damaged / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"!")
    assert call("report", digits, damaged, "-o", out) == 5
    assert "the manifest says" in capsys.readouterr().err
    assert not out.exists()


OTHER = "f" * 12  # the hash of another artefact with the same name


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "--verify",
            {"bundle": "digits-2", "artefact_sha256": "f" * 64, "rungs": []},
            "is of bundle 'digits-2' (ffffffffffff), the report",
        ),
        ("--verify", {"passed": True}, "has no 'rungs'"),
        (
            "--bench",
            {"summary": {}, "artefacts": {"digits-2": "f" * 64}},
            "measured digits-2 (ffffffffffff), the report is of digits-2",
        ),
        ("--bench", [], "holds a list, an object is expected"),
        ("--bench", {"candidates": []}, "has no 'summary'"),
    ],
)
def test_files_of_something_else_are_refused(
    digits: Path,
    written: Written,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: Any,
    message: str,
) -> None:
    code = call("report", digits, "-o", tmp_path / "r.html", "--seconds", 0, flag, written("file.json", value))
    assert code == 2
    assert message in capsys.readouterr().err


def test_bench_json_is_what_the_report_reads(measured: dict[str, Any]) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False))["schema_version"] == 1
    assert {row["batch"] for row in measured["throughput"]} == {1, 2}
    assert measured["cold"]["digits-2"]["host_mib"] > 10
