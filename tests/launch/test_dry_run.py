"""A dry run prints the script of a job, also of one whose corpus only the container can look at."""

from __future__ import annotations

import subprocess

import pytest

from launch import corpus
from launch.slurm import main


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_a_dry_run_in_a_container_prints_the_script(container, capsys, monkeypatch, tmp_path):
    # What the command that looks at corpora prints without any: its usage.
    usage = subprocess.CompletedProcess([], 0, stdout="Return 0 if\nthe corpus\n", stderr="")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: usage)
    words = [f"cluster.container={container}", "cluster.image=/i.sqsh", f"runs={tmp_path}", "model=llama_1b"]
    assert main(["cluster=h100", *words, "dry_run=true"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n")
    assert "/i.sqsh" in printed.out
    assert printed.err == ""
