"""bench.fused: one small table, and the options that it refuses."""

from __future__ import annotations

import pytest

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
