"""bench.conformance: its arithmetic, that a wrong kernel fails it, and the options that it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from bench import conformance
from bench.conformance import main
from bench.edge_cases import error
from bench.formulas import formulas
from kernels.activations import reference
from kernels.common.errors import UserError


def test_the_error_is_relative_to_the_root_mean_square():
    exact = torch.tensor([3.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    rms, largest = error(exact + torch.tensor([0.0, 0.0, 0.0, 0.5]), exact, eps=0.1)
    assert rms == pytest.approx(0.25 / 2.5)
    assert largest == pytest.approx(0.5 / 2.5 / 0.1)
    assert error(torch.zeros(2), torch.zeros(2), 1.0) == (0.0, 0.0)
    assert error(torch.ones(2), torch.zeros(2), 1.0)[0] == math.inf


def test_the_catalogue_has_the_arms_of_conf_and_more():
    arms = formulas()
    assert {"relu", "swiglu", "xielu", "situ_glu", "maxout"} <= set(arms)
    assert "custom" not in arms


@pytest.mark.parametrize("option", ["arms=swishh", "seed=x", "rows=many", "speed=1"])
def test_bad_options_are_refused(option):
    with pytest.raises(UserError):
        main([option])


def test_arms_that_are_exact_pass(tmp_path):
    out = tmp_path / "report.md"
    assert main(["arms=relu,bilinear,maxout", "rows=8", "seed=1", f"out={out}"]) == 0
    report = out.read_text()
    assert "with seed 1" in report
    assert "Nothing failed." in report
    assert report.count("| bilinear | bf16 | c |") == 4  # h, dgate, dup, and its edge cases


def test_a_wrong_kernel_fails_the_command(tmp_path, monkeypatch, capsys):
    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *arguments: right(*arguments) * 1.01)
    monkeypatch.setattr(conformance, "backends", lambda: [("reference", "cpu")])
    assert main(["arms=silu", "rows=8", "seed=1", f"out={tmp_path}/report.md"]) == 1
    assert "failed: silu fp32 reference h: error" in capsys.readouterr().err
