"""kernels.show: the figures it prints against known values, its refusals, its files."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.activations.properties import Properties, bytes_moved, cost, properties, saved_by_eager
from kernels.catalogue import arms
from kernels.common.errors import UserError
from kernels.formula import FormulaError, parse
from kernels.formula.compiled import compile_formula
from kernels.show import main, notation

ROOT = Path(__file__).parents[2]


def of(formula: str, **parameters: object) -> Properties:
    return properties(compile_formula(parse(formula, parameters)))


def test_relu():
    relu = of("relu(x)")
    curve = relu.curves["x"]
    assert (relu.at_zero, relu.low, relu.high, relu.true_glu, relu.warnings) == (0.0, 0.0, 10.0, None, [])
    assert (curve.jump, curve.kink, curve.kink_at, curve.monotone, curve.steepest) == (0.0, 1.0, 0.0, "rising", 1.0)
    assert curve.dead == [(-10.0, 0.0)]
    assert curve.saturated == pytest.approx(0.5, abs=1e-3)
    # of half a normal distribution: mean 1 / sqrt(2 pi), second moment 1/2
    assert relu.mean == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-6)
    assert relu.rms == pytest.approx(math.sqrt(0.5), abs=1e-6)


@pytest.mark.parametrize(
    ("formula", "ratio"),
    [("sigmoid(x)", 2.40), ("where(x > 0, x, 0.01*x)", 0.67), ("gelu(x)", 0.48), ("silu(x)", 0.37)],
)
def test_the_mean_over_the_std_is_the_published_one(formula, ratio):
    result = of(formula)
    assert result.mean / result.std == pytest.approx(ratio, abs=0.01)


def test_smooth_curves_have_no_kink_and_no_dead_region():
    for formula in ("silu(x)", "gelu(x)", "tanh(x)", "sin(20*x)"):
        curve = of(formula).curves["x"]
        assert (curve.jump, curve.kink, curve.dead) == (0.0, 0.0, [])
    assert of("silu(x)").curves["x"].argmin == pytest.approx(-1.27846, abs=1e-4)
    assert of("silu(x)").low == pytest.approx(-0.278465, abs=1e-6)
    assert of("silu(x)").curves["x"].monotone == "neither"


def test_kinks_and_jumps_are_found_between_the_points_of_the_grid():
    kink = of("where(x > 0.12345678, 2*x - 0.12345678, x)").curves["x"]
    assert kink.jump == 0.0
    assert (kink.kink, kink.kink_at) == pytest.approx((1.0, 0.12345678), abs=1e-8)
    jump = of("where(x > 0.3, x + 0.5, x)")
    assert (jump.curves["x"].jump, jump.curves["x"].jump_at) == pytest.approx((0.5, 0.3), abs=1e-8)
    assert any("jumps by 0.5" in warning for warning in jump.warnings)


def test_threshold_is_warned_of():
    result = of("where(x >= 0, 1, 0)")
    assert "the gradient is 0 everywhere: nothing below this activation can learn" in result.warnings
    assert result.curves["x"].saturated == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("formula", "true_glu"),
    [("silu(gate)*up", True), ("gate*up", True), ("max(gate, up)", False), ("silu(gate)*(up + 1)", False)],
)
def test_a_true_glu_is_told_from_others(formula, true_glu):
    result = of(formula)
    assert result.true_glu is true_glu
    assert ("not a true GLU: h is not proportional to up" in result.warnings) is not true_glu


def test_dead_regions_of_a_gate_hold_for_every_up():
    assert of("relu(gate)*up").curves["gate"].dead == [(-10.0, 0.0)]
    assert of("gate*up").curves["gate"].dead == []
    assert of("max(gate, up)").curves["gate"].kink_at == pytest.approx(1.0)


def test_bytes_and_operations():
    ungated, gated = parse("silu(x)"), parse("silu(gate)*up")
    assert bytes_moved(ungated) == {"forward": 4, "backward": 6, "backward with h": 8}
    assert bytes_moved(gated) == {"forward": 6, "backward": 10, "backward with h": 12}
    assert saved_by_eager(gated) == (6, 8)  # gate and up, silu(gate); and h
    assert saved_by_eager(ungated) == (2, 4)
    assert saved_by_eager(parse("relu(x)")) == (0, 2)  # from its output
    operations = cost(compile_formula(parse("where(x > 0, x, exp(-x) / 3)")).forward)
    assert operations == {"compare or select": 2, "add or multiply": 2, "transcendental": 1}


def test_expressions_are_written_in_the_grammar():
    compiled = compile_formula(parse("where(x >= 0, relu(x), 0.044715*x)"))
    assert notation(compiled.expression) == "where(x >= 0, relu(x), 0.044715*x)"
    assert notation(compiled.slopes["x"]) == "where(x >= 0, where(x > 0, 1, 0), 0.044715)"


def test_groups_of_channels_are_named(capsys):
    main(["b*x", "b=learned:1:group:8"])
    assert "b (learned, starts at 1, one per group, 8 groups)" in capsys.readouterr().out
    with pytest.raises(FormulaError, match="has groups: 'x'"):
        main(["b*x", "b=learned:1:group:x"])


def test_what_it_prints(capsys):
    main(["where(x > 0, x, slope*x)", "slope=learned:0.25:channel"])
    printed = capsys.readouterr().out
    assert "slope (learned, starts at 0.25, one per channel)" in printed
    assert "dh/dslope    = where(x > 0, 0, x)" in printed
    assert "ungated: 2 matrices" in printed
    assert "0.75 at 0" in printed
    assert "k_select" in printed
    assert "PARALLEL_FOR" not in printed
    main(["gate*up*b", "b=2", "--c"])
    printed = capsys.readouterr().out
    assert "b = 2" in printed
    assert "PARALLEL_FOR" in printed


@pytest.mark.parametrize("name", ["swiglu", "SwiGLU"])
def test_the_name_of_an_arm_shows_the_arm(name, capsys):
    main([name])
    assert capsys.readouterr().out.startswith("silu(gate) * up\n  gated: 3 matrices")


def test_an_arm_has_its_parameters_and_others_may_be_given(capsys):
    main(["prelu"])
    assert "slope (learned, starts at 0.25, one per layer)" in capsys.readouterr().out
    main(["prelu", "slope=0.5"])
    assert "parameters: slope = 0.5" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown arm 'swiglo': did you mean 'swiglu'"):
        main(["swiglo"])


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (
            ["up*silu(gate)"],
            [
                "  the same                 swiglu: Shazeer 2020 (arXiv 2002.05202)",
                "  the same at the start    xswiglu",
            ],
        ),
        (
            ["swish"],
            [
                "  the same                 swish: Ramachandran 2017 (arXiv 1710.05941)",
                "  the same at the start    silu",
            ],
        ),
        (["swish", "beta=1.702"], ["  only constants differ    silu, swish"]),
        (["silu(up)*gate"], ["  gate and up exchanged    swiglu, xswiglu"]),
        (["x*atan(x)"], ["  none is the same, or differs only by constants"]),
    ],
)
def test_it_says_which_published_arm_a_formula_is(argv, lines, capsys):
    main(argv)
    section = capsys.readouterr().out.partition("\n\npublished arms\n")[2].partition("\n\n")[0]
    assert section.splitlines() == lines


def test_without_the_arms_it_says_nothing_of_them(monkeypatch, capsys):
    monkeypatch.setattr(arms, "_FOLDERS", ())
    main(["x*sigmoid(x)"])
    assert "published arms" not in capsys.readouterr().out


def test_a_file_of_an_arm_that_is_refused_keeps_no_other_formula_from_being_shown(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("# Mine 2026\nname: mine\nformula: sulu(x)\n")
    monkeypatch.setattr(arms, "_FOLDERS", (tmp_path,))
    arms.arms.cache_clear()
    try:
        main(["x*sigmoid(x)"])
        assert (
            "  not compared: the formula of the arm mine is refused: unknown function 'sulu'" in capsys.readouterr().out
        )
        with pytest.raises(UserError, match="the formula of the arm mine is refused"):
            main(["mine"])
    finally:
        arms.arms.cache_clear()


def test_parameters_may_be_named_like_options(capsys):
    main(["c*x + plot*triton", "c=2", "plot=learned:1", "triton=3"])
    printed = capsys.readouterr().out
    assert "parameters: plot (learned, starts at 1, one per layer), c = 2, triton = 3" in printed
    assert "PARALLEL_FOR" not in printed
    assert "triton.jit" not in printed
    main(["x", "--triton"])
    assert "triton.jit" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kernels", "formula_ffn"])
def test_help_names_the_package_that_was_imported(name, tmp_path):
    (tmp_path / "formula_ffn").symlink_to(ROOT / "kernels")
    for argv in (["--help"], []):
        command = [sys.executable, "-m", f"{name}.show", *argv]
        folder = ROOT if name == "kernels" else tmp_path
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"    python -m {name}.show 'x * sigmoid(b * x)' b=1.702\n" in done.stdout


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["x", "y*x"], "expected one formula, in quotes, not 'x', 'y\\*x'"),
        (["--c"], "expected one formula, in quotes, not none"),
        (["x", "--d"], "unknown option '--d': did you mean '--c'\\? choose from --c, --plot, --triton"),
        (["x", "--plot"], "--plot needs the name of a file"),
        (["x", "--plot="], "--plot needs the name of a file"),
        (["x", "--plot=a.gif"], "must end in .png, .pdf, .svg"),
        (["x", "--plot=nowhere/a.png"], "the folder nowhere does not exist"),
        (["b*x", "b=two"], "write b=1.702, b=learned:0.25 or b=learned:0.25:channel"),
        (["b*x", "b=learned"], "invalid parameter b=learned:"),
    ],
)
def test_an_invalid_argument_is_one_sentence(argv, reason):
    with pytest.raises(UserError, match=reason):
        main(argv)


def test_an_unknown_share_is_refused_by_the_grammar():
    with pytest.raises(FormulaError, match="shared by layer, by channel or by group, not 'row'"):
        main(["b*x", "b=learned:1:row"])


def test_a_refused_formula_is_status_2_and_needs_no_torch():
    code = "import sys; sys.argv[1:] = ['x*sulu(x)']; sys.modules['torch'] = None; from kernels.show import run; run()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown function 'sulu': did you mean 'silu'?")
    assert done.stderr.endswith("\n  x*sulu(x)\n    ^\n")
    domain = code.replace("x*sulu(x)", "1/x")
    done = subprocess.run([sys.executable, "-c", domain], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the division can hit zero" in done.stderr


@pytest.mark.parametrize("formula", ["silu(gate)*up", "relu(x)**2"])
def test_a_plot_is_written_whole(formula, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "curve.png"
    main([formula, "--plot", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [out]
    assert f"written to {out}" in capsys.readouterr().out


def test_without_matplotlib_a_plot_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs matplotlib, which is not installed"):
        main(["x", f"--plot={tmp_path}/a.png"])
