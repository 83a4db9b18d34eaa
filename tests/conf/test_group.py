"""conf.group: groups outside of a run's configuration, as a cluster's file gives them."""

from __future__ import annotations

import shutil

import pytest

from conf import group, keys
from conf.cluster_schema import ClusterConfig
from kernels.common.errors import UserError

WRITTEN = """
time: 24:00:00        # 86400 to YAML
account: 0123         # 83
partition: 1e3
qos: null
environment: {A: true, B: 010, C: "x y", D: 12:30:00, E: 22, F: null}
modules: [cuda/12.8, 12.10]
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
    assert found.modules == ["cuda/12.8", "12.10"]


@pytest.mark.usefixtures("folder")
def test_a_dictionary_that_is_typed_replaces_that_of_the_file():
    found, _ = group.read_group("cluster", ClusterConfig, ["cluster=mine", "cluster.environment={A: x}"], "cluster")
    assert found.environment == {"A": "x"}


@pytest.mark.usefixtures("folder")
def test_texts_in_a_typed_dictionary_or_list_are_those_that_are_typed():
    words = ["cluster=mine", "cluster.environment={A: 010, B: on}", "cluster.modules=[12.10]", "cluster.sbatch=[]"]
    found, _ = group.read_group("cluster", ClusterConfig, words, "cluster")
    assert (found.environment, found.modules, found.sbatch) == ({"A": "010", "B": "on"}, ["12.10"], [])


@pytest.mark.parametrize(
    ("written", "typed", "reason"),
    [
        ("setup: module load cuda", [], r"^cluster mine: setup takes a list, \[one, two\]$"),
        ("", ["cluster.modules=cuda"], r"modules takes a list"),
        (
            "setup: [export A=1, echo a: b]",
            [],
            r"setup takes a list of texts, and one of them is {'echo a': 'b'}: write it in",
        ),
    ],
)
def test_what_is_no_list_of_texts_is_refused(folder, written, typed, reason):
    (folder / "cluster" / "mine.yaml").write_text(written)
    with pytest.raises(UserError, match=reason):
        group.read_group("cluster", ClusterConfig, ["cluster=mine", *typed], "cluster")
