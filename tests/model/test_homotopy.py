"""The path between two arms: the old formula at one end, the new one at the other, and every parameter by a name of its own."""

from __future__ import annotations

import pytest
import torch

from kernels import activation, parse
from kernels.common.errors import UserError
from kernels.formula.settled import settled
from model.homotopy import homotopy, unchanged

SLOPE = {"slope": {"init": 0.25, "share": "channel"}}
LEARNED = ("where(x > 0, x, slope * x) + c * x", SLOPE | {"c": 0.5})


def test_both_ends_are_the_arms():
    old, new = parse("silu(gate) * up"), parse("relu(gate) * up")
    path = homotopy(old, new, 50)
    assert path.text == "(1 - t)*(silu(gate) * up) + t*(relu(gate) * up)"
    assert path.parameters == {"t": {"schedule": "linear", "from": 0.0, "to": 1.0, "steps": 50}}
    formula = parse(path.text, path.parameters)
    assert [formula.scheduled["t"].value(step, 1000) for step in (0, 25, 50, 1000)] == [0, 0.5, 1, 1]
    assert settled(formula, {"t": 0.0}).text == old.text
    assert settled(formula, {"t": 1.0}).text == new.text


def test_names_that_clash_are_told_apart():
    old, new = (
        parse(*LEARNED),
        parse("relu(x)**2 * slope + t * x + slope_old * x", {"slope": {"init": 3}, "t": 2, "slope_old": 1}),
    )
    path = homotopy(old, new, 9)
    assert path.origins == {"slope": "slope_old_2"}
    assert path.text.startswith("(1 - t_2)*(where(x > 0, x, slope_old_2 * x) + c * x) + t_2*(relu(x)**2 * slope")
    formula, x = parse(path.text, path.parameters), torch.linspace(-2, 2, 8)[None]
    function, slope = activation(formula, backend="reference"), torch.rand(8)
    values = {"slope_old_2": slope, "slope": torch.tensor([3.0])}
    for t, expected in ((0.0, activation(old, backend="reference")(x, slope=slope)), (1.0, 3 * x.relu() ** 2 + 3 * x)):
        torch.testing.assert_close(function(x, **values, t_2=torch.tensor([t])), expected)


def test_a_name_inside_of_a_number_or_a_function_is_none():
    path = homotopy(parse("e * x + 1e5 * x + exp(-x*x)", {"e": {"init": 1}}), parse("e * relu(x)", {"e": 2}), 3)
    assert path.text == "(1 - t)*(e_old * x + 1e5 * x + exp(-x*x)) + t*(e * relu(x))"


def test_a_schedule_of_the_new_arm_goes_on_beside_that_of_the_path():
    ramp = {"schedule": "cosine", "from": 9.0, "to": 1.0}
    path = homotopy(parse("silu(x)"), parse("min(relu(x), t)", {"t": ramp}), 3)
    assert path.parameters["t"] == ramp
    assert list(parse(path.text, path.parameters).scheduled) == ["t", "t_2"]


def test_a_layer_that_stays_keeps_its_names():
    path = unchanged(parse(*LEARNED))
    assert (path.text, path.parameters, path.origins) == (*LEARNED, {"slope": "slope"})


def test_no_path_leads_from_two_matrices_to_three():
    with pytest.raises(
        UserError, match=r"'relu\(x\)' is ungated, with 2, and 'gate\*up' is gated, with 3 matrices: no path"
    ):
        homotopy(parse("relu(x)"), parse("gate*up"), 3)


def test_a_path_that_is_too_long_is_refused():
    long = parse("+".join(["x"] * 150))
    with pytest.raises(UserError, match="is refused: more than 200 operations"):
        homotopy(long, long, 3)
