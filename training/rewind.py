"""Going back to an earlier checkpoint of a run: `resume_from=step_N`, most often with samples to leave out.

Later checkpoints are renamed, not deleted. Checkpoints of the new course say how it began, so that the same command again,
as of a job that is queued again, goes on from the newest of them instead of going back once more.
"""

from __future__ import annotations

import re
from pathlib import Path

from conf.schema import Config
from kernels.common.errors import UserError
from model.weights import CheckpointReader, checkpoints, step_of

_NAME = re.compile(r"(?:step_)?(\d{1,12})")


def course_of(config: Config) -> str | None:
    """Return what the checkpoints of a run say that goes back as a configuration has it; None: it does not go back."""
    if config.resume_from is None:
        return None
    return f"{config.resume_from} {config.guard.skip_samples or ''}".strip()


def named_checkpoint(folder: Path, config: Config) -> Path | None:
    """Return the checkpoint to go back to; None: no one is named, or the run has gone back to it already.

    Raises:
        UserError: there is no checkpoint of that name.
    """
    if config.resume_from is None:
        return None
    match, paths = _NAME.fullmatch(config.resume_from), list(checkpoints(folder))
    # First, because later saves of the new course prune the checkpoint that it began with.
    if any(_course(path) == course_of(config) for path in paths):
        return None
    found = next((path for path in paths if match and step_of(path) == int(match[1])), None)
    if found is None:
        there = ", ".join(path.name for path in reversed(paths))
        raise UserError(
            f"resume_from={config.resume_from} names no checkpoint in {folder}: "
            + (f"choose from {there}" if there else "it holds none")
        )
    return found


def set_aside(folder: Path, checkpoint: Path) -> list[str]:
    """Rename all checkpoints that are later than this one; return their new names."""
    names = []
    for path in list(checkpoints(folder)):
        if step_of(path) > step_of(checkpoint):
            taken = [f"{path.name}.set_aside", *(f"{path.name}.set_aside_{number}" for number in range(2, 1000))]
            free = next(name for name in taken if not path.with_name(name).exists())
            path.rename(path.with_name(free))
            names.append(free)
    return names


def _course(path: Path) -> str | None:
    """Return how the course that a checkpoint belongs to began; None: at step 1, or it cannot be read."""
    try:
        return CheckpointReader(path).state.get("course")
    except (OSError, ValueError, UserError):
        return None
