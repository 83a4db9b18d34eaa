"""Reading JSON within bounds."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from kernels.common import json_files
from kernels.common.json_files import metrics_line, read_bytes, read_summary


def test_a_short_file_takes_little_memory_whatever_the_limit(tmp_path):
    path = tmp_path / "short.json"
    path.write_bytes(b"{}")
    tracemalloc.start()
    try:
        assert read_bytes(path, 1 << 40) == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 2 * json_files._BLOCK
    finally:
        tracemalloc.stop()


def test_a_file_is_read_in_blocks_up_to_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "_BLOCK", 4)
    path = tmp_path / "long"
    path.write_bytes(b"0123456789")
    assert read_bytes(path, 10) == b"0123456789"
    with pytest.raises(ValueError, match="has more than 9 bytes"):
        read_bytes(path, 9)


@pytest.mark.parametrize(
    ("figures", "is_line"),
    [
        ({}, True), ({"loss": 2.5, "tokens": 9, "mfu": None}, True), ({"loss": float("nan")}, True), ({"loss": 3}, True),
        ({"loss": "2.5"}, False), ({"loss": [2.5]}, False), ({"loss": 10**400}, False), ({"loss": True}, False),
        ({"tokens": -1}, False), ({"tokens": 2.0}, False), ({"held_out_tokens": 1 << 62}, False), ({"event": 5}, False),
        ({"run_id": {}}, False), ({"a later figure": {"a": 1}}, True),
        ({"kind": "telemetry", "zeros": [0.5, None]}, True), ({"kind": "telemetry", "zeros": ["x"]}, False),
        ({"kind": "telemetry", "zeros": {"a": 1}}, False), ({"kind": "telemetry", "zeros": [[0.5]]}, False),
    ],
)  # fmt: skip
def test_the_figures_of_a_line_have_their_types(figures, is_line):
    line = {"kind": "train", "step": 3} | figures
    assert (metrics_line(json.dumps(line).encode()) is not None) == is_line


@pytest.mark.parametrize(
    ("key", "value"),
    [("status", 3), ("final_eval_loss", "x"), ("steps", -1), ("wall_seconds", []), ("data_order_hash", {}),
     ("provenance", []), ("provenance", {"versions": []}), ("provenance", {"commit": True}), ("vocab_size", 0.5)],
)  # fmt: skip
def test_a_summary_with_a_value_of_another_type_is_none(tmp_path, key, value):
    path = tmp_path / "summary.json"
    summary = {"status": "finished", "steps": 8, "final_eval_loss": 2.5, "provenance": {"versions": {"torch": "2"}}}
    path.write_text(json.dumps(summary))
    assert read_summary(path) == summary
    path.write_text(json.dumps(summary | {key: value}))
    with pytest.raises(ValueError, match=key):
        read_summary(path)
