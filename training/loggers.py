"""Copies of metrics.jsonl in Weights & Biases and TensorBoard. A logger that fails is switched off; the run continues.

W&B runs in a background thread, so training never waits for it. At the end of a run its upload has `UPLOAD_TIMEOUT_SECONDS`.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from conf.identity import config_hash
from conf.load import from_yaml, to_dict
from conf.login import wandb_mode, wandb_project
from conf.schema import Config
from kernels.common.errors import UserError
from kernels.common.files import atomic_write
from training.runfolder import newest_provenance

UPLOAD_TIMEOUT_SECONDS = 60.0
KINDS = ("train", "eval", "telemetry", "event")  # of the lines of metrics.jsonl
OFFLINE_MODES = ("offline", "dryrun")  # of W&B
_SETTINGS = {
    "console": "off",
    "silent": True,
    "disable_git": True,  # `provenance` is in the configuration
    "init_timeout": 60,
    "x_disable_stats": True,
    "finish_timeout": UPLOAD_TIMEOUT_SECONDS - 5,  # W&B gives up before AsyncLogger does
    "finish_timeout_raises": True,
}


class Logger(Protocol):
    """Receives every line of metrics.jsonl, then the summary."""

    @property
    def note(self) -> str:
        """Where a person finds what was logged, as a line for the console."""
        ...

    def log(self, record: dict[str, Any]) -> None:
        """Log one line of metrics.jsonl."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the summary, flush and close."""


class Loggers:
    """The loggers that the configuration asks for. One that raises is dropped with a warning.

    Args:
        config: the run's configuration; its `logger` group selects the loggers.
        folder: the run folder.
        warn: prints a warning on the console.
    """

    def __init__(self, config: Config, folder: Path, warn: Callable[[str], None]) -> None:
        self._warn, self._folder = warn, folder
        self._loggers: dict[str, Logger] = {}
        self._service_lost = False  # of W&B: `finish` writes the run anew
        if config.logger.tensorboard:
            self._start("TensorBoard", lambda: TensorBoardLogger(folder))
        if config.logger.wandb:
            self._wandb_mode = mode = wandb_mode()
            earlier_bytes = _file_bytes(folder / "metrics.jsonl")
            self._start("W&B", lambda: AsyncLogger(lambda: WandbLogger(config, folder, mode, earlier_bytes)))

    def _start(self, name: str, make: Callable[[], Logger]) -> None:
        try:
            self._loggers[name] = make()
        except UserError:
            raise
        except Exception as error:
            self._warn(f"{name} is off: {type(error).__name__}: {error}")

    def _for_each(self, action: Callable[[Logger], None]) -> None:
        for name in list(self._loggers):
            try:
                action(self._loggers[name])
            except Exception as error:
                del self._loggers[name]
                # Whoever ends this run may have ended W&B's process before it: DeepSpeed on Ctrl-C, SLURM on scancel.
                if name == "W&B" and isinstance(error, ConnectionError) and self._wandb_mode in OFFLINE_MODES:
                    self._service_lost = True
                else:
                    self._warn(f"{name} is off from here on: {type(error).__name__}: {error}")

    def log(self, record: dict[str, Any]) -> None:
        """Log one line of metrics.jsonl."""
        self._for_each(lambda logger: logger.log(record))

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the summary, flush and close."""
        self._for_each(lambda logger: logger.finish(summary))
        if self._service_lost:
            try:
                rewrite_offline(self._folder, summary)
            except Exception as error:
                self._warn(f"W&B's process was ended, and its file could not be written anew: {error}")

    @property
    def notes(self) -> list[str]:
        """Where a person finds what was logged, a console line per logger."""
        return [logger.note for logger in self._loggers.values()]


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (name, number) for each number of a line; a list with a value per layer becomes name/layer_0, name/layer_1, ..."""
    for name, value in record.items():
        if isinstance(value, (int, float)):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}/layer_{i}", v) for i, v in enumerate(value) if isinstance(v, (int, float)))


def _file_bytes(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it is missing."""
    return path.stat().st_size if path.exists() else 0


class AsyncLogger:
    """Run a logger in a background thread, because it may wait for the network or for another process."""

    def __init__(self, make: Callable[[], Logger]) -> None:
        self._queue: queue.SimpleQueue[tuple[Literal["log", "finish"], dict[str, Any]]] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._logger: Logger | None = None
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[], Logger]) -> None:
        try:
            self._logger = logger = make()
            while True:
                call, record = self._queue.get()
                if call == "finish":
                    logger.finish(record)
                    return
                logger.log(record)
        except Exception as error:
            self._error = error  # raised in the training thread by its next call

    def _put(self, call: Literal["log", "finish"], record: dict[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put((call, record))

    def log(self, record: dict[str, Any]) -> None:
        """Queue one line of metrics.jsonl."""
        self._put("log", record)

    def finish(self, summary: dict[str, Any]) -> None:
        """Queue the summary and wait up to `UPLOAD_TIMEOUT_SECONDS` for the upload.

        Raises:
            TimeoutError: the upload is not complete.
            Exception: what the logger raised in its thread.
        """
        self._put("finish", summary)
        self._thread.join(UPLOAD_TIMEOUT_SECONDS)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(
                f"the upload was not complete after {UPLOAD_TIMEOUT_SECONDS:g} seconds: `wandb sync` completes it later"
            )

    @property
    def note(self) -> str:
        """The logger's note. Valid after `finish`, when the logger surely exists."""
        assert self._logger is not None, "the logger has not started yet"
        return self._logger.note


class WandbLogger:
    """One W&B run per run folder. Its id is stored in the folder, so a resumed run continues the same curves.

    A killed process loses what W&B had not written yet, and the next session retrains the steps after the last checkpoint.
    Offline, each session therefore first logs all lines that metrics.jsonl kept: the newest file holds the whole run, every
    line once. Online, the server keeps what reached it, so retrained steps appear twice, at the same token counts.

    A variable `WANDB_*` decides whatever was not typed. All runs of `config.runs` share its folder `wandb`, so that
    `wandb leet` compares them.

    Args:
        mode: of W&B, as `wandb_mode` returned it.
        earlier_bytes: size of metrics.jsonl when this session started.
    """

    def __init__(self, config: Config, folder: Path, mode: str, earlier_bytes: int) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        self._mode, self._id, logger = mode, _wandb_id(folder), config.logger
        # A run that began when each had a folder of its own stays there.
        default = folder if (folder / "wandb").is_dir() else folder.parent
        self._files = Path(os.environ.get("WANDB_DIR") or default) / "wandb"
        typed = {
            "project": wandb_project(logger.project),
            "entity": logger.entity,
            "group": logger.group,
            "job_type": logger.job_type,
            "tags": list(logger.tags) or None,
        }
        defaults = {"id": self._id, "resume": "allow", "dir": str(default), "name": config.run}
        variables = {"id": "WANDB_RUN_ID", "resume": "WANDB_RESUME", "dir": "WANDB_DIR", "name": "WANDB_NAME"}
        self.run = wandb.init(
            mode=cast(Literal["online", "offline", "disabled", "shared"], mode),
            config={**to_dict(config), "config_hash": config_hash(config), "provenance": newest_provenance(folder)},
            settings=wandb.Settings(**_unless_set(_SETTINGS)),
            **typed,
            **{name: value for name, value in defaults.items() if not os.environ.get(variables[name])},
        )
        self.run.define_metric("tokens")
        for kind in KINDS:
            self.run.define_metric(f"{kind}/*", step_metric="tokens")
        if mode in OFFLINE_MODES and earlier_bytes:
            for line in (folder / "metrics.jsonl").read_bytes()[:earlier_bytes].splitlines():
                self.log(json.loads(line))

    @property
    def note(self) -> str:
        """The address of the run; offline, the commands that upload it and draw it."""
        if self._mode not in OFFLINE_MODES:
            return f"W&B: {self.run.url or self._mode}"
        newest = max(self._files.glob(f"offline-run-*-{self._id}"), default=self._files / "latest-run")
        return (
            f"W&B: offline; `wandb sync {shlex.quote(str(newest))}` uploads it, "
            f"`wandb leet {shlex.quote(str(self._files))}` draws the runs in the terminal"
        )

    def log(self, record: dict[str, Any]) -> None:
        """Log the numbers of a line as kind/name, over tokens."""
        kind = record["kind"]
        figures = {f"{kind}/{name}": value for name, value in scalars(record)}
        self.run.log({**figures, "tokens": record["tokens"], "step": record["step"]})

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the summary and finish the run; a failed run is marked as failed."""
        self.run.summary.update(summary)
        self.run.finish(exit_code=0 if summary.get("status") != "failed" else 1)


def rewrite_offline(folder: Path, summary: dict[str, Any]) -> None:
    """Write the offline W&B run of a run folder from its metrics.jsonl, in a process with a W&B of its own.

    Raises:
        RuntimeError: it failed; the last line of what it printed.
        subprocess.TimeoutExpired: it took longer than an upload may.
    """
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | {
        "WANDB_MODE": "offline"
    }
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "launch" / "run_module.py"),
        "training.loggers",
        str(folder),
    ]
    done = subprocess.run(
        command,
        input=json.dumps(summary),
        env=environment,
        capture_output=True,
        text=True,
        timeout=UPLOAD_TIMEOUT_SECONDS,
        start_new_session=True,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])


def _wandb_id(folder: Path) -> str:
    """Return the W&B id of the run in a folder; the folder keeps it. `WANDB_RUN_ID` replaces it."""
    path, wanted = folder / "wandb_id", os.environ.get("WANDB_RUN_ID")
    if wanted or not path.exists():
        with atomic_write(path) as file:
            file.write(wanted or secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


def _unless_set(settings: dict[str, Any]) -> dict[str, Any]:
    """Return W&B's settings without those that a variable sets: WANDB_NAME of `name`, WANDB__NAME of `x_name` too."""
    names = {name: (f"WANDB_{name.upper()}", f"WANDB__{name.removeprefix('x_').upper()}") for name in settings}
    return {name: value for name, value in settings.items() if not any(os.environ.get(v) for v in names[name])}


class TensorBoardLogger:
    """Event files in `<run>/tensorboard`.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logger.tensorboard=true needs the package tensorboard: .venv/bin/pip install -c requirements.lock tensorboard"
            ) from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        # TensorBoard names a run by its path below the folder that is given: the run's own would be ".".
        self.note = (
            f"TensorBoard: `tensorboard --logdir {shlex.quote(str(folder.parent))}`, run {folder.name}/tensorboard"
        )

    def log(self, record: dict[str, Any]) -> None:
        """Log the numbers of a line as kind/name, over steps."""
        for name, value in scalars(record):
            if name != "step":
                self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def finish(self, summary: dict[str, Any]) -> None:  # noqa: ARG002 (the interface of `Logger`)
        """Flush and close the files."""
        self.writer.close()


if __name__ == "__main__":  # of `rewrite_offline`
    _folder = Path(sys.argv[1])
    _run = WandbLogger(from_yaml(_folder / "config.yaml"), _folder, "offline", _file_bytes(_folder / "metrics.jsonl"))
    _run.finish(json.load(sys.stdin))
