"""Kill what runs, at random moments, and look at what is left: `python -m bench.faults`.

    kills=10         SIGKILLs
    seed=0           of the moments, and of who is hit
    folder=FOLDER    a new folder for both plans            and ablation.KEY=VALUE, or overrides of every run

Runs the plan `smoke` in fp32 twice: once in peace, once killed again and again and started again each time: the runner alone,
the run alone, or both at once, as when a machine goes down. What must come out: the same final losses to the last bit, one
W&B identity a run, and metrics without a step twice or missing.
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

from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import split_options

_OPTIONS = {"kills": 10, "seed": 0, "folder": ""}
_ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> int:
    required = {"folder": "folder=FOLDER, a new folder for both plans"}
    options, overrides = split_options(argv, _OPTIONS, required=required)
    folder = Path(options["folder"])
    if folder.exists():
        raise UserError(f"{folder} exists: a campaign begins in a new folder")
    words = ["ablation=smoke", "precision=fp32", *overrides]
    began = time.monotonic()
    if run(words, folder / "peace") != 0:
        raise UserError(f"the plan does not even end in peace: see {folder / 'peace'}")
    seconds = time.monotonic() - began
    print(f"in peace: {seconds:.0f} seconds", flush=True)
    identities: dict[str, set[str]] = {}
    chance = random.Random(options["seed"])
    longest = max(4.0, 1.5 * seconds / options["kills"])  # of an interval; what kills undo makes the plan last longer
    for kill in range(1, options["kills"] + 1):
        who = chance.choice(("runner", "run", "both"))
        after = chance.uniform(2.0, longest)
        if run(words, folder / "war", who, after) == 0:
            print(f"the plan ended before kill {kill}: more tokens, or other moments (seed), let it meet all of them")
            break
        for name, identity in identities_of(folder / "war").items():
            identities.setdefault(name, set()).add(identity)
        ended = len(losses(folder / "war"))
        print(f"{kill}: {who} killed after {after:.1f} seconds, {ended} runs finished", flush=True)
    if run(words, folder / "war") != 0:
        print("the plan did not end")
        return 1
    for name, identity in identities_of(folder / "war").items():
        identities.setdefault(name, set()).add(identity)
    wrong = [*differences(folder / "peace", folder / "war")]
    wrong += [f"{name} had {len(found)} identities" for name, found in identities.items() if len(found) != 1]
    print(
        f"{len(losses(folder / 'peace'))} runs, {len(identities)} identities: " + ("; ".join(wrong) or "all the same")
    )
    return 1 if wrong else 0


def run(words: list[str], folder: Path, who: str = "", after: float = 0.0) -> int:
    """Run the plan, and kill `who` ("runner", "run", "both", or nobody: "") some seconds later; return its exit status."""
    command = [sys.executable, "-m", "ablation.run", *words, f"folder={folder}", "yes=true"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "console.log", "ab") as log:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    if who:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=after)
        runs = psutil.Process(process.pid).children(recursive=True)
        if who in ("runner", "both"):
            process.kill()
        if who in ("run", "both"):
            for child in runs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        if who == "run":  # the runner goes on with the next one; what is killed next begins from here
            process.send_signal(signal.SIGTERM)
    return process.wait()


def losses(folder: Path) -> dict[str, Any]:
    """Return the final loss of every run that finished, by name."""
    found = {}
    for path in (folder / "smoke" / "runs").glob("*/summary.json"):
        with contextlib.suppress(ValueError):
            summary = json.loads(path.read_text(encoding="utf-8"))
            if summary["status"] == "finished":
                found[path.parent.name] = summary["final_eval_loss"]
    return found


def identities_of(folder: Path) -> dict[str, str]:
    """Return the W&B identity of every run that has one."""
    paths = (folder / "smoke" / "runs").glob("*/wandb_id")
    return {path.parent.name: text for path in paths if (text := path.read_text(encoding="utf-8").strip())}


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between the runs of two folders, in sentences."""
    before, after = losses(one), losses(other)
    wrong = [
        f"{name}: {before.get(name)!r} and {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    for name in sorted(before.keys() & after.keys()):
        told = [steps(folder / "smoke" / "runs" / name) for folder in (one, other)]
        if told[0] != told[1]:
            wrong.append(f"{name}: its metrics tell of other steps")
    return wrong


def steps(run: Path) -> list[tuple[str, int, float]]:
    """Return (kind, step, loss) of the training and evaluation lines of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines if line["kind"] in ("train", "eval")]


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "offline")
    run_command(main, __doc__)
