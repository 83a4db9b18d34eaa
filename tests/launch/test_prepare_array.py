"""The jobs that prepare a corpus in parts, and what is printed about them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ablation.slurm import read_tasks
from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from kernels.common.errors import UserError
from launch import sbatch
from launch.job_script import render
from launch.prepare import jobs_of, main
from launch.sbatch import cpu_nodes
from tests.launch.test_sbatch import options
from tests.training.tiny import command

WORDS = ["data=text", "data.path=it's/*.txt"]


def scripts(folder: Path, *words: str) -> dict[str, str]:
    """Render the jobs of three parts; the scripts by their names."""
    cluster, _ = read_group("cluster", ClusterConfig, ["cluster=h100", *words], "cluster")
    cluster = cpu_nodes(cluster, [word.partition("=")[0].removeprefix("cluster.") for word in words])
    return {job.script: render(job, cluster) for job in jobs_of(folder, cluster, 3, WORDS, "data=text")}


def test_three_jobs_plan_tokenize_and_write_the_index(tmp_path):
    rendered = scripts(tmp_path / "text-01234567.jobs", "cluster.cpu_partition=cpus", "cluster.cpus_per_node=16")
    assert list(rendered) == ["plan.sh", "parts.sh", "index.sh"]
    code = tmp_path / "text-01234567.jobs" / "slurm" / "code"
    prepare = f"{sys.executable} -u {code}/launch/run_module.py data.prepare data=text {shlex.quote(WORDS[1])}"
    ends = {"plan.sh": f"{prepare} part=plan", "parts.sh": f'{prepare} "part=$task"', "index.sh": prepare}
    for name, text in rendered.items():
        assert text.endswith(f"srun --nodes=1 --ntasks=1 --cpus-per-task=$SLURM_CPUS_PER_TASK \\\n    {ends[name]}\n")
        found = options(text)
        assert found["--job-name"] == f"text-01234567-{name.removesuffix('.sh')}"
        assert (found["--nodes"], found["--partition"], found["--cpus-per-task"]) == ("1", "cpus", "16")
        assert not {"--gpus-per-node", "--signal"} & found.keys()  # nothing in it would handle the signal
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert options(rendered["parts.sh"])["--array"] == "0-2"
    assert "--array" not in options(rendered["plan.sh"]) | options(rendered["index.sh"])
    (tmp_path / "parts.sh").write_text(rendered["parts.sh"])
    assert read_tasks(tmp_path / "parts.sh") == ["0/3", "1/3", "2/3"]


def test_each_job_needs_the_success_of_the_one_before(tmp_path, monkeypatch, capsys):
    submitted = []
    monkeypatch.setattr(sbatch.shutil, "which", lambda _: "sbatch")
    monkeypatch.setattr(sbatch, "_sbatch", lambda arguments, _: submitted.append(arguments) or str(len(submitted)))
    monkeypatch.setattr("launch.prepare.refuse_queued", lambda _: None)
    folder = tmp_path / "text-01234567.jobs"
    assert main([f"folder={folder}", "jobs=3", "cluster=cpu", *WORDS]) == 0
    slurm = folder / "slurm"
    assert submitted == [
        [f"{slurm}/plan.sh"],
        ["--dependency=afterok:1", "--kill-on-invalid-dep=yes", f"{slurm}/parts.sh"],
        ["--dependency=afterok:2", "--kill-on-invalid-dep=yes", f"{slurm}/index.sh"],
    ]
    assert (slurm / "code" / "data" / "prepare.py").exists()
    assert "# written by  python -m data.prepare jobs=3 cluster=cpu data=text" in (slurm / "plan.sh").read_text()
    again = f"sbatch --dependency=afterok:$(sbatch --parsable --array=TASK {slurm}/parts.sh) --kill-on-invalid-dep=yes "
    assert f"{again}{slurm}/index.sh\n" in capsys.readouterr().out


def test_jobs_that_are_queued_are_not_submitted_again(tmp_path, monkeypatch):
    waiting = sbatch.Queued("7_2", "PENDING", "text-01234567-parts", 2)
    monkeypatch.setattr(sbatch, "queued", lambda _: [waiting])
    monkeypatch.setattr("launch.prepare.submit", lambda *_: pytest.fail("a job was submitted"))
    with pytest.raises(UserError, match=r"has been submitted already: job 7_2 is pending.*scancel 7$"):
        main([f"folder={tmp_path}/text-01234567.jobs", "jobs=3", "cluster=cpu", *WORDS])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["jobs=2"], "error: cluster=NAME is missing: choose a cluster from"),
        (["cluster=cpu"], "error: missing jobs=N, the parts that the corpus is tokenized in"),
        (["cluster=cpu", "jobs=0"], "error: jobs=0: expected a whole number of at least 1"),
        (["cluster=cpu", "jobs=2", "data.path=missing.txt"], "error: there is no file or folder missing.txt"),
    ],
)
def test_what_cannot_be_submitted_is_refused_in_a_sentence(tmp_path, words, sentence):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    settings = ["data=text", f"data.path={tmp_path}/a.txt", f"data.prepared={tmp_path}/p"]
    ended = command(sys.executable, "-m", "data.prepare", *settings, *words)
    assert (ended.status, ended.out) == (2, "")
    assert re.match(re.escape(sentence), ended.err)
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "p").exists()
