"""What every runtime must do, for each that is found, on one stochastic, class-conditional bundle."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmd_export.build import BuildOptions, build
from mmd_export.bundle import Bundle
from mmd_export.errors import MmdExportError, NotAvailableError, UsageError
from mmd_export.parity import artefact_rung
from mmd_export.runtime import ChainSession, RunOptions, Runtime, Session
from mmd_export.targets import get_target, target_names
from mmd_runtime.registry import get_runtime, runtime_for, runtime_names
from tests.contract.required import skip

STEPS = 2
RUNS_OF_A_THREAD = 50
Opened = tuple[Bundle, Session, ChainSession | None]


@pytest.fixture(scope="module", params=runtime_names())
def name(request: pytest.FixtureRequest) -> str:
    """Every runtime, by file name."""
    return str(request.param)


@pytest.fixture(scope="module")
def bundles(tiny_labels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """One bundle a format that can be built and run here, unverified; step noise, labels, batches 1 to 3 or 3."""
    found: dict[str, Bundle] = {}
    for target_name in target_names():
        target = get_target(target_name)
        if not runtime_for(target.format).availability().available:
            continue
        if target.availability().available and target.format not in found:
            out = tmp_path_factory.mktemp("bundles") / target_name
            batch = "1..3" if target.several_batches else "3"
            options = BuildOptions(str(tiny_labels), target_name, out, steps=STEPS, batch=batch, verify=False)
            found[target.format] = build(options)
    return found


@pytest.fixture(scope="module")
def opened(name: str, bundles: dict[str, Bundle], tiny_labels: Path) -> Opened:
    """The bundle in the runtime; a skip says why it cannot run here. A runtime without formats opens any bundle."""
    runtime = get_runtime(name)
    if not (found := runtime.availability()).available:
        skip("runtime", name, f"{found.detail}; {found.install}")
    formats = runtime.formats or tuple(bundles)
    usable = [bundles[known] for known in formats if known in bundles]
    if not usable:
        skip("runtime", name, f"no target builds {', '.join(formats)} here")
    options = RunOptions(threads=1, checkpoint=str(tiny_labels))
    chain = None if runtime.unseen else runtime.open_chain(usable[0], options)
    return usable[0], runtime.open(usable[0], options), chain


def chain_of(name: str, opened: Opened) -> ChainSession:
    """The opened chain, or a skip that says why it cannot be seen."""
    bundle, _, chain = opened
    if chain is None:
        with pytest.raises(NotAvailableError, match="states"):
            get_runtime(name).open_chain(bundle, RunOptions(threads=1))
        pytest.skip(f"runtime {name}: {get_runtime(name).unseen}")
    return chain


def counts(bundle: Bundle) -> list[int]:
    """The batch sizes to try."""
    return [count for count in (1, 2, 3) if bundle.manifest.batch.allows(count)]


def golden_inputs(bundle: Bundle, count: int) -> dict[str, Any]:
    return {
        name: np.ascontiguousarray(array[:, :count] if name == "step_noise" else array[:count])
        for name, array in bundle.golden().inputs.items()
    }


def test_it_keeps_the_protocols(name: str, opened: Opened) -> None:
    runtime = get_runtime(name)
    assert isinstance(runtime, Runtime)
    assert runtime.name == name
    _, session, chain = opened
    assert isinstance(session, Session)
    assert chain is None if runtime.unseen else isinstance(chain, ChainSession)


def test_the_bundle_has_every_kind_of_input(name: str, opened: Opened) -> None:
    bundle, _, _ = opened
    assert {spec.name for spec in bundle.manifest.inputs} == {"noise", "step_noise", "class_labels"}
    assert bundle.golden().steps == STEPS


def test_the_sample_is_golden(name: str, opened: Opened) -> None:
    bundle, session, _ = opened
    for count in counts(bundle):
        outputs = session.run(golden_inputs(bundle, count))
        assert set(outputs) == {"sample"}
        assert outputs["sample"].dtype == np.float32
        np.testing.assert_allclose(outputs["sample"], bundle.golden().sample[:count], rtol=0, atol=1e-5)


def test_every_state_is_golden(name: str, opened: Opened) -> None:
    bundle, chain = opened[0], chain_of(name, opened)
    golden, inputs = bundle.golden(), golden_inputs(bundle, 3)
    free = chain.run_chain(inputs)
    assert set(free) == {"sample", *(f"state.{k}" for k in range(1, STEPS + 1))}
    for k, expected in enumerate(golden.states, start=1):
        np.testing.assert_allclose(free[f"state.{k}"], expected[:3], rtol=0, atol=1e-5)
        before = {f"state.{j}": golden.states[j - 1][:3] for j in range(1, k)}
        forced = chain.run_step(k, inputs | before)
        assert forced.dtype == np.float32
        np.testing.assert_allclose(forced, expected[:3], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.clip(free[f"state.{STEPS}"], -1, 1), free["sample"])


def test_a_forced_step_starts_from_what_it_is_given(name: str, opened: Opened) -> None:
    bundle, chain = opened[0], chain_of(name, opened)
    inputs = golden_inputs(bundle, 3)
    right = chain.run_step(2, inputs | {"state.1": bundle.golden().states[0][:3]})
    wrong = chain.run_step(2, inputs | {"state.1": bundle.golden().states[0][:3] + np.float32(0.5)})
    assert np.abs(wrong - right).max() > 0.1


def test_rung_6_passes(name: str, opened: Opened) -> None:
    bundle, session, chain = opened
    rung = artefact_rung(bundle, session, chain, get_runtime(name).unseen)
    assert rung.verdict == "passed"
    assert len(rung.comparisons) == (1 if chain is None else 1 + 2 * STEPS)
    assert bool(rung.unseen) == (chain is None)


def test_every_input_matters(name: str, opened: Opened) -> None:
    bundle, session, _ = opened
    inputs = golden_inputs(bundle, 3)
    base = session.run(inputs)["sample"]
    np.testing.assert_array_equal(session.run(inputs)["sample"], base)  # and nothing else does
    for key, array in inputs.items():
        other = (array + 1) % 5 if array.dtype == np.int64 else array + np.float32(0.1)
        assert np.abs(session.run(inputs | {key: other})["sample"] - base).max() > 1e-3, key


def test_images_of_a_batch_are_independent(name: str, opened: Opened) -> None:
    bundle, session, _ = opened
    inputs = golden_inputs(bundle, 3)
    changed = {key: array.copy() for key, array in inputs.items()}
    changed["noise"][1:] += np.float32(0.5)
    before, after = session.run(inputs)["sample"], session.run(changed)["sample"]
    assert np.abs(after[1:] - before[1:]).max() > 1e-3
    np.testing.assert_allclose(after[:1], before[:1], rtol=0, atol=1e-5)
    if bundle.manifest.batch.allows(1):
        alone = session.run(golden_inputs(bundle, 1))["sample"]
        np.testing.assert_allclose(before[:1], alone, rtol=0, atol=1e-5)


def test_threads_that_share_it_get_their_own_images(name: str, opened: Opened) -> None:
    bundle, session, _ = opened
    inputs = golden_inputs(bundle, 3)
    given = [inputs | {"noise": inputs["noise"] + np.float32(shift)} for shift in (0.0, 0.5)]
    expected = [session.run(each)["sample"] for each in given]
    assert np.abs(expected[1] - expected[0]).max() > 1e-3

    def right(place: int) -> list[bool]:
        return [np.array_equal(session.run(given[place])["sample"], expected[place]) for _ in range(RUNS_OF_A_THREAD)]

    with ThreadPoolExecutor(len(given)) as pool:
        assert all(itertools.chain(*pool.map(right, range(len(given)))))


@pytest.mark.parametrize("method", ["run", "run_chain"])
def test_it_refuses_inputs_that_do_not_fit(name: str, opened: Opened, method: str) -> None:
    bundle, session, _ = opened
    run: Any = session.run if method == "run" else chain_of(name, opened).run_chain
    good = golden_inputs(bundle, 3)
    six = {key: np.concatenate([array, array], axis=int(key == "step_noise")) for key, array in good.items()}
    cases: list[tuple[dict[str, Any], str]] = [
        (six, r"input 'noise' has batch 6, bundle .* was built for (1\.\.)?3; build with --batch (1\.\.)?6"),
        (good | {"timestep": good["noise"]}, "input 'timestep' is unknown"),
        ({"noise": good["noise"]}, "input 'step_noise' is missing"),
        ({}, "input 'noise' is missing"),
        (good | {"noise": good["noise"].astype(np.float64)}, "input 'noise' is float64, the manifest says float32"),
        (good | {"class_labels": good["class_labels"].astype(np.int32)}, "'class_labels' is int32, .* int64"),
        (good | {"noise": good["noise"][:, :, :4]}, r"input 'noise' is \(3, 1, 4, 8\)"),
        (good | {"class_labels": good["class_labels"][:1]}, "'class_labels' has batch 1, "),
        (good | {"class_labels": np.array([0, 5, 2])}, "'class_labels' holds 0 to 5, the manifest says 0 to 4"),
        (good | {"class_labels": np.array([0, -1, 2])}, "'class_labels' holds -1 to 2, the manifest says 0 to 4"),
    ]
    for inputs, message in cases:
        with pytest.raises(UsageError, match=message):
            run(inputs)
    run(good)


def test_it_refuses_steps_that_are_none(name: str, opened: Opened) -> None:
    bundle, chain = opened[0], chain_of(name, opened)
    inputs = golden_inputs(bundle, 3)
    for step in (0, STEPS + 1):
        with pytest.raises(MmdExportError):
            chain.run_step(step, inputs | {f"state.{STEPS}": inputs["noise"]})
    with pytest.raises(MmdExportError):
        chain.run_step(2, inputs)
