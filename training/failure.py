"""What a rank prints and records when an exception ends it: the rank that fails first its traceback, and each one sentence.

A rank that fails closes its connections, and the others fail in turn. Their tracebacks only say that it has left.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from kernels.common.errors import Crash, Diverged, ExitStatus, Failure, PeerLost
from kernels.common.files import explain_os_errors, is_of_disk
from launch.endings import SessionEnding, claim_ending, read_ending
from launch.ranks import Ranks

# What gloo and NCCL say when another process has closed its connections.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was closed",
    "Socket closed",
    "remote process exited",
    "ncclRemoteError",
    "failed to recv, got 0 bytes",
)
_WAIT_SECONDS = 2.0  # for the rank that left to say why
_LONGEST = 300  # characters of an exception's message in a sentence


def explain(
    error: BaseException, ranks: Ranks, run: Path, step: int = 0, trained: bool = True, since: float = 0.0
) -> BaseException:
    """Return what to raise in place of an exception: a `Failure`, unless it is an interrupt or the like.

    The first rank of a session that fails says so in ending.json; if its exception is a bug, it prints the traceback.

    Args:
        step: steps that are done.
        trained: whether this session has taken a step; a refusal before that leaves the run folder as it is, unless a job's
            script reads there whether to try again.
        since: time.time() of the session's start.
    """
    if isinstance(error, OSError) and is_of_disk(error):
        try:
            with explain_os_errors("read or write", error.filename or run):
                raise error
        except Failure as explained:
            error = explained
    if isinstance(error, Failure):
        status = "diverged" if isinstance(error, Diverged) else "refused" if error.status == 2 else "failed"
        if trained or _of_a_job(run):
            claim_ending(run, SessionEnding(status, int(error.status), str(error), ranks.rank, step), since)
        return error
    if not isinstance(error, Exception):
        return error
    lost = is_lost_peer(error)
    if lost and ranks.world_size > 1:
        other = _wait_for(lambda: _other_ending(run, ranks.rank, since))
        if other is not None:
            return Crash(f"rank {other.rank} has left")
        reason = f"another rank was killed, or its node is lost ({_summary(error)}): run the same command again"
        claim_ending(run, SessionEnding("lost", ExitStatus.TRY_AGAIN, reason, ranks.rank, step), since)
        return PeerLost(reason)
    reason = f"failed after step {step}: {_summary(error)}"
    ending = SessionEnding("failed", ExitStatus.FAILED, reason, ranks.rank, step)
    if claim_ending(run, ending, since) == ending:
        traceback.print_exception(error)
    return Crash(reason)


def _of_a_job(run: Path) -> bool:
    """Return whether a job of `launch.slurm` runs this session: srun ends with the status of the rank that it kills last."""
    return "SLURM_JOB_ID" in os.environ and (run / "slurm").is_dir()


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an exception says that another rank has closed its connections."""
    if not isinstance(error, (RuntimeError, OSError)):
        return False
    return isinstance(error, dist.DistBackendError) or any(sign in str(error) for sign in _LOST)


def _other_ending(run: Path, rank: int, since: float) -> SessionEnding | None:
    ending = read_ending(run, since)
    return ending if ending and ending.rank != rank else None


def _wait_for(look: Callable[[], SessionEnding | None]) -> SessionEnding | None:
    until = time.monotonic() + _WAIT_SECONDS
    while (found := look()) is None and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _summary(error: BaseException) -> str:
    """Return the type, the first line and the place of an exception."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0][:_LONGEST]}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text
