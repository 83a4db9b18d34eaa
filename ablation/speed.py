"""Step times for `budget=wallclock`: measured once for a plan's folder, by short runs, and kept there.

An arm's step time is taken as a straight line in its width, through two widths about the one of equal parameters. Runs take
turns, so that what disturbs the machine disturbs all arms, and the median over steps and rounds counts. The plan's widths
follow from these times, so they are measured once: a second look would make another plan of it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

from ablation.command import environment_of, ranks_of, train_command
from ablation.outcomes import read_metrics
from ablation.plan import Plan, resolve
from conf.schema import AblationConfig
from kernels.common.errors import UserError
from kernels.common.files import atomic_write, say_why

NAME = "step_times.json"
RUNS = "step_times"  # the folder of the short runs, until the times are written
STEPS, FIRST, ROUNDS = 40, 10, 3  # of a short run; those before `FIRST` do not count
_WIDTHS = (0.75, 1.25)  # times the width of equal parameters

Times = dict[str, dict[str, dict[int, float]]]  # by size, arm and d_ff: seconds a step


def step_time(
    config: AblationConfig, others: list[str], folder: Path, ranks: int = 0
) -> Callable[[str, str, int], float]:
    """Return the seconds of a step of (size, arm, d_ff), measured now unless the plan's folder has them.

    Args:
        ranks: of a run; 0: as many as it needs.

    Raises:
        UserError: a short run failed, or an arm's time does not rise with its width.
    """
    path = folder / NAME
    if not path.exists():
        times = measure(resolve(dataclasses.replace(config, budget="parameters"), others), folder, ranks)
        with say_why("write step times", path), atomic_write(path) as file:
            json.dump(times, file, indent=1)
        shutil.rmtree(folder / RUNS, ignore_errors=True)
    try:
        times = {
            size: {arm: {int(d_ff): float(t) for d_ff, t in of_arm.items()} for arm, of_arm in arms.items()}
            for size, arms in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} has no step times; remove it, and they are measured again: {error}") from error
    return lambda size, arm, d_ff: _line(times, size, arm, path)(d_ff)


def measure(plan: Plan, folder: Path, ranks: int = 0) -> Times:
    """Measure the step times of every arm at two widths."""
    with say_why("write to the folder of the plan", folder):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    todo = []
    for size, arm in plan.places():
        of_arm = plan.arms[size][arm]
        share = of_arm.config.parallel.tensor
        widths = sorted({max(1, round(of_arm.width.d_ff * factor / share)) * share for factor in _WIDTHS})
        todo += [(size, arm, d_ff) for d_ff in widths]
    print(f"measuring step times: {len(todo) * ROUNDS} runs of {STEPS} steps", flush=True)
    seconds: dict[tuple[str, str, int], list[float]] = {place: [] for place in todo}
    for turn in range(ROUNDS):
        for place in todo:
            seconds[place] += _short_run(plan, *place, folder, turn, ranks)
    times: Times = {}
    for (size, arm, d_ff), of_place in seconds.items():
        times.setdefault(size, {}).setdefault(arm, {})[d_ff] = statistics.median(of_place)
    return times


def _short_run(plan: Plan, size: str, arm: str, d_ff: int, folder: Path, turn: int, ranks: int) -> list[float]:
    """Return the seconds of every step that counts."""
    of_arm, name = plan.arms[size][arm], f"{size}-{arm}-{d_ff}-{turn}"
    words = [word for word in of_arm.words if word.partition("=")[0] not in ("steps", "tokens")]
    quiet = [f"{key}=0" for key in ("eval_every", "save_every", "sample_every", "telemetry_every")]
    words += [f"model.d_ff={d_ff}", f"steps={STEPS}", "log_every=1", "logger=none", *quiet]
    runs, ranks = folder / RUNS, ranks or ranks_of(of_arm.config)
    log = folder / "logs" / f"step_time-{name}.log"
    with open(log, "wb") as file:
        status = subprocess.run(
            train_command([*words, f"runs={runs}", f"run={name}"], ranks), env=environment_of(0, 1, ranks),
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip
    lines = [line for line in read_metrics(runs / name)[0] if line["kind"] == "train"]
    speeds = [line["tokens_per_second"] for line in lines if line["step"] > FIRST]
    if status or not speeds:
        raise UserError(f"a short run that measures step times failed: {log} says why")
    return [of_arm.batch.tokens_per_step / speed for speed in speeds]


def _line(times: Times, size: str, arm: str, path: Path) -> Callable[[int], float]:
    try:
        (one, first), (other, second) = sorted(times[size][arm].items())
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} has no step times of {arm} at {size}: remove it, and they are measured again"
        ) from error
    slope = (second - first) / (other - one)
    if slope <= 0:
        raise UserError(
            f"{path}: {arm} at {size} is not slower with d_ff={other} than with {one}: remove it to measure again, on a quiet "
            "machine or with a larger model"
        )
    return lambda d_ff: first + slope * (d_ff - one)
