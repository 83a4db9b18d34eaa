"""The script of a job, as a person reads it, and what is refused before SLURM is asked."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ablation.slurm import read_tasks
from conf.keys import choices
from conf.load import read_group
from conf.schema import ClusterConfig
from kernels.common.errors import UserError
from launch.sbatch import Job, _sbatch, command_of, render
from launch.slurm import main, plan
from tests.training.tiny import ROOT, command


def cluster(name: str = "h100", **changes: object) -> ClusterConfig:
    return dataclasses.replace(read_group("cluster", ClusterConfig, [f"cluster={name}"], "cluster")[0], **changes)


def script(of: ClusterConfig, *words: str, nodes: int = 2, ranks_per_node: int = 0) -> str:
    job, _ = plan(of, nodes, ranks_per_node, ["model=llama3_8b", "ffn=swiglu", *words], "nodes=2")
    return render(job, of)


def options(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH (--[\w-]+)=?(.*)$", text, re.MULTILINE))


def test_a_job_asks_for_what_it_uses():
    found = options(script(cluster(partition="main", account="lab", sbatch=["--exclusive"])))
    run = Path("runs/llama3_8b-swiglu").resolve()
    assert found == {
        "--job-name": "llama3_8b-swiglu", "--output": f"{run}/slurm/%j.log", "--comment": str(run), "--chdir": str(Path.cwd()),
        "--nodes": "2", "--ntasks-per-node": "8", "--cpus-per-task": "12", "--gpus-per-node": "8", "--mem": "0",
        "--time": "24:00:00", "--signal": "B:USR1@120", "--partition": "main", "--account": "lab", "--requeue": "",
        "--open-mode": "append", "--exclusive": "",
    }  # fmt: skip
    some = options(script(cluster(gpu_request="--gres", tasks="node"), "parallel.tensor=2", nodes=1, ranks_per_node=2))
    assert (some["--gres"], some["--ntasks-per-node"], some["--cpus-per-task"]) == ("gpu:2", "1", "24")
    assert "--mem" not in some  # all of the node is not for two of its GPUs
    assert not {"--gres", "--gpus-per-node"} & options(script(cluster("cpu"), ranks_per_node=2)).keys()


@pytest.mark.parametrize("name", choices("cluster"))
@pytest.mark.parametrize("tasks", ["gpu", "node"])
@pytest.mark.parametrize("container", ["none", "apptainer", "pyxis"])
def test_bash_can_read_every_script(name, tasks, container):
    of = cluster(name, tasks=tasks, container=container, image="/images/it's.sqsh", mounts=["/data:/data"])
    of = dataclasses.replace(of, modules=["cuda/12"], setup=["true"], environment={"NCCL_DEBUG": "WARN x"})
    text = script(of, "prompts=['it']", nodes=2, ranks_per_node=2)
    read = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (read.returncode, read.stderr) == (0, "")
    assert text.index("module load cuda/12") < text.index("export NCCL_DEBUG='WARN x'") < text.index("\nsrun ")
    assert text.index("launch.doctor quick=true") < text.index("train.py")


def test_what_srun_starts():
    words = ["ffn=relu"]
    line = command_of(cluster(), 2, 8, Path("/code"), words)
    assert line == f"{sys.executable} -u /code/train.py ffn=relu"
    node = command_of(cluster(tasks="node"), 2, 8, Path("/code"), words)
    assert node.startswith("bash -c 'exec ")  # where $SLURM_NODEID is the task's
    assert "--nnodes=2 --nproc-per-node=8 --node-rank=$SLURM_NODEID" in node
    here, run = Path.cwd(), Path("runs/llama3_8b-swiglu").resolve()
    mounts = f"{here}:{here},{run}:{run}"
    pyxis = f"--container-image=/i.sqsh --container-mounts={mounts} --container-workdir={here} \\\n    python -u"
    assert pyxis in script(cluster(container="pyxis", image="/i.sqsh"))
    apptainer = f"apptainer exec --nv --bind {mounts} --pwd {here} /i.sqsh python -u"
    assert apptainer in script(cluster(container="apptainer", image="/i.sqsh"))


def test_the_tasks_of_an_array_are_read_back(tmp_path):
    names = ("nano-relu-lr*-seed0", "nano-swiglu-lr*-seed0")
    job = Job(
        "plan-seeds", tmp_path, 'run "task=$task"', "doctor", "typed", "x", tasks=names, at_once=3, script="seeds.sh"
    )
    text = render(job, cluster("cpu"))
    assert options(text)["--array"] == "0-1%3"
    (tmp_path / "seeds.sh").write_text(text)
    assert read_tasks(tmp_path / "seeds.sh") == list(names)
    assert read_tasks(tmp_path / "missing.sh") == []


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["cluster=h10"], "unknown cluster 'h10': did you mean 'h100'"),
        (["ffn=relu"], "cluster=NAME is missing: choose a cluster from"),
        (["cluster=h100", "ranks_per_node=9"], "ranks_per_node=9, but a node of h100 has 8 GPUs"),
        (["cluster=cpu", "ranks_per_node=5"], "ranks_per_node=5, but a node of cpu has 4 cores"),
        (["cluster=h100", "nodes=3", "parallel.tensor=16"], "on 3 x 8 ranks: "),
        (["cluster=cpu", "nodes=0"], "nodes=0: expected a whole number of at least 1"),
        (["cluster=h100", "cluster.tasks=rank"], "cluster.tasks=rank must be one of gpu, node"),
        (["cluster=h100", "cluster.container=docker"], "cluster.container=docker must be one of"),
        (["cluster=h100", "cluster.container=pyxis"], "cluster.container=pyxis needs cluster.image=IMAGE"),
        (["cluster=h100", "ffn=rellu"], "unknown"),
    ],
)
def test_bad_input_is_one_sentence(words, why):
    with pytest.raises(UserError, match=re.escape(why)):
        main([*words, "dry_run=true"])


def test_without_sbatch_the_script_is_printed_and_how_to_submit_it(tmp_path):
    words = ["cluster=cpu", "nodes=2", "run=x", f"runs={tmp_path}"]
    dry = command(sys.executable, "-m", "launch.slurm", *words, "dry_run=true")
    assert dry.status == 0
    assert not (tmp_path / "x").exists()
    no_slurm = {"PATH": os.defpath.replace("/usr/bin", "").replace("/bin", "")}
    result = subprocess.run(
        [sys.executable, "-m", "launch.slurm", *words], cwd=ROOT, env=no_slurm, capture_output=True, text=True
    )
    assert result.returncode == 2
    kept = tmp_path / "x" / "slurm" / "job.sh"
    # The version of git and the option are what differs.
    strip = lambda text: [line for line in text.splitlines() if not line.startswith("# w")]  # noqa: E731
    assert strip(result.stdout) == strip(dry.out) == strip(kept.read_text())
    assert f"run  sbatch {kept}" in result.stderr
    assert os.access(kept, os.X_OK)
    code = tmp_path / "x" / "slurm" / "code"
    assert (code / "train.py").read_bytes() == (ROOT / "train.py").read_bytes()
    assert "run: x" in (tmp_path / "x" / "slurm" / "config.yaml").read_text()
    helped = subprocess.run([sys.executable, code / "train.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr


@pytest.mark.parametrize("job", ["launch", "by hand"])
def test_a_job_inherits_nothing_of_the_step_that_submits_it(tmp_path, monkeypatch, job):
    """Its own variables are SLURM's; those of an interactive step or of torchrun around the command would mislead srun."""
    outer = {
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_CPU_BIND": "quiet",
        "RANK": "3",
        "TORCHELASTIC_RUN_ID": "x",
    }
    for name, value in outer.items() | {("SLURM_MEM_PER_CPU", "100"), ("SLURM_CONF", "/etc/c")}:
        monkeypatch.setenv(name, value)
    if job == "launch":
        sbatch = tmp_path / "sbatch"
        sbatch.write_text("#!/bin/sh\nenv\n")
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        seen = _sbatch(["job.sh"])
        assert "SLURM_MEM_PER_CPU=" not in seen
        assert "SLURM_CONF=/etc/c" in seen
    else:
        lines = [line for line in script(cluster()).splitlines() if line.startswith("unset ")]
        seen = subprocess.run(["bash", "-c", "\n".join([*lines, "env"])], capture_output=True, text=True).stdout
    assert not [name for name in outer if f"\n{name}=" in seen]
