"""The path from one arm to another: (1 - t) * old + t * new, whose t a schedule takes from 0 to 1.

At t = 0 it is the old formula and at t = 1 the new one, for both of which a layer has the same matrices.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kernels.common.errors import UserError
from kernels.formula import Formula, FormulaError, parse
from kernels.formula.grammar import FUNCTIONS


@dataclasses.dataclass(frozen=True)
class Homotopy:
    """The formula of a layer on its way from one arm to another.

    Attributes:
        text, parameters: as `parse` takes them.
        origins: {name of a learned parameter of the old formula: its name here}.
    """

    text: str
    parameters: dict[str, Any]
    origins: dict[str, str]


def unchanged(old: Formula) -> Homotopy:
    """Return the path of a layer that keeps its formula."""
    return Homotopy(old.text, settings_of_formula(old), {name: name for name in old.learned})


def homotopy(old: Formula, new: Formula, steps: int) -> Homotopy:
    """Return the path from one formula to another that ends after `steps` steps.

    Parameters of the old formula whose names the new one has too get "_old" at their ends.

    Raises:
        UserError: one is gated and the other is not, or the formula of the path is refused.
    """
    if old.gated != new.gated:
        kinds = {True: "gated, with 3 matrices", False: "ungated, with 2"}
        raise UserError(
            f"{old.text!r} is {kinds[old.gated]}, and {new.text!r} is {kinds[new.gated]}: no path between them starts from the "
            "function that was trained"
        )
    renamed = _renamed(settings_of_formula(old), settings_of_formula(new))
    before = {renamed[name]: given for name, given in settings_of_formula(old).items()}
    after = settings_of_formula(new)
    symbol = _free("t", {*before, *after})
    text = f"(1 - {symbol})*({_with_names(old.text, renamed)}) + {symbol}*({' '.join(new.text.split())})"
    ramp = {symbol: {"schedule": "linear", "from": 0.0, "to": 1.0, "steps": steps}}
    parameters = before | after | ramp
    try:
        parse(text, parameters)
    except FormulaError as error:
        raise UserError(f"the path from {old.text!r} to {new.text!r} is refused: {error}") from error
    return Homotopy(text, parameters, {name: renamed[name] for name in old.learned})


def settings_of_formula(formula: Formula) -> dict[str, Any]:
    """Return the parameters of a formula as `parse` reads them."""
    return {name: parameter.settings() for name, parameter in formula.tensors.items()} | formula.fixed


def _renamed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return the names that the old formula's parameters have beside those of the new one."""
    names: dict[str, str] = {}
    for name in old:
        taken = {*new, *names.values(), *(other for other in old if other != name)}
        names[name] = name if name not in new else _free(f"{name}_old", taken)
    return names


def _free(name: str, taken: Iterable[str]) -> str:
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(each for each in candidates if each not in taken and each not in FUNCTIONS)


def _with_names(text: str, names: Mapping[str, str]) -> str:
    """Return a formula's text on one line, with its parameters under other names."""
    pattern = r"(?<![A-Za-z0-9_.])[A-Za-z_][A-Za-z0-9_]*"  # of no number: 1e5 has no name in it
    return " ".join(re.sub(pattern, lambda match: names.get(match[0], match[0]), text).split())
