"""conf.group: groups outside of a run's configuration, as a cluster's file gives them."""

from __future__ import annotations

import shutil

import pytest

from conf import group, keys
from conf.cluster_schema import ClusterConfig

WRITTEN = """
time: 24:00:00        # 86400 to YAML
account: 0123         # 83
partition: 1e3
qos: null
environment: {A: true, B: 010, C: "x y", D: 12:30:00, E: 22, F: null}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    copied = tmp_path / "conf"
    shutil.copytree(keys.FOLDER / "cluster", copied / "cluster")
    for module in (keys, group):
        monkeypatch.setattr(module, "FOLDER", copied)
    (copied / "cluster" / "mine.yaml").write_text(WRITTEN)
    return copied


@pytest.mark.usefixtures("folder")
def test_texts_of_a_file_are_those_that_are_written():
    found, _ = group.read_group("cluster", ClusterConfig, ["cluster=mine", "cluster.environment.G=010"], "cluster")
    assert (found.time, found.account, found.partition, found.qos) == ("24:00:00", "0123", "1e3", None)
    expected = {"A": "true", "B": "010", "C": "x y", "D": "12:30:00", "E": "22", "F": "", "G": "010"}
    assert found.environment == expected


@pytest.mark.usefixtures("folder")
def test_a_dictionary_that_is_typed_replaces_that_of_the_file():
    found, _ = group.read_group("cluster", ClusterConfig, ["cluster=mine", "cluster.environment={A: x}"], "cluster")
    assert found.environment == {"A": "x"}
