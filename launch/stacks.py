"""Ask a live run what its ranks are doing: `python -m launch.stacks RUN` prints the Python stacks of every rank.

    RUN          a run by name or by path
    runs=FOLDER  where run folders are; default: runs

The run goes on. The stacks are also written to `stacks/` in its folder.
"""

from __future__ import annotations

import time
from pathlib import Path

from conf.load import find_run
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.files import explain_os_errors
from kernels.common.options import read_positional
from kernels.common.text import printable
from launch import heartbeats

_INTERVALS = 4  # of heartbeats, after which a rank has answered, or its process is stopped


def main(argv: list[str]) -> int:
    options, names = read_positional(argv, {"runs": "runs"})
    if len(names) != 1:
        raise UserError("name one run: python -m launch.stacks RUN")
    return print_stacks(find_run(names[0], options["runs"]))


def print_stacks(run: Path) -> int:
    """Print the stacks of every rank of a run; return 1 if a rank does not answer, else 0.

    Raises:
        UserError: no rank of it writes heartbeats.
    """
    folder = heartbeats.folder_of(run)
    first = _all(folder)
    if not first:
        raise UserError(f"{run} is not training: no rank writes heartbeats in it (or watchdog.minutes=0)")
    with explain_os_errors("ask in", folder):
        request = heartbeats.publish_request(folder)
    until = time.monotonic() + _INTERVALS * max(beat.interval for beat in first.values())
    answered: dict[int, heartbeats.Heartbeat] = {}
    world = max(beat.world_size for beat in first.values())
    while time.monotonic() < until and len(answered) < world:
        time.sleep(0.1)
        answered = {rank: beat for rank, beat in _all(folder).items() if beat.answered == request}
    if not any(beat.count != first[rank].count for rank, beat in _all(folder).items() if rank in first):
        raise UserError(f"{run} is not training: its heartbeats are those of a run that was killed")
    for rank in range(world):
        beat = answered.get(rank) or first.get(rank)
        if rank in answered:
            print(
                printable(f"rank {rank}: {beat.main.doing} since {heartbeats.clock(beat.main.since)}" if beat else "")
            )
            for line in heartbeats.stacks_of(run, rank).read_text(encoding="utf-8", errors="replace").splitlines():
                print(printable(line))
        elif beat:
            print(printable(f"rank {rank} on {beat.host} does not answer; it was {beat.main.doing}"))
        else:
            print(f"rank {rank} has written no heartbeat")
    return 0 if len(answered) == world else 1


def _all(folder: Path) -> dict[int, heartbeats.Heartbeat]:
    """Return the heartbeats in a folder."""
    ranks = [int(path.stem.removeprefix("rank_")) for path in folder.glob("rank_*.json") if path.stem[5:].isdigit()]
    return heartbeats.read_all(folder, max(ranks, default=-1) + 1)


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
