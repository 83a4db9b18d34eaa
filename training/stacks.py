"""What the threads of this process are doing: their Python stacks, and the collective that one of them is in.

No source file is read, because the disk may be what hangs.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from launch.heartbeats import Activity

_ROOT = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
_LIBRARIES = f"{os.sep}site-packages{os.sep}"
WATCHERS = ("heartbeats", "watchdog")  # names of the watchdog's own threads


def stacks(rank: int) -> str:
    """Return the Python stack of every thread of this process but the watchdog's own, the innermost call first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sorted(
        sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident
    ):
        if names.get(ident) not in WATCHERS:
            lines = [f"  {_file(frame)}:{frame.f_lineno} in {frame.f_code.co_name}" for frame in _outwards(frame)]
            parts.append("\n".join([f"rank {rank}, thread {names.get(ident, ident)}", *lines]))
    return "\n".join(parts) + "\n"


def flights() -> bytes:
    """Return what NCCL's flight recorder holds, as `torchfrtrace` reads it; nothing where torch has none."""
    dump = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace", None)
    return dump() if dump and dist.is_initialized() and dist.get_backend() == "nccl" else b""


def activity_of(phase: str, step: int, since: float, thread: int | None, others: bool = False) -> Activity:
    """Return what a thread is doing, with its place in this code and the collective that it is in.

    Args:
        thread: its identifier.
        others: whether it may wait for a collective of a thread of torch's, as backward does on a GPU.
    """
    frames = sys._current_frames()
    place, collective = _place(frames.get(thread or 0))
    if others and not collective:
        known = {each.ident for each in threading.enumerate()}
        found = (_place(frame)[1] for ident, frame in frames.items() if ident not in known)
        collective = next(filter(None, found), "")
    return Activity(phase, step, since, place, collective)


def _place(frame: FrameType | None) -> tuple[str, str]:
    """Return (the innermost call in this code, the collective that it waits in) of a stack; "" for what there is not."""
    collective = ""
    for each in _outwards(frame):
        path = each.f_code.co_filename
        if not collective and _COLLECTIVES in path and each.f_code.co_name != "wrapper":
            collective = each.f_code.co_name
        if _LIBRARIES not in path and path.startswith(_ROOT):
            return f"{_file(each)}:{each.f_lineno} in {each.f_code.co_name}", collective
    return "", collective


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _file(frame: FrameType) -> str:
    """Return the file of a frame, as short as it is clear."""
    path = frame.f_code.co_filename
    return path.rpartition(_LIBRARIES)[2].removeprefix(_ROOT)
