"""Training under a real SLURM of several virtual nodes: the same run, whatever stops it on the way."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from launch.endings import read_ending
from launch.job_script import Job, render
from tests.slurm.cluster import until
from tests.slurm.conftest import SETTINGS, log
from tests.training.tiny import PATIENCE, command, contents, overrides, shared_corpus

STEPS = 100  # most of them follow the one after which a job is disturbed


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """The command line of a run, without its name."""
    folder = shared_corpus(tmp_path_factory)
    return overrides(
        folder, tmp_path_factory.mktemp("runs"), steps=STEPS, save_every=10, eval_every=0, telemetry_every=0
    )


@pytest.fixture(scope="module")
def runs(words) -> Path:
    return Path(next(word for word in words if word.startswith("runs=")).partition("=")[2])


@pytest.fixture(scope="module")
def local(words, runs) -> Path:
    """The same run of two ranks on this machine, without SLURM, that nothing stops."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = command(sys.executable, *launcher, "train.py", *words, "run=local")
    assert result.status == 0, result.err
    return runs / "local"


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    lines = lines_of(run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines if line["kind"] in ("train", "eval")]


def resumes(run: Path) -> list[int]:
    return [line["step"] for line in lines_of(run) if line.get("event") == "resumed"]


@pytest.fixture(scope="module")
def four(words, runs) -> list[float]:
    """The losses of ten steps of four ranks on this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    result = command(sys.executable, *launcher, "train.py", *words, "run=four", "steps=10")
    assert result.status == 0, result.err
    return [line["loss"] for line in lines_of(runs / "four") if "loss" in line]


@pytest.mark.slow  # of several ranks per node; the jobs of the other tests have one
@pytest.mark.parametrize("tasks", ["gpu", "node"])
def test_two_nodes_learn_what_this_machine_learns(slurm, words, runs, four, tasks):
    run = runs / f"four-{tasks}"
    settings = ["nodes=2", "ranks_per_node=2", f"cluster.tasks={tasks}"]
    slurm.wait(slurm.submit(*settings, *words, f"run={run.name}", "steps=10"), "COMPLETED")
    assert [line["loss"] for line in lines_of(run) if "loss" in line] == four
    assert len(four) == 11
    assert lines_of(run)[0]["world_size"] == 4


@pytest.mark.slow  # of the launcher; the jobs of the other tests have a task per rank
def test_a_launcher_per_node_learns_what_this_machine_learns(slurm, words, runs, local):
    slurm.wait(slurm.submit("nodes=2", "cluster.tasks=node", *words, "run=node"), "COMPLETED")
    assert losses(runs / "node") == losses(local)
    assert lines_of(runs / "node")[0]["world_size"] == 2


def test_a_job_that_is_warned_and_then_loses_a_node_goes_on_as_the_same_run(slurm, words, runs, local):
    run = runs / "warned"
    number = slurm.submit("nodes=2", *words, f"run={run.name}")
    slurm.wait_for_step(run, number, 12)
    slurm.run("scancel", "--batch", "--signal=USR1", number)  # as `--signal=B:USR1@120` does before the limit
    slurm.wait(number, "PENDING")
    [stopped] = re.findall(r"SIGUSR1: stopped after step (\d+)", log(run, number))
    slurm.go_on(number)
    slurm.wait_for_step(run, number, int(stopped) + 1)
    lose_node(slurm, run, number, rank_too=False)
    slurm.go_on(number)
    slurm.wait(number, "COMPLETED")
    first, second = resumes(run)
    assert int(stopped) == first <= second
    assert losses(run) == losses(local)


@pytest.mark.slow  # the rank of the job above finds that nobody watches it
def test_a_node_whose_power_goes_ends_the_job_and_it_goes_on(slurm, words, runs, local):
    run = runs / "powerless"
    number = slurm.submit("nodes=2", *words, f"run={run.name}")
    slurm.wait_for_step(run, number, 12)
    lose_node(slurm, run, number, rank_too=True)
    slurm.go_on(number)
    slurm.wait(number, "COMPLETED")
    assert resumes(run)[0] >= 10
    assert losses(run) == losses(local)


def lose_node(slurm, run: Path, number: str, rank_too: bool) -> None:
    """Kill the slurmstepd of the last rank's node, alone or with its rank, and wait until the job is requeued."""
    victim = next(rank for rank in slurm.ranks(run) if rank.environ()["SLURM_PROCID"] == "1")
    watcher = victim.parent()
    assert watcher.name() == "slurmstepd"
    watcher.kill()
    if rank_too:
        victim.kill()
    until(lambda: slurm.state(number) == "PENDING", "the job to be requeued")
    assert slurm.ranks(run) == []


@pytest.mark.slow  # of its bounds
@pytest.mark.parametrize("nodes", [1, 2])  # on one the other rank lets it go on, on two srun ends it
def test_a_job_that_hangs_is_ended_and_goes_on(slurm, words, runs, local, nodes):
    run = runs / f"hung-{nodes}"
    bounds = ["watchdog.minutes=0.1", "watchdog.phase_minutes=0.5", f"nodes={nodes}", f"ranks_per_node={2 // nodes}"]
    number = slurm.submit(*bounds, *words, f"run={run.name}")
    slurm.wait_for_step(run, number, 12)
    stopped = next(rank for rank in slurm.ranks(run) if rank.environ()["SLURM_PROCID"] == "1")
    stopped.suspend()
    until(lambda: slurm.state(number) == "PENDING", "the job to be requeued")
    assert slurm.ranks(run) == []
    ending = read_ending(run)
    assert (ending.status, ending.exit_status, ending.rank) == ("hung", 4, 1)
    assert "waiting for rank 1 since" in log(run, number)
    assert (run / "stacks" / "rank_0.txt").exists()
    slurm.go_on(number)
    slurm.wait(number, "COMPLETED")
    assert resumes(run)[0] >= 10
    assert losses(run) == losses(local)


@pytest.mark.slow  # SLURM's shortest limit is a minute, and it looks once a minute
def test_a_job_whose_time_is_up_goes_on_in_the_next(slurm, words, runs, local):
    run = runs / "timed"
    number = slurm.submit("nodes=2", "cluster.time=3", "cluster.signal_seconds=90", *words, f"run={run.name}")
    slurm.wait_for_step(run, number, 12)
    ranks = slurm.ranks(run)
    for rank in ranks:
        rank.suspend()  # its time passes, and no step is done
    usr1 = 1 << (signal.SIGUSR1 - 1)

    def warned(rank: psutil.Process) -> bool:
        status = Path(f"/proc/{rank.pid}/status").read_text()
        return bool(int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16) & usr1)

    until(lambda: all(map(warned, ranks)), "SLURM to warn", PATIENCE)
    for rank in ranks:
        rank.resume()
    slurm.wait(number, "PENDING")
    slurm.go_on(number)
    slurm.wait(number, "COMPLETED")
    assert "SIGUSR1: stopped after step" in log(run, number)
    assert len(resumes(run)) == 1
    assert losses(run) == losses(local)


def test_a_job_that_is_preempted_before_its_first_step_comes_again(slurm, words, runs):
    run = runs / "preempted"
    number = slurm.submit(*words, f"run={run.name}")
    until(lambda: slurm.ranks(run), "ranks")
    urgent = [
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
    ]
    other = slurm.run(*urgent).strip()
    slurm.wait(other, "COMPLETED")
    assert slurm.state(number) == "PENDING"
    slurm.run("scancel", number)


def test_a_job_that_saves_nothing_new_is_not_started_again(slurm, words, runs):
    run = runs / "refused"
    (run / "checkpoints").parent.mkdir(parents=True)
    (run / "checkpoints").write_text("in the way")
    number = slurm.submit(*words, f"run={run.name}")
    slurm.wait(number, "FAILED")
    assert "a file of that name is in the way" in log(run, number)
    assert f"job {number} ended with status 2, as it would again: it is not requeued" in log(run, number)


def test_a_cancelled_job_saves_and_does_not_come_back(slurm, words, runs):
    run = runs / "cancelled"
    # Enough steps for the job to be running still when the second command looks.
    number = slurm.submit(*words, f"run={run.name}", "steps=4000")
    slurm.wait_for_step(run, number, 12)
    again = slurm.launch(*words, f"run={run.name}", "steps=4000")
    assert again.status == 2
    assert f"has been submitted already: job {number} is running" in again.err
    slurm.run("scancel", number)
    until(lambda: not slurm.queued(number), "the job to leave")
    assert slurm.state(number) == "CANCELLED"
    assert slurm.ranks(run) == []
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"


def test_slurms_own_words_say_why_a_job_is_not_taken(slurm, words):
    result = slurm.launch("nodes=2", *words, "run=nowhere", "cluster.partition=nowhere")
    assert result.status == 2
    assert "SLURM rejected the job: " in result.err
    assert "invalid partition specified: nowhere" in result.err
    assert "Change its request with cluster.KEY=VALUE" in result.err


@pytest.mark.slow
def test_a_plan_is_an_array_of_which_a_task_can_be_run_again(slurm, words, tmp_path):
    plan = ["ablation=smoke", "ablation.sizes={tiny: model=nano}", "ablation.tile=1", "ablation.rates=[1.0]"]
    plan.append("ablation.seeds=[0,1]")
    kept = [word for word in words if not word.startswith(("run", "steps", "model=", "model.d_ff"))]
    plan += [*kept, "tokens=3072", f"folder={tmp_path}", "yes=true", "jobs=2"]
    folder = tmp_path / "smoke"
    bad = folder / "runs" / "tiny-swiglu-lr0.01-seed0"
    bad.mkdir(parents=True)
    (bad / "checkpoints").write_text("in the way")
    submit = [sys.executable, "-m", "ablation.run", *plan, *SETTINGS]
    result = command(*submit, **slurm.environment)
    assert result.status == 0, result.err
    assert (number := re.search(r"job array (\d+) is submitted, 4 task\(s\)", result.out)[1])
    assert "ArrayTaskThrottle=2" in slurm.run("scontrol", "-o", "show", "job", number)
    status = [sys.executable, "-m", "ablation.status", folder]
    assert "queued" in command(*status, **slurm.environment).out
    again = command(*submit, **slurm.environment)
    assert again.status == 2
    assert "has been submitted already" in again.err
    until(lambda: not slurm.queued(number), "the array to end", PATIENCE)
    shown = command(*status, **slurm.environment).out
    assert "4 runs: 3 finished, 1 waiting" in shown
    (bad / "checkpoints").unlink()
    script = (folder / "slurm" / "seeds.sh").read_text()
    task = re.search(r"'tiny-swiglu-lr\*-seed0'  # (\d)", script)[1]
    number = slurm.run("sbatch", "--parsable", f"--array={task}", str(folder / "slurm" / "seeds.sh")).strip()
    until(lambda: not slurm.queued(number), "the task to end", PATIENCE)
    assert "4 runs: 4 finished" in command(*status, **slurm.environment).out


@pytest.mark.slow
def test_a_corpus_prepared_by_an_array_is_what_one_machine_prepares(slurm, tmp_path):
    """A task fails first: then there is no index, until it is run again by the command that was printed."""
    chance = random.Random(0)
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        lines = [" ".join(chance.choices(("one", "two", "three", "four"), k=9)) for _ in range(6000)]
        (tmp_path / "corpus" / f"{number:02d}.txt").write_text("\n".join(lines) + "\n")
    shared = ["data=text", f"data.path={tmp_path}/corpus", "tokenizer.vocab_size=300", "tokenizer.train_megabytes=1"]
    submit = [sys.executable, "-m", "data.prepare", *shared, f"data.prepared={tmp_path}/array"]
    here = [sys.executable, "-m", "data.prepare", *shared, f"data.prepared={tmp_path}/here"]
    assert command(*here).status == 0
    planned = command(*submit, "part=plan")
    folder = Path(planned.out.partition(" is done: ")[2].strip())
    in_the_way = folder / "group-00003.json"
    in_the_way.mkdir()
    result = command(*submit, "jobs=3", *SETTINGS, **slurm.environment)
    assert result.status == 0, result.err
    array = re.search(r"^job array (\d+) tokenizes them, 3 task\(s\)", result.out, re.MULTILINE)[1]
    index = re.search(r"^job (\d+) writes the index", result.out, re.MULTILINE)[1]
    again = command(*submit, "jobs=3", *SETTINGS, **slurm.environment)
    assert again.status == 2
    assert "has been submitted already" in again.err
    until(lambda: not slurm.queued(array) and not slurm.queued(index), "the jobs to end", PATIENCE)
    states = [slurm.state(f"{array}_{task}") for task in range(3)]
    [failed] = [task for task, state in enumerate(states) if state == "FAILED"]
    assert "group-00003.json: that is a folder" in log(Path(f"{folder}.jobs"), f"{array}_{failed}")
    assert slurm.state(index) == "CANCELLED"
    assert not (folder / "index.json").exists()
    in_the_way.rmdir()
    line = result.out.splitlines()[-1].replace("TASK", str(failed)).replace("sbatch", "sbatch --parsable", 1)
    index = slurm.run("bash", "-c", line).strip()
    slurm.wait(index, "COMPLETED")
    assert contents(folder) == contents(tmp_path / "here" / folder.name)
    assert len(list(folder.glob("group-*"))) == 4  # which three tasks cannot share evenly


def test_a_job_goes_on_without_a_bad_node_and_is_logged_whatever_its_name(slurm, tmp_path):
    folder = tmp_path / "lr 50%user it's"
    # The first node that is asked is at fault.
    doctor = """bash -c '[ -e "$1" ] || { echo $SLURMD_NODENAME >> "$0"; exit 1; }' "$failed" "$slurm/excluded" """
    command_line = """bash -c 'echo "trained on $SLURMD_NODENAME"'"""
    job = Job(folder.name, folder, command_line, doctor.strip(), "typed", "x")
    of, _ = read_group("cluster", ClusterConfig, SETTINGS, "cluster")
    (folder / "slurm").mkdir(parents=True)
    job.path.write_text(render(job, of))
    first = slurm.run("sbatch", "--parsable", str(job.path)).strip()
    slurm.go_on(first)
    slurm.wait(first, "COMPLETED")
    bad = (folder / "slurm" / "excluded").read_text().strip()
    assert f"job {first} is queued again without {bad}\n" in log(folder, first)
    [node] = re.findall(r"^0: trained on (node\d)$", log(folder, first), re.MULTILINE)
    assert node != bad
    assert f"task 0: {node}\n" in log(folder, first)
