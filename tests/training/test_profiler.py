"""A profile of some steps: its files, what counts to which part, and the floors."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType

from conf.load import load
from conf.shape import shape_of
from conf.validate import validate
from kernels.common.errors import UserError
from launch.estimate.counts import flops_per_token
from tests.training.tiny import overrides
from training.profiler import PARTS, _covered, check_steps, floors, parse_steps, part_of, parts_table, seconds_by_part


@pytest.mark.parametrize("text", ["10", "3:2", "0:4", "a:b", "1:2:3", ":4", "-1:2", ""])
def test_two_steps_are_asked_for(text):
    with pytest.raises(UserError, match="expected FIRST:LAST"):
        parse_steps(text)
    assert parse_steps("10:13") == (10, 13)


def test_a_profile_beyond_the_end_is_refused():
    check_steps(None, 5)
    check_steps("5:5", 5)
    with pytest.raises(UserError, match="profile=4:6: the run has 5 steps"):
        check_steps("4:6", 5)


def event(*names: str) -> SimpleNamespace:
    """An operation within others, the outermost first."""
    made = None
    for name in names:
        made = SimpleNamespace(name=name, cpu_parent=made)
    return made


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["aten::mm"], "GEMM"),
        (["_LinearCrossEntropy", "aten::mm"], "GEMM"),
        (["_LinearCrossEntropy", "aten::copy_"], "loss"),
        (["autograd::engine::evaluate_function: _RMSNormBackward", "aten::sum"], "norm"),
        (["_FeedForward"], "activation"),
        (["_FeedForward", "aten::mm"], "GEMM"),
        (["_CausalAttention", "aten::bmm"], "attention"),
        (["aten::scaled_dot_product_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["part: optimizer", "Optimizer.step#AdamW.step", "aten::_fused_adamw_"], "optimizer"),
        (["part: optimizer", "c10d::allreduce_"], "communication"),
        (["part: data", "aten::to"], "data"),
        (["aten::embedding"], "other"),
    ],
)
def test_an_operation_counts_to_the_part_it_is_in(names, expected):
    assert part_of(event(*names)) == expected


def test_the_seconds_add_up_to_the_wall_clock():
    cpu = DeviceType.CPU
    events = [
        SimpleNamespace(device_type=cpu, name=name, cpu_parent=None, self_cpu_time_total=time)
        for name, time in (("aten::mm", 3e6), ("[memory]", 9e6), ("aten::embedding", 1e6))
    ]
    seconds = seconds_by_part(events, wall=10.0, on_gpu=False)
    assert {name: time for name, time in seconds.items() if time} == {"GEMM": 3, "other": 1, "Python": 6}


def test_kernels_of_a_gpu_count_to_the_operation_that_launched_them():
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    launched = [SimpleNamespace(duration=2e6), SimpleNamespace(duration=1e6)]
    spans = [SimpleNamespace(start=0.0, end=2e6), SimpleNamespace(start=1e6, end=4e6)]
    events = [
        SimpleNamespace(device_type=cpu, name="aten::mm", cpu_parent=None, kernels=launched),
        *(SimpleNamespace(device_type=cuda, time_range=span) for span in spans),
    ]
    seconds = seconds_by_part(events, wall=5.0, on_gpu=True)
    assert {name: time for name, time in seconds.items() if time} == {"GEMM": 3, "idle": 1}


def test_intervals_that_overlap_count_once():
    assert _covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4
    assert _covered([]) == 0


def test_floors_are_flops_at_the_peak_and_bytes_at_the_bandwidth():
    config = load(["model=llama_1b", "precision=bf16", "global_batch_size=64", "micro_batch_size=4"])
    shape, batch = shape_of(config), validate(config, 8)
    least = floors(config, shape, batch, 8, True, 1e15, 3e12, True)
    tokens = 2 * 4 * config.sequence_length
    assert batch.accumulation == 2
    total = sum(flops_per_token(shape, config.sequence_length).values())
    assert least["GEMM"] + least["attention"] == pytest.approx(total * tokens / 1e15)
    h = 3 * 3 * shape.ffn[0].d_ff * shape.n_layers
    assert least["activation"] == pytest.approx(2 * h * tokens / 3e12)
    assert set(least) <= set(PARTS)


def test_the_table_names_the_waits():
    seconds = dict.fromkeys(PARTS, 0.0) | {"GEMM": 6.0, "Python": 2.0}
    table = parts_table(seconds, {"GEMM": 1.5}, 2, Counter({"called a synchronizing CUDA operation": 4}))
    assert "# 2 step(s), 4 seconds each" in table
    assert "| GEMM | 3 | 75.0% | 1.5 | 2.0x |" in table
    assert "| Python | 1 | 25.0% |  |  |" in table
    assert "- 4 times: called a synchronizing CUDA operation" in table


def test_a_run_writes_its_profile(no_group, corpus, tmp_path):
    """And learns what it learns without."""
    for run, more in (("plain", {}), ("profiled", {"profile": "2:3"})):
        arguments = overrides(corpus, tmp_path, run=run, steps=4, eval_every=0, save_every=0, **more)
        result = no_group.run("command", module="train", arguments=arguments)[0]
        assert result["status"] == 0, result["err"]
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("plain", "profiled")]
    losses = [[each["loss"] for each in map(json.loads, text) if each["kind"] == "train"] for text in lines]
    assert losses[0] == losses[1]
    folder, printed = tmp_path / "profiled", result["out"]
    assert sorted(path.name for path in (folder / "profile").iterdir()) == ["memory.csv", "parts.md", "trace.json.gz"]
    table = (folder / "profile" / "parts.md").read_text(encoding="utf-8")
    assert table.startswith("# 2 step(s), ")
    for name in ("GEMM", "attention", "activation", "norm", "loss", "optimizer", "data", "Python"):
        assert f"| {name} | " in table
    assert "| GEMM | " in printed
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        names = {each.get("name") for each in json.load(file)["traceEvents"]}
    assert {"aten::mm", "_LinearCrossEntropy", "part: optimizer", "part: data"} <= names
    with open(folder / "profile" / "memory.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 10
    assert all(int(row["allocated_bytes"]) >= 0 for row in rows)
