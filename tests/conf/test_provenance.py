"""Provenance: the commit of this source tree and not of another, uncommitted changes, and the command as it was typed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conf.provenance import command_line, commit_of, provenance, summarise


def git(folder, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path):
    """A repository with one commit."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "code.py").write_text("1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_the_commit_and_whether_the_code_differs_from_it(clone):
    commit = git(clone, "rev-parse", "HEAD").strip()
    assert commit_of(clone) == (commit, False)
    (clone / "notes.txt").write_text("no code")
    assert commit_of(clone) == (commit, False)
    (clone / "arm.yaml").write_text("formula: x")
    assert commit_of(clone) == (commit, True)
    (clone / "arm.yaml").unlink()
    (clone / "code.py").write_text("2\n")
    assert commit_of(clone) == (commit, True)


def test_a_copy_of_the_source_inside_of_another_repository_has_no_commit(clone):
    (clone / "vendored").mkdir()
    assert commit_of(clone / "vendored") == (None, None)


def test_without_git_there_is_no_commit(clone, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit_of(clone) == (None, None)


def test_the_command_is_without_what_a_launcher_adds(monkeypatch):
    words = ["/usr/bin/python", "-u", "train.py", "--local_rank=1", "ffn=relu", "run=a b"]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert command_line() == "python train.py ffn=relu 'run=a b'"


def test_everything_that_a_result_depends_on_is_there(clone):
    content = provenance("CPU, 2 thread(s) x 1", clone)
    assert content.keys() >= {"date", "commit", "dirty", "host", "machine", "device", "python", "versions", "command"}
    assert content["versions"]["torch"]
    assert content["date"].endswith("+00:00")
    line = summarise(content | {"dirty": True})
    assert line.startswith(f"commit {content['commit'][:12]} with uncommitted changes; 20")
    assert "CPU, 2 thread(s) x 1" in line
