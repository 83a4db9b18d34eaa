"""What arms are compared by, `ablation.metric`: the final held-out loss, another figure of each run, or a downstream task.

    final_eval_loss      nats per token of the held-out text
    bits_per_byte        of the held-out text: a loss that does not depend on the tokenizer
    tokens_per_second    median over the run, on the machine as it was then
    mfu                  model FLOPs utilization, median over the run
    TASK:METRIC          of `python -m model.evaluate`, which leaves its results in the run's folder: arc_easy:acc

Learning rates are chosen by the held-out loss, whatever the metric. What missing the best one costs is known for the first two.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kernels.common.errors import UserError, unknown
from kernels.common.json_files import is_number, read_object

_TASK = re.compile(r"[A-Za-z0-9_.+-]+:[A-Za-z0-9_.+-]+")
_LESS_IS_BETTER = re.compile(r"perplexity|bits_per_byte|loss|brier|error", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of each run that arms are compared by."""

    name: str
    unit: str
    higher_is_better: bool = False

    @property
    def of_text(self) -> bool:
        """Whether it is a loss on the held-out text."""
        return self.name in ("final_eval_loss", "bits_per_byte")

    @property
    def short(self) -> str:
        """The unit of an amount."""
        return "nats" if self.name == "final_eval_loss" else self.unit

    @property
    def better(self) -> str:
        """Which direction is better, in a word."""
        return "higher" if self.higher_is_better else "lower"


LOSS = Metric("final_eval_loss", "nats per token")
_BY_NAME = {
    metric.name: metric
    for metric in (
        LOSS,
        Metric("bits_per_byte", "bits per byte"),
        Metric("tokens_per_second", "tokens per second", higher_is_better=True),
        Metric("mfu", "of peak FLOP/s", higher_is_better=True),
    )
}


def metric_of(name: str) -> Metric:
    """Return the metric of a name.

    Raises:
        UserError: there is none of that name.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if not _TASK.fullmatch(name):
        raise unknown("ablation.metric", name, [*_BY_NAME, "TASK:METRIC"])
    return Metric(name, name.partition(":")[2], higher_is_better=not _LESS_IS_BETTER.search(name.partition(":")[2]))


def value_of(metric: Metric, summary: dict[str, Any], lines: list[dict[str, Any]], run: Path) -> float:
    """Return the value of a run that has finished; nan where it is not known.

    Args:
        summary: of summary.json.
        lines: the train lines of metrics.jsonl.
        run: its folder.
    """
    if metric.of_text:
        value = summary.get(metric.name)
        return float(value) if value is not None and is_number(value) else math.nan
    if ":" in metric.name:
        task, _, name = metric.name.partition(":")
        return _of_task(task, name, run, summary.get("steps"))
    return median_of(lines, metric.name)


def median_of(lines: Iterable[Mapping[str, Any]], name: str) -> float:
    """Return the median of a figure of train lines; nan without any. The first, which includes compilation, is left out."""
    values = [line[name] for line in lines if line.get(name)]
    return float(np.median(values[1:] or values)) if values else math.nan


def _of_task(task: str, name: str, run: Path, steps: Any) -> float:
    """Return what `model.evaluate` found for a task at a run's last step; the newest file counts."""
    found = math.nan
    paths = sorted((run / "evaluations").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in paths:
        try:
            content = read_object(path)
            values = content["results"][task]
            matching = [value for key, value in values.items() if key.partition(",")[0] == name and is_number(value)]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if matching and content.get("step") == steps and content.get("limit") is None:
            found = float(matching[0])
    return found


def refuse_unfit(metric: Metric, smallest_effect: float) -> None:
    """Refuse a smallest effect that cannot be one of a metric.

    Raises:
        UserError: it is no finite number above 0.
    """
    if not 0 < smallest_effect < math.inf:
        raise UserError(f"ablation.smallest_effect={smallest_effect} must be above 0, in {metric.unit}")
