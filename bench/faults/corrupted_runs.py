"""The runs of the campaign of corruptions: trained, stopped, damaged by `corruptions.py`, and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from bench.faults.corruptions import STEPS, Ending, Folders, campaign, checkpoint_of
from bench.faults.runs import TINY, write_corpus
from kernels.common.commands import run_command


def run_campaign(folder: Path, cases: int, seed: int, overrides: list[str]) -> int:
    """Train the runs, damage copies of the first, resume them, print a table; return 1 if something was wrong, else 0."""
    import torch.distributed  # noqa: F401 (imported here once, and not by each of the processes that are forked)

    import training.engine
    import training.telemetry  # noqa: F401

    words = [
        *TINY,
        f"data.path={folder / 'corpus'}",
        f"data.prepared={folder / 'prepared'}",
        f"runs={folder / 'runs'}",
    ]
    write_corpus(folder / "corpus")
    runs = {"run": [], "seed": ["seed=1"], "arm": ["ffn=geglu"], "length": ["steps=24"]}
    for name, own in runs.items():
        ending = _train([*words, *overrides, f"run={name}", *own])
        if ending.status != 0:
            print(f"a run fails before any corruption: {ending.output}")
            return 1
    paths = [folder / "runs" / name for name in runs]
    undisturbed = _final_loss(paths[0])
    for path in paths:
        stop_after(path, max(STEPS), STEPS)
    rows: dict[tuple[str, str], int] = {}
    wrong = 0
    command = [*words, *overrides]
    tried = campaign(
        Folders(paths[0], tuple(paths[1:])),
        cases,
        seed,
        lambda run: _train([*command, f"run={run.name}"], run),
        lambda _: undisturbed,
    )
    for number, (case, ending, problem) in enumerate(tried):
        how = "WRONG" if problem else "refused" if ending.status == 2 else f"went on from {ending.step}"
        rows[case.kind, how] = rows.get((case.kind, how), 0) + 1
        wrong += bool(problem)
        print(f"{number:3d} {case.kind}: {case.what}: {problem or how}", flush=True)
    for (kind, how), count in sorted(rows.items()):
        print(f"{kind:22} {how:16} {count:4d}")
    print(f"{cases} corruptions, {wrong} wrong")
    return 1 if wrong else 0


def _final_loss(run: Path) -> float | None:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["final_eval_loss"]


def stop_after(run: Path, step: int, kept: Iterable[int]) -> None:
    """Leave of a finished run what a stop after a step leaves, with the checkpoints of the steps `kept`."""
    for path in (run / "checkpoints").iterdir():
        if path not in [checkpoint_of(run, each) for each in kept]:
            shutil.rmtree(path)
    path = run / "metrics.jsonl"
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(text for text in texts if json.loads(text)["step"] <= step), encoding="utf-8")
    path = run / "summary.json"
    stopped = {"status": "stopped", "steps": step, "final_eval_loss": None}
    summary = json.loads(path.read_text(encoding="utf-8")) | stopped
    path.write_text(json.dumps(summary), encoding="utf-8")


def _train(arguments: list[str], run: Path | None = None, timeout: int = 120) -> Ending:
    """Run train.py in a fork of this process, which has imported all that it needs; return how it ended.

    Args:
        run: the folder in which to look for the final loss; None: none is needed.
        timeout: seconds after which it counts as waiting.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        signal.alarm(timeout)
        from launch.ranks import leave_after
        from train import main

        sys.argv = ["train.py", *arguments]
        leave_after(lambda: run_command(main))
    os.close(writer)
    with open(reader, "rb") as pipe:
        output = pipe.read().decode("utf-8", errors="replace")
    status: int | None = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = None if status == -signal.SIGALRM else status
    resumed = re.search(r"resuming .* after step (\d+) of", output)
    loss = _final_loss(run) if run and status == 0 else None
    return Ending(status, output, int(resumed[1]) if resumed else None, loss)
