"""Reading JSON within bounds."""

from __future__ import annotations

import tracemalloc

import pytest

from kernels.common import json_files
from kernels.common.json_files import read_bytes


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
