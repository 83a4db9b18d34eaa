"""The campaigns `formulas` and `overrides`: random text, read as a run reads what is typed."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from bench.formulas import formulas
from bench.fuzz.campaign import Campaign
from conf.keys import choices, keys
from conf.load import from_yaml, load, to_yaml
from conf.schema import GROUPS
from conf.validate import validate
from kernels.activations.telemetry import stats_program
from kernels.common.errors import UserError
from kernels.formula import FormulaError, parse
from kernels.formula.compiled import compile_formula
from kernels.formula.domains import check_domains
from kernels.formula.grammar import FUNCTIONS

# ----------------------------------------------------------------------------------------------------------- formulas

_NUMBERS = ("0", "1", "2", "0.5", "-1", "3", "1e-3", "1e4", "1e30", "1e-30", "1e300", "1e-320", "9**9**9",
            "0.1", "pi", "1e999", "1000", "1e-16", "(1+1e-300)", ".5", "7.25e-1", "(1/3)", "2**2**2", "0**0",
            "10**400")  # fmt: skip

_TOKENS = (*FUNCTIONS, *_NUMBERS, "x", "gate", "up", "b", "h", "(", ")", ",", "+", "-", "*", "/", "**", "<",
           "<=", ">", ">=", " ", "\n", "\x00", "\x1b", "é", "²", "if", "lambda", "__import__", "x.real", "^",
           "=", "'", "$", "\u202e")  # fmt: skip

_NESTED = ("silu(@)", "gelu(@)", "gelu_tanh(@)", "exp(-@)", "where(x>@,1,0)", "where(@>0,@,x)", "(@)**2",
           "(1+@)**3", "1/(1+@**2)", "@*sigmoid(@)", "max(@,x)", "clip(@,-1,@)", "(@)**1.5", "2**@",
           "log(1+exp(@))", "-@", "(@+@)", "(@*@)", "((@)**1000)", "sqrt(1+@**2)", "tanh(softplus(@))")  # fmt: skip

_ARMS = list(formulas().values())


def random_formula(draw: random.Random) -> tuple[str, dict[str, Any], str]:
    """Return text, parameters and `from_output` of a formula: a random one, a mutated arm, deep nesting, or tokens."""
    kind, parameters, claimed = draw.random(), {}, ""
    if kind < 0.45:
        leaves = draw.choice((("x", "x", "b"), ("x",), ("gate", "up"), ("gate", "up", "b")))
        text = _expression(draw, draw.randint(1, 6), leaves)
    elif kind < 0.8:
        text, parameters = draw.choice(_ARMS)
        parameters = dict(parameters)
        for _ in range(draw.randint(1, 4)):
            text = _mutated(draw, text)
    elif kind < 0.93:
        text = draw.choice(("x", "gate*up", "b*x"))
        for _ in range(draw.randint(1, 49)):
            larger = draw.choice(_NESTED).replace("@", text)
            text = larger if len(larger) < 1100 else text
    else:
        text = "".join(draw.choice(_TOKENS) for _ in range(draw.randint(0, 40)))
    if "b" in text or draw.random() < 0.05:
        parameters["b"] = draw.choice(
            (2, -1, 0.5, 1e300, 5e-324, 0, "1", None, float("nan"), {"init": 0.25}, {"init": 1e30})
        )
    if draw.random() < 0.05:
        claimed = _expression(draw, draw.randint(1, 4), ("h", "h", "b"))
    return text, parameters, claimed


def _expression(draw: random.Random, depth: int, leaves: tuple[str, ...]) -> str:
    if depth == 0 or draw.random() < 0.12:
        return draw.choice(leaves) if draw.random() < 0.65 else draw.choice(_NUMBERS)

    def part() -> str:
        return _expression(draw, depth - 1, leaves)

    kind = draw.random()
    if kind < 0.35:
        return f"({part()}{draw.choice('++--**///')}{part()})"
    if kind < 0.47:
        return f"({part()})**{draw.choice((*_NUMBERS, f'({part()})'))}"
    name = draw.choice(list(FUNCTIONS))
    if name == "where":
        return f"where({part()}{draw.choice(('<', '<=', '>', '>='))}{part()},{part()},{part()})"
    return f"{name}({','.join(part() for _ in range(FUNCTIONS[name]))})"


def _mutated(draw: random.Random, text: str) -> str:
    """Return a text with one part of it removed, doubled, moved, replaced or wrapped."""
    first, last = sorted((draw.randint(0, len(text)), draw.randint(0, len(text))))
    part = text[first:last]
    return draw.choice(
        (
            text[:first] + text[last:],
            text[:last] + part + text[last:],
            text[:first] + draw.choice(_TOKENS) + text[first:],
            text[:first] + draw.choice(_TOKENS) + text[last:],
            text[:first] + draw.choice(_NESTED).replace("@", part or "x") + text[last:],
            draw.choice(_NESTED).replace("@", text),
            f"({text}){draw.choice(('+', '-', '*', '/', '**'))}({draw.choice(_ARMS)[0]})",
        )
    )[:1200]


def check_formula(given: tuple[str, dict[str, Any], str]) -> None:
    """Read a formula as a run does, up to its programs."""
    formula = parse(*given)
    check_domains(formula)
    stats_program(compile_formula(formula))


# ---------------------------------------------------------------------------------------------------------- overrides

_KEYS = [name for name, _, _ in keys()]
_VALUES = ("", "0", "1", "-1", "1e9", "1e999", "100k", "9" * 400, "9" * 5000, "1e-400", "nan", "inf", "null", "true", "[]",
           "{}", "[1,2", "{a: 1}", "{0: relu2}", "'x'", '"x"', "it's", "${x}", "\\${x}", "${",
           "${oc.env:HOME}", "${oc.env:NONE}", "${oc.decode:'}'}", "a,b", "choice(1,2)", "range(1,1e9)",
           "glob(*)", "["*40, "{a:"*40, "a"*5000, "\x00", "\x1b[2J", "a\nb", "\u202e", "é", "x*9**9**9",
           "silu(gate)*up", "../..", "~", "&a [*a]", "!!python/name:os.system", "a=b", "-", "--", "\\",
           "['a','b']", "[[1]]", "{layers_0_9: {formula: x*x}}", "{b: {init: 1}}", "s3://a", "\udc80", "0x10",
           "1_000", "1:30", "%", "sort([2,1])")  # fmt: skip

_WORDS = ("", "=", "-h1", "--x", "++", "+ffn=relu", "~ffn", "hydra.run.dir=x", "hydra/launcher=x", "a", "ffn",
          "=x", "run", "\x00=1", "é=1", "model.d_model.x=1", ".=1", "..=2", "ffn@x=relu", "ffn:relu",
          "data.parts.a.weight=1", "ffn.parameters.b=2")  # fmt: skip


def random_overrides(draw: random.Random) -> list[str]:
    """Return the arguments of a command: keys and groups with values that often do not fit, and other words."""
    return [_override(draw) for _ in range(draw.choice((1, 1, 2, 3, 5)))]


def _override(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.12:
        return draw.choice(_WORDS)
    if kind < 0.27:
        group = draw.choice(GROUPS)
        return f"{group}={draw.choice((*choices(group), *_VALUES))}"
    key = draw.choice(_KEYS)
    if kind < 0.4:
        key = draw.choice(
            (f"++{key}", f"{key}.a", key.partition(".")[2] or "x", key[:-1], "data.parts.a", "ffn.per_layer.0")
        )
    value = draw.choice(_VALUES)
    if draw.random() < 0.2:
        value = draw.choice(
            (f"[{value}]", f"['{value}']", f"{{a: {value}}}", value + draw.choice(_VALUES), f"'{value}")
        )
    return f"{key}={value}"


def read_and_write_back(arguments: list[str]) -> None:
    """Read arguments as a command does, and the configuration back from the file that it is written to."""
    with tempfile.TemporaryDirectory() as folder:
        config = load(arguments)
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(config), encoding="utf-8")
        if repr(from_yaml(path)) != repr(config):  # texts, because nan is unequal to itself
            raise AssertionError(f"it is read back as {from_yaml(path)}")
        validate(config, 1)


_CAMPAIGNS = {
    "formulas": Campaign(random_formula, check_formula, (FormulaError,)),
    "overrides": Campaign(random_overrides, read_and_write_back, (UserError,)),
}


def campaign(name: str, _: Path) -> Campaign:
    """Return one of the two; neither needs files."""
    return _CAMPAIGNS[name]
