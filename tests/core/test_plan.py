"""A plan is a table: what goes into JSON comes back bit for bit, and only whole tables are plans."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd_export.errors import UsageError
from mmd_export.plan import Source, Step, StepPlan, Term
from mmd_export.schedule import SchedulerConfig
from mmd_export.solvers import make_plan

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Any plan: terms with history, shared and skipped noise numbers, clamped guesses, odd floats."""
    count = draw(st.integers(1, 4))
    clip = draw(st.none() | st.floats(0.1, 10.0))
    cleans = [draw(st.none() | st.tuples(NUMBERS, NUMBERS)) if clip else None for _ in range(count)]
    steps, noises = [], 0
    for k in range(count):
        sources: list[tuple[Source, int]] = [(source, j) for source in ("state", "output") for j in range(k + 1)]
        sources += [("clean", j) for j in range(k + 1) if cleans[j] is not None]
        chosen = draw(st.lists(st.sampled_from(sources), min_size=1, max_size=4, unique=True))
        terms = [Term(source, index, draw(NUMBERS)) for source, index in chosen]
        if draw(st.booleans()):
            terms.append(Term("noise", noises, draw(NUMBERS)))
            noises += 1
        clean = cleans[k]
        steps.append(Step(draw(NUMBERS), draw(NUMBERS), draw(NUMBERS), tuple(terms), clean, draw(NUMBERS)))
    return StepPlan(
        solver=draw(st.text(max_size=5)),
        prediction_type=draw(st.sampled_from(("epsilon", "v_prediction", "sample"))),
        steps=tuple(steps),
        clip=clip,
        initial_scale=draw(NUMBERS),
        clamp_output=draw(st.booleans()),
        settings=draw(st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | NUMBERS | st.text(max_size=3))),
    )


@given(plans())
@settings(max_examples=150, deadline=None)
def test_json_gives_the_plan_back_bit_for_bit(plan: StepPlan) -> None:
    text = json.dumps(plan.to_dict(), allow_nan=False)
    again = StepPlan.from_dict(json.loads(text))
    assert again == plan
    assert repr(again) == repr(plan)  # tells 0.0 from -0.0
    assert json.dumps(again.to_dict(), allow_nan=False) == text
    assert again.digest() == plan.digest()


@given(plans(), st.dictionaries(st.text(max_size=3), st.none() | NUMBERS))
@settings(max_examples=50, deadline=None)
def test_the_digest_ignores_the_settings_only(plan: StepPlan, other: dict[str, Any]) -> None:
    assert replace(plan, settings=other).digest() == plan.digest()
    assert replace(plan, clamp_output=not plan.clamp_output).digest() != plan.digest()
    assert replace(plan, solver=plan.solver + "x").digest() != plan.digest()


def by_hand(**changes: Any) -> StepPlan:
    fields: dict[str, Any] = {
        "solver": "by hand",
        "prediction_type": "epsilon",
        "steps": (
            Step(900.0, 0.1, 0.9, (Term("state", 0, 1.5), Term("clean", 0, 0.5), Term("noise", 0, 0.1)), (2.0, -1.0)),
            Step(400.0, 0.5, 0.5, (Term("state", 0, 0.25), Term("output", 1, 2.0), Term("noise", 1, 0.2))),
        ),
        "clip": 1.0,
    }
    return StepPlan(**(fields | changes))


def test_every_number_is_in_the_digest() -> None:
    plan = by_hand()
    data = plan.to_dict()
    digests = {plan.digest()}

    def add(change: dict[str, Any]) -> None:
        digests.add(StepPlan.from_dict(json.loads(json.dumps(data)) | change).digest())

    add({"initial_scale": 2.0})
    add({"clip": 2.0})
    add({"prediction_type": "sample"})
    for k in range(2):
        for key in ("timestep", "alpha", "sigma", "scale"):
            steps = json.loads(json.dumps(data["steps"]))
            steps[k][key] = math.nextafter(steps[k][key], 2000)
            add({"steps": steps})
        for term in range(3):
            steps = json.loads(json.dumps(data["steps"]))
            steps[k]["update"][term][2] = math.nextafter(steps[k]["update"][term][2], 10)
            add({"steps": steps})
    assert len(digests) == 1 + 3 + 2 * 7


def test_plans_agree_in_all_that_is_computed() -> None:
    plan, within = by_hand(), 1e-9
    data = plan.to_dict()
    changes: list[dict[str, Any]] = [{"initial_scale": 1.01}, {"clip": 1.01}, {"prediction_type": "sample"}]
    changes += [{"clamp_output": False}]
    for k, key in ((0, "timestep"), (1, "timestep"), (0, "scale"), (1, "scale")):
        steps = json.loads(json.dumps(data["steps"]))
        steps[k][key] *= 1.0 + 1e-7
        changes.append({"steps": steps})
    for k, term in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        steps = json.loads(json.dumps(data["steps"]))
        steps[k]["update"][term][2] += 1e-7
        changes.append({"steps": steps})
    for place in (0, 1):
        steps = json.loads(json.dumps(data["steps"]))
        steps[0]["clean"][place] += 1e-7
        changes.append({"steps": steps})
    for change in changes:
        other = StepPlan.from_dict(data | change)
        assert not plan.agrees(other, within), change
        assert not other.agrees(plan, within), change
    first = replace(plan.steps[0], alpha=0.7, sigma=0.3, update=(*plan.steps[0].update[1:], plan.steps[0].update[0]))
    last = replace(plan.steps[1], update=(*plan.steps[1].update, Term("state", 1, 1e-12)))
    assert plan.agrees(replace(plan, solver="probed", steps=(first, last), settings={"eta": 1.0}), within)
    assert not plan.agrees(replace(plan, steps=plan.steps[:1]), within)


def test_counts() -> None:
    plan = by_hand()
    assert (plan.step_count, plan.noisy_steps, plan.timesteps) == (2, 2, (900.0, 400.0))
    config = SchedulerConfig.from_dict({"_class_name": "DDIMScheduler"})
    assert make_plan(config, 5).noisy_steps == 0
    assert make_plan(config, 5, eta=1.0).noisy_steps == 4  # the last step of leading goes from t = 0 to clean data


@pytest.mark.parametrize("key", ["solver", "steps", "clip", "settings", "clamp_output"])
def test_a_missing_key(key: str) -> None:
    data = by_hand().to_dict()
    del data[key]
    with pytest.raises(UsageError, match=f"^plan: key '{key}' is missing"):
        StepPlan.from_dict(data)


@pytest.mark.parametrize("key", ["timestep", "alpha", "scale", "clean", "update"])
def test_a_missing_key_of_a_step(key: str) -> None:
    data = by_hand().to_dict()
    del data["steps"][1][key]
    with pytest.raises(UsageError, match=f"^plan step: key '{key}' is missing"):
        StepPlan.from_dict(data)


def test_unknown_keys() -> None:
    data = by_hand().to_dict()
    with pytest.raises(UsageError, match=r"^plan: unknown key 'stpes'; known: clamp_output, clip, "):
        StepPlan.from_dict(data | {"stpes": []})
    data["steps"][0]["gamma"] = 0.0
    with pytest.raises(UsageError, match=r"^plan step: unknown key 'gamma'; known: alpha, "):
        StepPlan.from_dict(data)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 5},
        {"steps": [5]},
        {"steps": [None]},
        {"clip": "1.0"},
        {"initial_scale": None},
        {"steps": [by_hand().to_dict()["steps"][0] | {"clean": [1.0]}]},
        {"steps": [by_hand().to_dict()["steps"][0] | {"timestep": "999"}]},
        {"steps": [by_hand().to_dict()["steps"][0] | {"update": [["state", 0]]}]},
        {"steps": [by_hand().to_dict()["steps"][0] | {"update": [["state", 0, "x"]]}]},
        {"steps": [by_hand().to_dict()["steps"][0] | {"update": 3}]},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^plan") as error:
        StepPlan.from_dict(by_hand().to_dict() | change)
    assert "\n" not in str(error.value)


STEP = by_hand().steps[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": ()}, "no step"),
        ({"prediction_type": "flow"}, "prediction type 'flow' is unknown; known: epsilon"),
        ({"steps": (replace(STEP, update=()),)}, "step 0 has no update"),
        ({"clip": None}, "step 0 clamps the clean guess, but the plan has no clip range"),
        ({"steps": (replace(STEP, update=(Term("velocity", 0, 1.0),)),)}, "unknown source 'velocity'"),  # type: ignore[arg-type]
        ({"steps": (replace(STEP, update=(Term("state", 1, 1.0),)),)}, "step 0 uses state 1, which is not known yet"),
        ({"steps": (replace(STEP, update=(Term("output", 1, 1.0),)),)}, "step 0 uses output 1, which is not known"),
        ({"steps": (replace(STEP, update=(Term("state", -1, 1.0),)),)}, "step 0 uses state -1, which is not known"),
        ({"steps": (replace(STEP, clean=None),)}, "step 0 uses clean 0, which no step computes"),
        ({"steps": (replace(STEP, update=(Term("noise", 1, 1.0),)),)}, r"noise inputs \[1\] are not numbered"),
        ({"steps": (replace(STEP, update=(Term("noise", -1, 1.0),)),)}, r"noise inputs \[-1\] are not numbered"),
        ({"initial_scale": math.nan}, "not finite"),
        ({"clip": math.inf}, "not finite"),
        ({"steps": (replace(STEP, timestep=math.nan),)}, "not finite"),
        ({"steps": (replace(STEP, alpha=math.inf),)}, "not finite"),
        ({"steps": (replace(STEP, sigma=-math.inf),)}, "not finite"),
        ({"steps": (replace(STEP, scale=math.nan),)}, "not finite"),
        ({"steps": (replace(STEP, clean=(math.nan, 1.0)),)}, "not finite"),
        ({"steps": (replace(STEP, update=(Term("state", 0, math.nan),)),)}, "not finite"),
    ],
    ids=str,
)
def test_what_is_no_plan(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        by_hand(**changes)
    assert error.value.exit_code == 2


def test_a_gap_in_the_noise_numbers_of_two_steps() -> None:
    steps = (STEP, replace(by_hand().steps[1], update=(Term("noise", 2, 1.0),)))
    with pytest.raises(UsageError, match=r"noise inputs \[0, 2\] are not numbered from 0 without gaps"):
        by_hand(steps=steps)
