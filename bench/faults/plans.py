"""A plan under SIGKILL: the plan `smoke` is run in fp32 twice, once undisturbed, and once killed and restarted again and again.

A kill hits the runner, the run, or both at once, as when a machine goes down. Required: the same final losses to the last bit,
one W&B identity per run, and metrics in which no step is missing or repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from bench.faults.runs import ROOT
from kernels.common.errors import UserError


def run_campaign(folder: Path, kills: int, seed: int, overrides: list[str]) -> int:
    """Kill a plan again and again, print what came of it; return 1 if something was wrong, else 0."""
    os.environ.setdefault("WANDB_MODE", "offline")
    plan = ["ablation=smoke", "precision=fp32", *overrides]
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    began = time.monotonic()
    if run(plan, undisturbed) != 0:
        raise UserError(f"the plan fails without any kill: see {undisturbed}")
    seconds = time.monotonic() - began
    print(f"undisturbed: {seconds:.0f} seconds", flush=True)
    identities: dict[str, set[str]] = {}
    generator = random.Random(seed)
    # The longest interval between kills. The work that kills undo makes the plan last longer, hence the factor.
    longest = max(4.0, 1.5 * seconds / kills)
    for kill in range(1, kills + 1):
        target = generator.choice(("runner", "run", "both"))
        after = generator.uniform(2.0, longest)
        if run(plan, killed, target, after) == 0:
            print(f"the plan finished before kill {kill}: give it more tokens, or other moments (seed=N)")
            break
        for name, identity in identities_of(killed).items():
            identities.setdefault(name, set()).add(identity)
        finished = len(losses(killed))
        print(f"{kill}: killed {target} after {after:.1f} seconds, {finished} runs finished", flush=True)
    if run(plan, killed) != 0:
        print("the killed plan did not finish")
        return 1
    for name, identity in identities_of(killed).items():
        identities.setdefault(name, set()).add(identity)
    wrong = differences(undisturbed, killed)
    wrong += [f"{name} had {len(ids)} identities" for name, ids in identities.items() if len(ids) != 1]
    print(f"{len(losses(undisturbed))} runs, {len(identities)} identities: {'; '.join(wrong) or 'all the same'}")
    return 1 if wrong else 0


def run(plan: list[str], folder: Path, target: str = "", after: float = 0.0) -> int:
    """Run the plan and return its exit status.

    Args:
        plan: arguments of `ablation.run`.
        target: what to kill: "runner", "run", "both", or "" for nothing.
        after: seconds until the kill.
    """
    command = [sys.executable, "-m", "ablation.run", *plan, f"folder={folder}", "yes=true"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "console.log", "ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    if target:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=after)
        runs = psutil.Process(process.pid).children(recursive=True)
        if target in ("runner", "both"):
            process.kill()
        if target in ("run", "both"):
            for child in runs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        if target == "run":  # the runner would go on with the next run: stop it, so that the next kill starts from here
            process.send_signal(signal.SIGTERM)
    return process.wait()


def losses(folder: Path) -> dict[str, Any]:
    """Return {name: final loss} of every finished run."""
    final = {}
    for path in (folder / "smoke" / "runs").glob("*/summary.json"):
        with contextlib.suppress(ValueError):
            summary = json.loads(path.read_text(encoding="utf-8"))
            if summary["status"] == "finished":
                final[path.parent.name] = summary["final_eval_loss"]
    return final


def identities_of(folder: Path) -> dict[str, str]:
    """Return {name: W&B identity} of every run that has one."""
    paths = (folder / "smoke" / "runs").glob("*/wandb_id")
    return {path.parent.name: text for path in paths if (text := path.read_text(encoding="utf-8").strip())}


def differences(one: Path, other: Path) -> list[str]:
    """Return a sentence for each difference between the runs of two folders."""
    before, after = losses(one), losses(other)
    wrong = [
        f"{name}: {before.get(name)!r} and {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    for name in sorted(before.keys() & after.keys()):
        if steps(one / "smoke" / "runs" / name) != steps(other / "smoke" / "runs" / name):
            wrong.append(f"{name}: its metrics differ")
    return wrong


def steps(run: Path) -> list[tuple[str, int, float]]:
    """Return (kind, step, loss) of the training and evaluation lines of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines if line["kind"] in ("train", "eval")]
