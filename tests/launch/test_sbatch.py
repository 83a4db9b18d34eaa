"""The script of a job, as a person reads it, and what is refused before SLURM is asked."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ablation.slurm import read_tasks
from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from conf.keys import choices
from conf.load import load
from data.prepare import prepare
from kernels.common.errors import UserError
from kernels.common.text import CONTROL
from launch import sbatch
from launch.job_script import Job, command_of, quote, render
from launch.sbatch import _sbatch
from launch.slurm import main, plan
from tests.data.conftest import look_here
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
    assert text.index("module load cuda/12") < text.index("export NCCL_DEBUG='WARN x'") < text.index("\n    srun ")
    assert text.index("launch.doctor") < text.index("train.py")


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
        (
            ["cluster=h100", "cluster.signal_seconds=-5"],
            "cluster.signal_seconds=-5 must be a number of seconds from 1 to",
        ),
        (
            ["cluster=h100", "cluster.signal_seconds=100000"],
            "cluster.signal_seconds=100000 must be a number of seconds",
        ),
        (
            ["cluster=h100", "cluster.time=0:01:00"],
            "cluster.time=0:01:00 is not longer than cluster.signal_seconds=120",
        ),
        (["cluster=h100", "cluster.time=2"], "cluster.time=2 is not longer than cluster.signal_seconds=120"),
        (["cluster=h100", "ffn=rellu"], "unknown"),
    ],
)
def test_bad_input_is_one_sentence(words, why):
    with pytest.raises(UserError, match=re.escape(why)):
        main([*words, "dry_run=true"])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("3", 180), ("1:30", 90), ("24:00:00", 86400), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784),
     ("UNLIMITED", 0), ("0", 0)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(time, seconds):
    assert sbatch._limit_seconds(time) == seconds


def test_a_dry_run_says_what_a_submission_refuses(capsys, monkeypatch, tmp_path):
    look_here(monkeypatch, capsys)
    words = ["cluster=cpu", f"runs={tmp_path}", "run=x", f"data.prepared={tmp_path / 'p'}", "dry_run=true"]
    assert main([*words, "tokens=1T"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/bin/bash\n")
    assert re.match("warning: without dry_run=true this is refused: this run would go more than .* stdlib", printed.err)
    assert main([*words, "tokens=1M"]) == 0
    assert capsys.readouterr().err == ""


def test_without_sbatch_the_script_is_printed_and_how_to_submit_it(tmp_path):
    words = ["cluster=cpu", "nodes=2", "run=x", f"runs={tmp_path}", f"data.prepared={tmp_path / 'p'}"]
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
    prepare = kept.with_name("prepare.sh")
    assert f"run  sbatch --dependency=afterok:$(sbatch --parsable {prepare}) {kept}" in result.stderr
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
        sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen; echo 7\n")
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert _sbatch(["job.sh"]) == "7"
        seen = (tmp_path / "seen").read_text()
        assert "SLURM_MEM_PER_CPU=" not in seen
        assert "SLURM_CONF=/etc/c" in seen
    else:
        lines = [line for line in script(cluster()).splitlines() if line.startswith("unset ")]
        seen = subprocess.run(["bash", "-c", "\n".join([*lines, "env"])], capture_output=True, text=True).stdout
    assert not [name for name in outer if f"\n{name}=" in seen]


NAME = "lr 50%user it's |$(false)"


def test_a_name_of_any_characters_stays_one(tmp_path):
    """Patterns of sbatch, words and substitutions of the shell, quotes, and the separator of a listing."""
    text = script(cluster(), f"runs={tmp_path}", f"run={NAME}")
    outputs = re.findall("^#SBATCH --output=(.*)$", text, re.MULTILINE)
    assert shlex.split(outputs[0]) == [f"{tmp_path}/{NAME}/slurm/%j.log".replace("50%u", "50%%u")]
    saved = re.search(r"^saved\(\).*$", text, re.MULTILINE)[0]
    checkpoint = tmp_path / NAME / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    seen = subprocess.run(["bash", "-c", f"{saved}\nsaved"], capture_output=True, text=True)
    assert seen.stdout == f"{checkpoint}\n"
    trained = re.search(r"\n    (\S+ -u .*train\.py.*) &\n", text)[1]
    assert shlex.split(trained)[-1] == f"run={NAME}"


def test_no_line_of_what_was_typed_becomes_a_command():
    job, _ = plan(cluster(), 1, 0, ["ffn=swiglu", "run=x"], "'prompts=[a\nrm -r x]'")
    assert "# written by  python -m launch.slurm 'prompts=[a rm -r x]'\n" in render(job, cluster())


@pytest.mark.parametrize(
    "text", ["a\nb", "it's\x1b[31m\\x", "\u202eabc", "\x85", "\t", "$(false)`id`\n!$HOME", "\\'\n", "plain", "a b"]
)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_text_is_one_word_of_one_line_to_the_shell(text, locale):
    word = quote(text)
    assert word.isprintable()
    for line in (f"printf %s {word}", f"bash -c {shlex.quote(f'printf %s {word}')}"):
        printed = subprocess.run(["bash", "-c", line], capture_output=True, env={**os.environ, "LC_ALL": locale})
        assert printed.stdout.decode() == text


@pytest.mark.parametrize("key", ["partition", "account", "qos", "time", "python", "memory", "cpu_partition", "image"])
def test_a_setting_of_two_lines_is_refused(key):
    of = cluster(**{key: "a\n#SBATCH --uid=0\ntouch x"})
    with pytest.raises(UserError, match=rf"cluster.{key} has the character '\\n', which a job script cannot hold"):
        script(of)


@pytest.mark.parametrize("key", ["sbatch", "modules", "mounts"])
def test_a_list_with_two_lines_in_an_item_is_refused(key):
    with pytest.raises(UserError, match=f"cluster.{key} has the character"):
        script(cluster(**{key: ["fine", "a\rtouch x"]}))


def test_a_script_has_no_control_characters_and_no_more_lines_than_before():
    plain = script(cluster(), "run=x", "prompts=['a']")
    text = script(cluster(), "run=x", "prompts=['a\ntouch x\n#SBATCH --x\x1b[2J']")
    assert len(text.splitlines()) == len(plain.splitlines())
    assert not CONTROL.search(text)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_module_is_a_word_to_the_shell():
    assert "\nmodule load gcc/12 'cuda;' reboot\n" in script(cluster(modules=["gcc/12 cuda; reboot"]))


KEY = "hf_0123456789abcdef"


def test_a_secret_is_handed_to_sbatch_and_written_nowhere(tmp_path, monkeypatch):
    words = [
        "cluster=cpu",
        "run=x",
        f"runs={tmp_path}",
        f"cluster.environment.HF_TOKEN={KEY}",
        "cluster.environment.A=1",
    ]
    given: dict[str, str] = {}

    def run(command: list[str], **options: dict[str, str]) -> subprocess.CompletedProcess[str]:
        if command[0] == "sbatch":
            given.update(options["env"])
        return subprocess.CompletedProcess(command, 0, stdout="7\n")

    monkeypatch.setattr(sbatch.subprocess, "run", run)
    monkeypatch.setattr(sbatch.shutil, "which", lambda _: "sbatch")
    assert main(words) == 0
    assert given["HF_TOKEN"] == KEY
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    text = (tmp_path / "x" / "slurm" / "job.sh").read_text()
    assert "cluster.environment.HF_TOKEN=***" in text
    assert "Before sbatch is called by hand: export HF_TOKEN\nexport A=1\n" in text


@pytest.mark.parametrize(
    "changes",
    [{"setup": [f"export HF_TOKEN={KEY}"]}, {"sbatch": [f"--export=ALL,HF_TOKEN={KEY}"]}, {"account": KEY}],
)
def test_a_script_that_would_hold_a_secret_is_refused(changes, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    with pytest.raises(UserError, match="HF_TOKEN, and everybody can read"):
        script(cluster(**changes))
    assert "export HF_TOKEN=$(cat ~/token)" in script(cluster(setup=["export HF_TOKEN=$(cat ~/token)"]))


def test_a_snapshot_has_the_code_and_no_secrets(tmp_path, monkeypatch):
    root, names = tmp_path / "root", ("training", "conf")
    for name in ("training/loop.py", "training/.env", "training/deploy_key.pem", "training/.aws/x.py", "conf/keys.py",
                 "conf/credentials.json", "conf/cluster/mine.yaml", "conf/secrets.yaml", "training/notes.ipynb"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"environment:\n  A: 1\n  HF_TOKEN: {KEY}\nmodules: []\n")
    (root / "training" / "linked.py").symlink_to("/etc/hostname")
    monkeypatch.setattr(sbatch, "ROOT", root)
    monkeypatch.setattr(sbatch, "_CODE", names)
    sbatch._keep_code(tmp_path / "code")
    kept = sorted(str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*") if path.is_file())
    assert kept == ["conf/cluster/mine.yaml", "conf/keys.py", "training/loop.py"]
    copied = (tmp_path / "code" / "conf" / "cluster" / "mine.yaml").read_text()
    assert copied == "environment:\n  A: 1\n  HF_TOKEN: ***\nmodules: []\n"


def test_a_snapshot_has_every_source_file():
    tracked = subprocess.run(
        ["git", "ls-files", *sbatch._CODE], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    left_out = [name for name in tracked if sbatch._no_code(str(ROOT / name.rpartition("/")[0]), [Path(name).name])]
    assert not left_out


@pytest.mark.parametrize(
    ("changes", "run", "why"),
    [
        ({}, "a\\b", r"has the character '\\\\', and SLURM cannot write a log there"),
        ({}, "a\nb", r"has the character '\\n', and SLURM cannot write a log there"),
        (
            {"container": "pyxis", "image": "i"},
            "a:b",
            "has the character ':', which separates the mounts of a container",
        ),
        ({"environment": {"A B": 1}}, "a", "cluster.environment: 'A B' is not a name of an environment variable"),
    ],
)
def test_a_name_that_slurm_would_misread_is_refused(changes, run, why):
    of = cluster(**changes)
    job, _ = plan(of, 1, 0, ["ffn=swiglu", "run=x"], "")
    with pytest.raises(UserError, match=why):
        render(dataclasses.replace(job, folder=job.folder.with_name(run)), of)


def test_the_queue_is_read_whatever_its_jobs_are_called(tmp_path, monkeypatch):
    folder = tmp_path / NAME

    def listing(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        [form] = [word for word in command if word.startswith("--format=")]
        values = {"%i": "7_3", "%T": "RUNNING", "%j": "a|b", "%K": "3", "%k": str(folder)}
        line = re.sub("%.", lambda match: values[match[0]], form.removeprefix("--format="))
        return subprocess.CompletedProcess(command, 0, stdout=line + "\n")

    monkeypatch.setattr(sbatch.subprocess, "run", listing)
    assert sbatch.queued(folder) == [sbatch.Queued("7_3", "RUNNING", "a|b", 3)]


def test_output_is_labelled_and_ranks_keep_their_cores():
    text = script(cluster())
    train = text[text.index("\n    srun ") :]
    assert "srun --ntasks=16 --distribution=block --label --cpu-bind=cores --kill-on-bad-exit=1" in train


def test_a_corpus_that_would_be_repeated_too_often_is_refused_before_nodes_are_asked_for(tmp_path, monkeypatch, capsys):
    look_here(monkeypatch, capsys)
    (tmp_path / "a.txt").write_text("".join(f"line {i}: {i * i}\n" for i in range(400)))
    words = ["cluster=cpu", "run=x", f"runs={tmp_path}", "data=text", f"data.path={tmp_path}/a.txt", "model=nano"]
    words += [
        f"data.prepared={tmp_path / 'p'}",
        "tokenizer.vocab_size=300",
        "sequence_length=64",
        "global_batch_size=4",
    ]
    config = load(words[1:])
    prepare(config.data, config.tokenizer)
    monkeypatch.setattr("launch.slurm.refuse_queued", lambda _: None)
    monkeypatch.setattr("launch.slurm.submit", lambda *_: pytest.fail("a job was submitted"))
    with pytest.raises(
        UserError, match=r"would go [\d,.]+ times through text .* data\.max_epochs=4: give it more text"
    ):
        main([*words, "tokens=1M"])
    corpora = []
    monkeypatch.setattr("launch.slurm.submit", lambda *given: corpora.append(given[-1]) or ["7"])
    assert main([*words, "tokens=1M", "data.max_epochs=1e4"]) == 0
    (tmp_path / "x" / "checkpoints" / "step_10").mkdir(parents=True)  # a run that resumes is not measured again
    assert main([*words, "tokens=1M"]) == 0
    assert corpora == [[], []]


def test_a_corpus_is_prepared_before_nodes_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    words = [
        "cluster=h100",
        "nodes=8",
        "global_batch_size=64",
        "run=x",
        f"runs={tmp_path}",
        "data=text",
        "data.max_epochs=1000000",
        f"data.prepared={tmp_path / 'p'}",
    ]
    monkeypatch.setattr("launch.slurm.refuse_queued", lambda _: None)
    missing = tmp_path / "missing"
    with pytest.raises(UserError, match="missing"):
        main([*words, f"data.path={missing}"])
    submitted = []
    monkeypatch.setattr(sbatch.shutil, "which", lambda _: "sbatch")
    monkeypatch.setattr(sbatch, "_keep_code", lambda _: None)
    monkeypatch.setattr(sbatch, "_sbatch", lambda arguments, _: submitted.append(arguments) or str(len(submitted)))
    assert main([*words, f"data.path={tmp_path}/a.txt", "cluster.cpu_partition=cpus"]) == 0
    slurm = tmp_path / "x" / "slurm"
    assert submitted == [
        [f"{slurm}/prepare.sh"],
        ["--dependency=afterok:1", "--kill-on-invalid-dep=yes", f"{slurm}/job.sh"],
    ]
    found = options((slurm / "prepare.sh").read_text())
    assert (found["--nodes"], found["--partition"], found["--ntasks-per-node"]) == ("1", "cpus", "1")
    assert "--gpus-per-node" not in found
    assert "data.ready prepare=true global_batch_size=64 " in (slurm / "prepare.sh").read_text()
    assert subprocess.run(["bash", "-n", slurm / "prepare.sh"]).returncode == 0
