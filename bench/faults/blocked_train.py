"""`train.py`, in which one rank blocks for ever at a chosen place, as behind a dead disk or network: for `hangs.py`.

The variable BLOCKED says where: "loader 1 3 FOLDER" blocks rank 1 as it reads the samples of step 3. Other places are `save`,
in the thread that writes a checkpoint, and `collective`, before a reduction. The rank then creates FOLDER/blocked.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def block_at(place: str, step: int, folder: Path) -> None:
    """Let this process block for ever at a place in or after a step.

    Args:
        place: loader, save or collective.
        step: counted from 1, since the start of this session.
        folder: takes the file `blocked` then.
    """
    import torch.distributed as dist

    from data.batches import BatchStream

    steps = 0

    def wait(*_: Any) -> None:
        pipe = folder / "pipe"
        os.mkfifo(pipe)
        (folder / "blocked").touch()
        os.open(pipe, os.O_RDONLY)  # until somebody writes

    def replaced(original: Callable[..., Any], due: Callable[[], bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if due():
                wait()
            return original(*arguments, **named)

        return call

    samples = BatchStream.samples

    def counted(self: BatchStream, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if place == "loader" and steps == step:
            wait()
        return samples(self, *arguments)

    setattr(BatchStream, "samples", counted)  # noqa: B010
    in_training = threading.main_thread()
    if place == "save":
        os.fsync = replaced(os.fsync, lambda: threading.current_thread().name == "saver" and steps >= step)
    elif place == "collective":
        dist.all_reduce = replaced(dist.all_reduce, lambda: threading.current_thread() is in_training and steps >= step)


def main(argv: list[str]) -> int:
    import train

    place, rank, step, folder = os.environ.get("BLOCKED", "none 0 0 .").split(" ", maxsplit=3)
    if os.environ.get("RANK", "0") == rank:
        block_at(place, int(step), Path(folder))
    return train.main(argv)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from kernels.common.commands import run_command
    from kernels.common.streams import outlive_console
    from launch.ranks import leave_after

    outlive_console()
    leave_after(lambda: run_command(main))
