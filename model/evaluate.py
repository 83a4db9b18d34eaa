"""Evaluate a run with lm-evaluation-harness: `python -m model.evaluate run=NAME tasks=arc_easy,hellaswag`.

    run=NAME        a run by name or by path
    tasks=a,b       tasks of the harness or of `include`
    include=FOLDER  further tasks, as YAML files
    limit=N         examples per task; 0 (default): all
    num_fewshot=N   few-shot examples; default: the task's own number
    batch_size=8    sequences per batch
    output=FILE     JSON of the results; default: in the run folder
    step=N          a checkpoint; default: the newest
    runs=FOLDER     where run folders are; default: runs

This needs `pip install '.[eval]'`. The run is exported (`model/export.py`) to a temporary folder and evaluated like any
Transformers model, in fp32. A text starts with the end-of-text token, as a document does in training. Tasks whose data are
local files (dataset_path: json) need no network. A generation task gets at most half of the model's length for its answers. The
results of other tasks are kept if one fails.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from conf.load import find_run
from conf.terminal import SafeConsole
from data.packages import need
from kernels.common.commands import run_command
from kernels.common.errors import UserError, suggest
from kernels.common.files import atomic_write, explain_os_errors, make_folder_of
from kernels.common.options import read_options
from kernels.common.text import printable
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
    """Return the harness's results for a run, with the run, step and settings that they belong to.

    Tasks are evaluated one after another. `failed` gives the reason of each that failed.

    Args:
        tasks: names of tasks, groups or tags.
        include: folder with further tasks; "": none.
        step: of the checkpoint; -1: the newest.
        limit: examples per task; 0: all.
        num_fewshot: few-shot examples; -1: the task's default.
        batch_size: sequences per batch.

    Raises:
        UserError: the harness is not installed, a task is unknown, or every task failed.
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
        model = _harness_model(folder, batch_size)
        fewshot = None if num_fewshot < 0 else num_fewshot
        results, failed = _evaluate_each(
            harness, tasks, model=model, task_manager=manager, num_fewshot=fewshot, limit=limit or None
        )
    settings = {"tasks": tasks, "limit": limit or None, "num_fewshot": None if num_fewshot < 0 else num_fewshot}
    return {
        "run": run.name,
        "step": step,
        **settings,
        "lm_eval": importlib.metadata.version("lm_eval"),
        **results,
        **({"failed": failed} if failed else {}),
    }


def _evaluate_each(harness: Any, tasks: list[str], **settings: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the results of the tasks that ended, and {task: why it failed} of the others.

    Raises:
        UserError: all failed.
    """
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for task in tasks:
        try:
            found = harness.simple_evaluate(tasks=[task], log_samples=False, **settings)
        except OSError as error:  # a file that is missing, or a download that fails
            failed[task] = f"the data of {task} is not available: {_first_line(error)}"
        except Exception as error:  # of the task's own code or of the harness; results of other tasks took their time
            failed[task] = f"{task} failed: {type(error).__name__}: {_first_line(error)}"
        else:
            for key in ("results", "groups", "versions", "n-shot", "n-samples"):
                if key in found:
                    results.setdefault(key, {}).update(found[key])
    if not results:
        raise UserError("; ".join(failed.values()))
    return results, failed


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _harness() -> Any:
    """Return the module `lm_eval`.

    Raises:
        UserError: it, or a package that it needs, is not installed.
    """
    try:
        for module in ("transformers", "accelerate", "lm_eval.tasks"):
            need(module, "evaluation")
    except UserError as error:
        raise UserError(f"{str(error).partition(':')[0]}: pip install '.[eval]'") from error
    return need("lm_eval", "evaluation")


def _tasks(harness: Any, tasks: list[str], include: str) -> Any:
    """Return a task manager that has `tasks`. The harness's own thousands of tasks are indexed only if one of them is used."""
    manager = None
    if include:
        manager = harness.tasks.TaskManager(include_path=include, include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = harness.tasks.TaskManager(include_path=include or None)
    for task in tasks:
        if task not in manager.all_tasks:
            hint = suggest(task, manager.all_tasks)
            raise UserError(
                f"unknown task {task!r}: {hint}`lm-eval ls tasks` lists the tasks of the harness; include=FOLDER adds more"
            )
    return manager


def _harness_model(folder: Path, batch_size: int) -> Any:
    """Return an exported model for the harness, which starts every text with the token that starts a document."""
    base: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

    class DocumentStartLM(base):
        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> Any:
            # The harness itself puts the token first here; a second one would be scored as a part of the text.
            self.add_bos_token = False
            try:
                return super().loglikelihood_rolling(*args, **kwargs)
            finally:
                self.add_bos_token = True

        def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            for request in requests:
                context, settings = request.args
                request.arguments = (context, _shortened(settings, self.max_gen_toks, self.max_length))
            return super().generate_until(requests, *args, **kwargs)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"trust_remote_code": True, "add_bos_token": True, "dtype": "float32"}
    return DocumentStartLM(pretrained=str(folder), device=device, batch_size=batch_size, **settings)


_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the harness takes the first


def _shortened(settings: dict[str, Any], default: int, length: int) -> dict[str, Any]:
    """Return a task's generation settings with at most half of the model's `length` for the answer.

    The harness refuses an answer that may be as long as the model, and cuts the prompt to what an answer leaves.
    """
    wanted = next((int(settings[name]) for name in _LIMITS if settings.get(name) is not None), default)
    rest = {name: value for name, value in settings.items() if name not in _LIMITS}
    return rest | {"max_gen_toks": min(wanted, max(length // 2, 1))}


def table(results: dict[str, Any]) -> Table:
    """Return the results as a table with a row per metric of each task."""
    rows = Table("task", "shots", "metric", "value", "± standard error")
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, (int, float)) and kind and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{kind}")
                metric = name if kind == "none" else f"{name} ({kind})"
                error_text = f"{error:.4f}" if isinstance(error, float) else ""
                rows.add_row(task, str(results["n-shot"].get(task, "")), metric, f"{value:.4f}", error_text)
    return rows


def main(argv: list[str]) -> int:
    options = read_options(argv, _DEFAULTS, {"batch_size": 1}, _REQUIRED)
    run = find_run(options["run"], options["runs"])
    tasks = [task for task in options["tasks"].split(",") if task]
    if options["output"]:
        make_folder_of(options["output"])  # before what takes an hour
    arguments = {name: options[name] for name in ("include", "step", "limit", "num_fewshot", "batch_size")}
    results = evaluate(run, tasks, **arguments)
    SafeConsole(file=sys.stdout).print(table(results))
    shots = "" if results["num_fewshot"] is None else f"-{results['num_fewshot']}shot"
    limit = f"-first{results['limit']}" if results["limit"] else ""
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", "+".join(tasks))[:120]
    path = Path(options["output"] or run / "evaluations" / f"step_{results['step']:08d}-{name}{shots}{limit}.json")
    with explain_os_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            json.dump(results, file, indent=2, default=str)
            file.write("\n")
    print(f"wrote {path}")
    for reason in results.get("failed", {}).values():
        print(printable(f"error: {reason}"), file=sys.stderr)
    return 1 if "failed" in results else 0


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
