"""Benchmarks of a run by lm-evaluation-harness: `python -m model.evaluate run=NAME tasks=arc_easy,hellaswag`.

run=NAME          a run by name or by path               limit=N         examples a task; 0: all
tasks=a,b         names of the harness, or of `include`  num_fewshot=N   examples before each; -1: what the task says
include=FOLDER    more tasks, YAML files                 batch_size=8    sequences at once
step=N            a checkpoint other than the newest     output=FILE     of the results, as JSON; else in the run folder
runs=FOLDER       where the runs are

It needs `pip install '.[eval]'`. The run is exported (`model/export.py`) into a temporary folder and judged as any model of
Transformers, in fp32. A text begins with the end-of-text token, as a document does in training. Tasks whose data are local
files (dataset_path: json) need no network.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from conf.load import find_run
from data.files import need
from kernels.common.commands import run_command
from kernels.common.errors import UserError, suggest
from kernels.common.files import atomic_write, say_why
from kernels.common.options import read_options
from model.export import export
from model.weights import checkpoints

_DEFAULTS = {"run": "", "tasks": "", "include": "", "output": "", "runs": "runs", "step": -1}
_DEFAULTS |= {"limit": 0, "num_fewshot": -1, "batch_size": 8}
_REQUIRED = {"run": "run=NAME, the run to evaluate", "tasks": "tasks=TASK,..., such as tasks=arc_easy,hellaswag"}


def evaluate(
    run: Path,
    tasks: list[str],
    include: str = "",
    step: int = -1,
    limit: int = 0,
    num_fewshot: int = -1,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Return the harness's results for a run, and what they are of.

    Args:
        tasks: names of tasks, groups or tags.
        include: folder with further tasks; "": none.
        step: of the checkpoint; -1: the newest.
        limit: examples a task; 0: all.
        num_fewshot: examples before each; -1: what the task says.
        batch_size: sequences at once.

    Raises:
        UserError: the harness is not installed, a task is unknown, or its data cannot be had.
    """
    harness = _harness()
    if include and not Path(include).is_dir():
        raise UserError(f"include={include}: there is no such folder")
    manager = _tasks(harness, tasks, include)
    if step < 0:
        step = next((int(path.name.removeprefix("step_")) for path in checkpoints(run / "checkpoints")), -1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        export(run, folder, step)
        try:
            found = harness.simple_evaluate(
                model=_judged(folder, batch_size),
                tasks=tasks,
                task_manager=manager,
                num_fewshot=None if num_fewshot < 0 else num_fewshot,
                limit=limit or None,
                log_samples=False,
            )
        except OSError as error:  # a file that is missing, or a download that fails
            raise UserError(f"the data of {', '.join(tasks)} cannot be had: {str(error).splitlines()[0]}") from error
    kept = {key: found[key] for key in ("results", "groups", "versions", "n-shot", "n-samples") if key in found}
    asked = {"tasks": tasks, "limit": limit or None, "num_fewshot": None if num_fewshot < 0 else num_fewshot}
    return {"run": run.name, "step": step, **asked, "lm_eval": _version(), **kept}


def _harness() -> Any:
    try:
        for module in ("transformers", "accelerate", "lm_eval.tasks"):
            need(module, "evaluation")
    except UserError as error:
        raise UserError(f"{str(error).partition(':')[0]}: pip install '.[eval]'") from error
    return need("lm_eval", "evaluation")


def _tasks(harness: Any, tasks: list[str], include: str) -> Any:
    """Return the manager of tasks that knows these; the harness's own thousands are read only where they are asked for."""
    manager = None
    if include:
        manager = harness.tasks.TaskManager(include_path=include, include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = harness.tasks.TaskManager(include_path=include or None)
    for task in tasks:
        if task not in manager.all_tasks:
            near = suggest(task, manager.all_tasks)
            raise UserError(
                f"unknown task {task!r}: {near}`lm-eval ls tasks` lists what the harness has; include=FOLDER adds more"
            )
    return manager


def _judged(folder: Path, batch_size: int) -> Any:
    """Return an exported model as the harness asks it, every text after the token that begins a document."""
    from lm_eval.models.huggingface import HFLM

    class Judged(HFLM):
        def loglikelihood_rolling(self, *arguments: Any, **named: Any) -> Any:
            # The harness puts the token first here by itself; a second one would be scored as a part of the text.
            self.add_bos_token = False
            try:
                return super().loglikelihood_rolling(*arguments, **named)
            finally:
                self.add_bos_token = True

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"trust_remote_code": True, "add_bos_token": True, "dtype": "float32"}
    return Judged(pretrained=str(folder), device=device, batch_size=batch_size, **settings)


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def table(results: dict[str, Any]) -> Table:
    """Return the results as a table: a line for each metric of each task."""
    shown = Table("task", "shots", "metric", "value", "± standard error")
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, (int, float)) and kind and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{kind}")
                metric = name if kind == "none" else f"{name} ({kind})"
                known = f"{error:.4f}" if isinstance(error, float) else ""
                shown.add_row(task, str(results["n-shot"].get(task, "")), metric, f"{value:.4f}", known)
    return shown


def main(argv: list[str]) -> None:
    options = read_options(argv, _DEFAULTS, {"batch_size": 1}, _REQUIRED)
    run = find_run(options["run"], options["runs"])
    tasks = [task for task in options["tasks"].split(",") if task]
    asked = {name: options[name] for name in ("include", "step", "limit", "num_fewshot", "batch_size")}
    results = evaluate(run, tasks, **asked)
    Console(file=sys.stdout).print(table(results))
    shots = "" if results["num_fewshot"] is None else f"-{results['num_fewshot']}shot"
    only = f"-first{results['limit']}" if results["limit"] else ""
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "+".join(tasks))[:120]
    path = Path(options["output"] or run / "evaluations" / f"step_{results['step']:08d}-{name}{shots}{only}.json")
    with say_why("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            json.dump(results, file, indent=2, default=str)
            file.write("\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
