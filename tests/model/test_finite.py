"""Non-finite numbers: found wherever they are, told by their kind, and named by their tensor."""

from __future__ import annotations

import json
import math

import pytest
import torch

from model.finite import FileScan, find, kind_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "inf"), (3e38, "")])
@pytest.mark.parametrize("at", [0, 5, 1023])
def test_the_kind_of_a_tensor(dtype, value, kind, at):
    values = torch.randn(1024).to(dtype)
    assert kind_of(values) == ""
    values[at] = value
    assert kind_of(values) == kind


def test_a_nan_is_told_before_an_infinity():
    assert kind_of(torch.tensor([math.inf, 1.0, math.nan, -math.inf])) == "NaN"
    assert kind_of(torch.empty(0)) == ""


def test_the_first_tensor_that_is_not_finite_is_named():
    tensors = {
        "a": torch.ones(2),
        "layers.0.ffn.down.exp_avg": torch.tensor([1.0, -math.inf]),
        "c": torch.tensor(math.nan),
    }
    assert find(tensors.items()) == "inf in layers.0.ffn.down (exp_avg)"
    assert find([("a", torch.ones(2))]) == ""


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(("at", "name"), [(0, "a"), (2, "a"), (3, "b (exp_avg_sq)"), (6, "b (exp_avg_sq)"), (None, "")])
def test_a_file_is_scanned_whatever_its_blocks(block, at, name):
    numbers = torch.ones(7)
    if at is not None:
        numbers[at] = math.nan
    entry = {"dtype": "F32", "shape": [0]}
    head = {"__metadata__": {"step": "1"}, "b.exp_avg_sq": entry | {"data_offsets": [12, 28]}}
    text = json.dumps(head | {"a": entry | {"data_offsets": [0, 12]}}).encode()
    content = len(text).to_bytes(8, "little") + text + numbers.numpy().tobytes()
    scan = FileScan()
    for begin in range(0, len(content), block):
        scan.add(content[begin : begin + block])
    assert scan.found == (f"NaN in {name}" if name else "")
