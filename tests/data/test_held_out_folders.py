"""Held-out folders and packages: all documents of one are on one side."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from ablation.text_scatter import text_scatter
from conf.load import load
from conf.schema import DataConfig, TokenizerConfig
from data.batches import open_dataset
from data.documents import documents
from data.folder import folder_of
from data.held_out import Selection
from data.prepare import prepare
from kernels.common.errors import UserError
from kernels.common.json_files import read_document_losses
from tests.data.test_held_out import text
from training.evaluation import LossByDocument


@pytest.fixture
def projects(tmp_path) -> Path:
    """Twelve projects of 1 to 12 files, in folders of folders, and two files beside them."""
    chance = random.Random(0)
    for number in range(1, 13):
        for file in range(number):
            path = tmp_path / "code" / f"p{number}" / ("inner" if file % 2 else ".") / f"{file}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(chance, 6), encoding="utf-8")
    for name in ("alone.txt", "other.txt"):
        (tmp_path / "code" / name).write_text(text(chance, 6), encoding="utf-8")
    return tmp_path / "code"


def config(path: object, **keys) -> DataConfig:
    return DataConfig(name="code", source="text", path=path, held_out_by="folder", **keys)


def sides(data: DataConfig) -> dict[str, set[str]]:
    """Return the splits that each group's documents are in."""
    selection, found = Selection(data), {}
    for document in documents(data):
        split = selection.part(document.text, document.text.encode(), document.group).split
        found.setdefault(document.group, set()).add(split)
    return found


@pytest.mark.parametrize("how", ["folder", "glob", "list"])
def test_all_files_of_a_folder_are_on_one_side(projects, how):
    path = {"folder": str(projects), "glob": f"{projects}/**/*.txt", "list": [str(projects / "p1"), str(projects)]}[how]
    data = config(path, held_out_files=15)
    found = sides(data)
    assert all(len(splits) == 1 for splits in found.values())
    names = {f"p{number}" for number in range(2, 13)} | {"alone.txt", "other.txt"}
    assert names <= found.keys()
    held_out = {group for group, splits in found.items() if splits == {"held_out"}}
    counts = {group: sum(d.group == group for d in documents(data)) for group in held_out}
    assert 15 <= sum(counts.values()) <= 30


def test_a_fraction_is_of_the_documents(projects):
    held_out = sum(splits == {"held_out"} for splits in sides(config(str(projects), held_out=0.2)).values())
    assert held_out
    selection = Selection(config(str(projects), held_out=0.2))
    count = sum(document.group in selection.groups for document in documents(config(str(projects))))
    assert 16 <= count <= 32


def test_the_choice_depends_on_names_alone(projects):
    before = Selection(config(str(projects), held_out_files=15)).groups
    for path in projects.rglob("*.txt"):
        path.write_text(path.read_text() + "more\n")
    assert Selection(config(str(projects), held_out_files=15)).groups == before


def test_a_group_that_is_too_large_is_passed_over_and_one_folder_is_refused(projects, tmp_path):
    for group in Selection(config(str(projects), held_out_files=2)).groups:
        assert group in ("p1", "p2", "p3", "p4", "alone.txt", "other.txt")
    large = tmp_path / "two"
    for number in range(20):
        for name, most in (("a", 20), ("b", 12)):
            if number < most:
                path = large / name / f"{number}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{name} {number}\n")
    assert Selection(config(str(large), held_out_files=3)).groups == {"b"}
    lone = tmp_path / "lone"
    (lone / "a").mkdir(parents=True)
    for number in range(4):
        (lone / "a" / f"{number}.txt").write_text(f"{number}\n")
    with pytest.raises(
        UserError, match=r"data\.held_out_by=folder needs several folders, and all documents of data=code are"
    ):
        Selection(config(str(lone), held_out_files=3))


def test_a_prepared_folder_is_of_one_way_to_hold_out(projects, tmp_path):
    load_words = [
        "data=text",
        f"data.path={projects}",
        f"data.prepared={tmp_path / 'prepared'}",
        "tokenizer.vocab_size=300",
    ]
    by_document, by_folder = (
        load([*load_words, f"data.held_out_by={how}", "data.held_out_files=15"]) for how in ("document", "folder")
    )
    assert folder_of(by_document.data, by_document.tokenizer) != folder_of(by_folder.data, by_folder.tokenizer)
    dataset = open_dataset(prepare(by_folder.data, by_folder.tokenizer))
    assert 15 <= dataset.held_out.documents <= 30
    groups = Selection(by_folder.data).groups
    counts = collections.Counter(d.group for d in documents(by_folder.data) if d.group in groups)
    assert dataset.held_out_groups == tuple(counts.values())  # the documents of a folder follow each other
    assert open_dataset(prepare(by_document.data, by_document.tokenizer)).held_out_groups is None


def test_files_in_other_folders_are_another_corpus_where_folders_are_held_out(tmp_path):
    for number, folder in enumerate("aabbcc"):
        path = tmp_path / "code" / folder / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n")

    def names(place: Path) -> list[str]:
        keys = ({}, {"held_out_by": "document"}, {"held_out": 0.0})
        return [folder_of(dataclasses.replace(config(str(place)), **each), TokenizerConfig()).name for each in keys]

    before = names(tmp_path / "code")
    moved = (tmp_path / "code").rename(tmp_path / "moved")
    assert names(moved) == before
    (moved / "a" / "1.txt").rename(moved / "b" / "1.txt")  # the order of the files stays
    assert (names(moved)[0] != before[0], names(moved)[1:] == before[1:]) == (True, True)


def test_losses_are_added_up_by_folder(tmp_path):
    losses = LossByDocument("the text", np.arange(1.0, 7.0), np.array([2, 3, 4, 5, 6, 7]), np.array([1, 3, 2]))
    (tmp_path / "documents.json").write_text(json.dumps({"step": 3} | losses.as_json()))
    read = read_document_losses(tmp_path)
    assert (read.nats, read.tokens, read.unit) == ([1.0, 9.0, 11.0], [2, 12, 13], "folders")
    other = read._replace(nats=[1.5, 9.0, 11.0])
    assert text_scatter({0: read}, {0: other}).unit == "folders"
    assert text_scatter({0: read}, {0: other}).documents == 3
    wrong = dataclasses.replace(losses, folders=np.array([1, 3])).as_json()  # of another text
    assert (wrong["unit"], len(wrong["nats"])) == ("documents", 6)


def test_many_small_folders_are_preferred_to_few_large_ones(tmp_path):
    for number in range(60):
        for file in range(40 if number % 3 == 0 else 2):
            path = tmp_path / f"p{number}" / f"{file}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{number} {file}\n")
    groups = Selection(config(str(tmp_path), held_out_files=60)).groups
    assert len(groups) == 30
    assert all(int(name[1:]) % 3 for name in groups)
    assert len(Selection(config(str(tmp_path), held_out_files=100)).groups) in (
        41,
        42,
    )  # 80 documents, and a large folder


def test_the_installed_packages_are_groups_beside_the_standard_library(monkeypatch, tmp_path):
    generated = ("site/__editable___mine_1_0_finder.py", "site/_virtualenv.py")  # by installers: they are left out
    names = ("stdlib/ast.py", "stdlib/json/decoder.py", "site/numpy/core.py", "site/numpy/tests/x.py", "site/six.py")
    for name in (*names, *generated):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    places = {"stdlib": tmp_path / "stdlib", "purelib": tmp_path / "site", "platlib": tmp_path / "site"}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(places[name]))
    found = {d.name: d.group for d in documents(DataConfig(source="installed"))}
    assert found == {"ast.py": "ast.py", "json/decoder.py": "json", "numpy/core.py": "numpy", "six.py": "six.py"}
    assert [d.name for d in documents(DataConfig(source="stdlib"))] == ["ast.py", "json/decoder.py"]
    of_group = load(["data=installed"]).data
    assert (of_group.held_out_by, of_group.held_out_files) == ("folder", 300)
