"""bench.fused: one small table, and the options that it refuses."""

from __future__ import annotations

import unittest.mock

import pytest
import torch

from bench import fused
from bench.fused import main
from kernels.common.errors import UserError


def test_one_line_per_dtype(capsys):
    main(["only=norm of heads 8x", "rounds=1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| norm of heads 8x256x3x64", dtype] for dtype in ("bfloat16", "float32")
    ]
    # No error beyond plain PyTorch's.
    assert all(0 < float(line.split("|")[5]) <= 1 for line in lines)


@pytest.mark.parametrize("option", ["rounds=0", "rounds", "speed=1"])
def test_bad_options_are_refused(option):
    with pytest.raises(UserError):
        main([option])


def test_both_are_timed_in_turn_and_small_tensors_several_times(monkeypatch):
    timings = []

    def seconds_of(call, calls, _):
        timings.append(calls)
        call()
        return {"ours": 2.0, "plain": 3.0}[ran[-1]]

    ran: list[str] = []
    monkeypatch.setattr(fused, "seconds_of", seconds_of)
    assert fused._ratio(ran.append, torch.empty(2**20), 2) == (1.5, 1.5, 1.5)
    assert ran == ["ours", "plain"] * 5  # three rounds warm up
    assert set(timings) == {4}
    on_gpu = unittest.mock.Mock(is_cuda=True, device=torch.device("cuda"), numel=lambda: 2**22)
    timings.clear()
    fused._ratio(ran.append, on_gpu, 1)
    assert set(timings) == {20}
