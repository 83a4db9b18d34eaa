"""Measure step times for `budget=wallclock`: once per plan folder, by short runs, and keep them there.

The step time of an arm is a straight line in its width, through two widths around the one of equal parameters. The short runs
take turns, so that a disturbance of the machine affects all arms, and the median over steps and rounds counts. The plan's
widths depend on these times, so they are measured only once: a second measurement would make it a different plan.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from ablation.command import environment_of
from ablation.outcomes import read_metrics
from ablation.plan import Plan
from ablation.resolve import StepSeconds, resolve
from conf.ablation_schema import AblationConfig
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, explain_os_errors
from launch.local import ranks_of, train_command

NAME = "step_times.json"
RUNS = "step_times"  # folder of the short runs, removed once the times are written
STEPS, FIRST, ROUNDS = 40, 10, 3  # steps per short run; steps up to `FIRST` do not count
_WIDTHS = (0.75, 1.25)  # relative to the width of equal parameters

Times = dict[str, dict[str, dict[int, float]]]  # by size, arm and d_ff: seconds per step


def step_time(config: AblationConfig, overrides: Sequence[str], folder: Path, ranks: int = 0) -> StepSeconds:
    """Return the seconds per step of (size, arm, d_ff). They are measured now unless the plan's folder has them.

    Args:
        ranks: per run; 0: as many as it needs.

    Raises:
        UserError: a short run failed, or the step time of an arm does not increase with its width.
    """
    path = folder / NAME
    if not path.exists():
        times = measure(resolve(dataclasses.replace(config, budget="parameters"), overrides), folder, ranks)
        with explain_os_errors("write step times", path), atomic_write(path) as file:
            json.dump(times, file, indent=1)
        shutil.rmtree(folder / RUNS, ignore_errors=True)
    try:
        times = {
            size: {arm: {int(d_ff): float(t) for d_ff, t in of_arm.items()} for arm, of_arm in arms.items()}
            for size, arms in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} has no step times; remove it to measure them again: {error}") from error
    return lambda size, arm, d_ff: _line(times, size, arm, path)(d_ff)


def measure(plan: Plan, folder: Path, ranks: int = 0) -> Times:
    """Measure the step times of every arm at two widths."""
    with explain_os_errors("write to the folder of the plan", folder):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    candidates: list[tuple[str, str, int]] = []
    for size, name in plan.size_arm_pairs(horizons=False):
        arm = plan.arms[size][name]
        tensor = arm.config.parallel.tensor
        widths = sorted({max(1, round(arm.width.d_ff * factor / tensor)) * tensor for factor in _WIDTHS})
        candidates += [(size, name, d_ff) for d_ff in widths]
    print(f"measuring step times: {len(candidates) * ROUNDS} runs of {STEPS} steps", flush=True)
    seconds: dict[tuple[str, str, int], list[float]] = {candidate: [] for candidate in candidates}
    for turn in range(ROUNDS):
        for size, name, d_ff in candidates:
            seconds[size, name, d_ff] += _short_run(plan, size, name, d_ff, folder, turn, ranks)
    times: Times = {}
    for (size, name, d_ff), measured in seconds.items():
        times.setdefault(size, {}).setdefault(name, {})[d_ff] = statistics.median(measured)
    return times


def _short_run(plan: Plan, size: str, name: str, d_ff: int, folder: Path, turn: int, ranks: int) -> list[float]:
    """Return the seconds of every step that counts."""
    arm, run = plan.arms[size][name], f"{size}-{name}-{d_ff}-{turn}"
    runs, ranks = folder / RUNS, ranks or ranks_of(arm.config)
    overrides = [
        *(override for override in arm.overrides if override.partition("=")[0] not in ("steps", "tokens")),
        f"++model.d_ff={d_ff}",  # ++: the plan may set keys that have no effect beside these
        f"steps={STEPS}",
        "log_every=1",
        "++logger=none",
        "++eval_every=0",
        "save_every=0",
        "sample_every=0",
        "++telemetry_every=0",
        f"runs={runs}",
        f"run={run}",
    ]
    log = folder / "logs" / f"step_time-{run}.log"
    with open(log, "wb") as file:
        status = subprocess.run(
            train_command(overrides, ranks),
            env=environment_of(0, 1, ranks),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    lines = [line for line in read_metrics(runs / run)[0] if line["kind"] == "train"]
    speeds = [line["tokens_per_second"] for line in lines if line["step"] > FIRST and line.get("tokens_per_second")]
    if status or not speeds:
        raise UserError(f"a short run that measures step times failed: see {log}")
    return [arm.batch.tokens_per_step / speed for speed in speeds]


def _line(times: Times, size: str, arm: str, path: Path) -> Callable[[int], float]:
    """Return the seconds per step of an arm as a function of its width."""
    try:
        (narrow, first), (wide, second) = sorted(times[size][arm].items())
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} has no step times of {arm} at {size}: remove it to measure them again") from error
    slope = (second - first) / (wide - narrow)
    if slope <= 0:
        raise UserError(
            f"{path}: {arm} at {size} is not slower with d_ff={wide} than with {narrow}: remove it to measure again, on a "
            "quiet machine or with a larger model"
        )
    return lambda d_ff: first + slope * (d_ff - narrow)
