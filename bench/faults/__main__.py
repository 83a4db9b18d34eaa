"""Disturb runs as machines do, and see what comes of it: `python -m bench.faults campaign=NAME folder=FOLDER`.

    campaign=kills    ranks under SIGKILL, or plans, corruptions, poisons, hangs, disks
    folder=FOLDER     a new folder for all runs
    cases=N           how many; unless it is set 100 kills, 10 of a plan, 150 corruptions, 70 poisons, all hangs and disks
    seed=0            of what happens, and when
    KEY=VALUE         overrides of every run, or of the plan

kills        kill one rank or all, also while a checkpoint is being written, and go on (kills.py)
plans        kill the runner of an ablation, its run, or both, and go on (plans.py)
corruptions  damage copies of a run folder and resume them (corruptions.py)
poisons      make numbers of runs non-finite, or far too large (poisons.py)
hangs        stop or block a rank and wait for the watchdog to end the run (hangs.py)
disks        fill disks, let them fail, lie and wait, and take the console away (disks.py)

Each prints what it did, what was wrong, and a table, and ends with 1 if something was wrong.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from kernels.common.commands import run_command
from kernels.common.errors import UserError, unknown
from kernels.common.options import split_options

_OPTIONS = {"campaign": "kills", "cases": 0, "seed": 0, "folder": ""}
# The module of a campaign, and its number of cases (0: all).
_CAMPAIGNS = {
    "kills": ("kills", 100),
    "plans": ("plans", 10),
    "corruptions": ("corrupted_runs", 150),
    "poisons": ("poisons", 70),
    "hangs": ("hangs", 0),
    "disks": ("disks", 0),
}


def main(argv: list[str]) -> int:
    required = {"folder": "folder=FOLDER, a new folder for all runs"}
    options, overrides = split_options(argv, _OPTIONS, required=required)
    folder = Path(options["folder"])
    if folder.exists():
        raise UserError(f"{folder} exists; give a new folder")
    if options["campaign"] not in _CAMPAIGNS:
        raise unknown("campaign", options["campaign"], _CAMPAIGNS)
    name, cases = _CAMPAIGNS[options["campaign"]]
    campaign = importlib.import_module(f"bench.faults.{name}")
    return campaign.run_campaign(folder, options["cases"] or cases, options["seed"], overrides)


if __name__ == "__main__":
    run_command(main, __doc__)
