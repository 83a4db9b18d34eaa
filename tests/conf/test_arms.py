"""Which arm a layer has."""

from __future__ import annotations

import pytest

from conf.arms import layer_arms
from conf.keys import choices
from conf.load import load
from conf.validate import validate
from kernels.common.errors import UserError


def arms(*words: str) -> list:
    config = load(["steps=1", *words])
    validate(config, 1)
    return [arm.config for arm in layer_arms(config)]


def test_every_layer_has_the_same_arm_unless_told_otherwise():
    assert [arm.name for arm in arms("ffn=reglu")] == ["reglu"] * 4
    words = ["ffn=reglu", "ffn.per_layer.0=relu2", "ffn.per_layer.layers_2_last={arm: prelu, save: input}"]
    first, second, third, last = arms(*words)
    assert (first.name, first.formula, first.parameters) == ("relu2", "relu(x) ** 2", {})
    assert (second.name, second.save) == ("reglu", "packed")
    assert third == last
    assert (third.name, third.save, third.parameters["slope"]["init"]) == ("prelu", "input", 0.25)


def test_a_layer_may_have_another_clamp():
    found = arms("ffn=swiglu_clamped", "ffn.per_layer.last.parameters.limit=3")
    assert [arm.parameters["limit"] for arm in found] == [7.0, 7.0, 7.0, 3]
    assert len({arm.formula for arm in found}) == 1


def test_a_layer_may_have_a_formula_of_its_own():
    found = arms("ffn=prelu", "ffn.per_layer.1.formula='x*sigmoid(b*x)'", "ffn.per_layer.1.parameters.b=1.7")
    assert (found[1].name, found[1].parameters) == ("custom", {"b": 1.7})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ffn.per_layer.4=relu"], "ffn.per_layer.4: the model has layers 0 to 3"),
        (["ffn.per_layer.layers_2_1=relu"], "ffn.per_layer.layers_2_1: the model has layers 0 to 3"),
        (["ffn.per_layer.first=relu"], "ffn.per_layer.first: a layer is a number"),
        (["ffn.per_layer.0=relu3"], "unknown arm 'relu3': did you mean 'relu'"),
        (["ffn.per_layer.0=7"], "ffn.per_layer.0=7 must be the name of an arm"),
        (["ffn.per_layer.0.clamp=7"], "unknown key of ffn.per_layer.0 'clamp'"),
        (["ffn.per_layer.3=relu", "ffn.per_layer.last=relu2"], "ffn.per_layer names layer 3 twice: 3 and last"),
        (["ffn.per_layer=relu"], "ffn.per_layer='relu' must map layers to arms"),
        (["ffn.per_layer.1.formula='x/x'"], "the arm of layer 1 is refused: the division can hit zero"),
        (["ffn.parameters.b=1"], "ffn.formula is refused: the formula does not use the parameter 'b'"),
        (["ffn=prelu", "ffn.parameters.slope.init=one"], "must be a finite number, not 'one'"),
        (["ffn=prelu", "ffn.parameters=3"], "ffn.parameters=3 must map names to numbers"),
    ],
)
def test_what_is_refused(words, sentence):
    with pytest.raises(UserError) as caught:
        arms(*words)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("arm", sorted(set(choices("ffn")) - {"custom"}))
def test_every_arm_of_the_catalogue_is_accepted(arm):
    assert {each.name for each in arms(f"ffn={arm}")} == {arm}
