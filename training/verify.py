"""Check the checkpoints of a run: `python -m training.verify RUN [RUN ...]`.

    RUN          a run by name or by path
    runs=FOLDER  where run folders are; default: runs

Reads every checkpoint whole and says whether it is healthy or what is wrong with it, and looks through the other files that a
run is resumed from. The status is 0 if nothing is wrong, 1 if something is. A run that is training may be verified too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from conf.identity import changed_settings
from conf.load import find_run, from_yaml, has_trained
from conf.schema import Config
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.json_files import read_metrics_file, read_summary
from kernels.common.options import read_positional
from model.health import damage
from model.manifest import read_manifest
from model.weights import CheckpointReader, checkpoints, step_of
from training.runfolder import read_run_id


def main(argv: list[str]) -> int:
    options, names = read_positional(argv, {"runs": "runs"})
    if not names:
        raise UserError("name one or more runs: python -m training.verify RUN")
    wrong = 0
    for run in [_find(name, options["runs"]) for name in names]:
        for line, problem in verify(run):
            print(f"{run}: {line}", flush=True)
            wrong += problem
    return 1 if wrong else 0


def verify(run: Path) -> Iterator[tuple[str, bool]]:
    """Yield a line about each checkpoint of a run, newest first, and about each other file that is wrong.

    The second value of each pair is whether something is wrong.
    """
    config, problem = _config(run)
    if problem:
        yield problem, True
    run_id = read_run_id(run)
    if run_id is None and os.path.lexists(run / "run_id"):
        yield "run_id cannot be read", True
    paths = list(checkpoints(run / "checkpoints"))
    for path in paths:
        problem, note = _checkpoint(path, run_id, config)
        yield f"step {step_of(path)}: {problem or 'healthy'}{note}", bool(problem)
    if not paths:
        yield "there is no checkpoint", True
    for problem in _records(run):
        yield problem, True


def _find(name: str, runs: str) -> Path:
    """Return the folder of a run, which may lack its config.yaml.

    Raises:
        UserError: there is none.
    """
    paths = (path for path in (Path(runs) / name, Path(name)) if has_trained(path))
    return next(paths, None) or find_run(name, runs)


def _config(run: Path) -> tuple[Config | None, str]:
    """Return the configuration of a run, None if it cannot be read, and what is wrong with it."""
    path = run / "config.yaml"
    try:
        if path.is_file():
            return from_yaml(path), ""
        return None, "config.yaml is missing"
    except (UserError, OSError) as error:
        return None, str(error).removeprefix(f"{run}{os.sep}")


def _checkpoint(path: Path, run_id: str | None, config: Config | None) -> tuple[str, str]:
    """Return what is wrong with a checkpoint, "" if it is healthy and of its run, and what could not be checked."""
    try:
        if problem := damage(path):
            return f"damaged: {problem}", ""
        manifest, state = read_manifest(path), CheckpointReader(path).state
    except UserError as error:
        return str(error), ""
    if run_id is not None and manifest.run not in (None, run_id):
        return "of another run", ""
    if config is not None and (changed := changed_settings(state.get("settings"), config)):
        return f"trained with other settings than config.yaml has: {'; '.join(changed)}", ""
    return "", "" if manifest.version > 1 else " (of an earlier version: its run and settings are unknown)"


def _records(run: Path) -> Iterator[str]:
    """Yield what is wrong with metrics.jsonl and summary.json."""
    try:
        unreadable = read_metrics_file(run / "metrics.jsonl").unreadable
        if unreadable:
            yield f"metrics.jsonl: {unreadable} line(s) cannot be read"
    except OSError as error:
        yield f"metrics.jsonl cannot be read: {error.strerror}"
    try:
        read_summary(run / "summary.json")
    except FileNotFoundError:
        pass  # a run that is training, or was killed
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not the summary of a run"
        yield f"summary.json cannot be read: {reason}"


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
