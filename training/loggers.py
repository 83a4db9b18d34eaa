"""Mirrors of metrics.jsonl: Weights & Biases and TensorBoard. Neither can stop a run: what fails is said once and left.

Nor does a run wait for W&B: it is spoken to from a thread, and what is left to upload at the end of a run has `PATIENCE`.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import atomic_write
from conf.load import to_dict
from conf.login import wandb_mode
from conf.schema import Config
from conf.validate import config_hash

PATIENCE = 60.0  # seconds that the end of a run may wait for an upload
KINDS = ("train", "eval", "telemetry", "event")  # of lines of metrics.jsonl
OFFLINE = ("offline", "dryrun")  # modes of W&B


class Mirrors:
    """All mirrors that the configuration asks for. Every call returns at once if there are none.

    Args:
        config: the run's configuration; its `logger` group says which mirrors.
        folder: the run folder.
        warn: takes a sentence for the console.
    """

    def __init__(self, config: Config, folder: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._mirrors: dict[str, Any] = {}
        if config.logger.tensorboard:
            self._start("TensorBoard", lambda: _TensorBoard(folder))
        if config.logger.wandb:
            mode, told = wandb_mode(), _size(folder / "metrics.jsonl")
            self._start("W&B", lambda: _Behind(lambda: _Wandb(config, folder, mode, told)))

    def _start(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self._mirrors[name] = make()
        except UserError:
            raise
        except Exception as error:
            self._warn(f"{name} is off: {type(error).__name__}: {error}")

    def _each(self, call: Callable[[Any], None]) -> None:
        for name in list(self._mirrors):
            try:
                call(self._mirrors[name])
            except Exception as error:
                self._warn(f"{name} is off from here on: {type(error).__name__}: {error}")
                del self._mirrors[name]

    def log(self, record: dict[str, Any]) -> None:
        """Mirror one line of metrics.jsonl."""
        self._each(lambda mirror: mirror.log(record))

    def finish(self, summary: dict[str, Any]) -> None:
        """Mirror the summary, and flush."""
        self._each(lambda mirror: mirror.finish(summary))

    @property
    def notes(self) -> list[str]:
        """Where each mirror can be seen, for the console."""
        return [mirror.note for mirror in self._mirrors.values()]


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line under their names; a figure of each layer under name/layer_0, name/layer_1 and so on."""
    for name, value in record.items():
        if isinstance(value, (int, float)):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}/layer_{i}", v) for i, v in enumerate(value) if isinstance(v, (int, float)))


def _size(path: Path) -> int:
    """Return the bytes of a file, 0 of one that is missing."""
    return path.stat().st_size if path.exists() else 0


class _Behind:
    """A mirror in a thread of its own: it may have to wait for a network, or for another process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._records: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._mirror: Any = None
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[], Any]) -> None:
        try:
            self._mirror = make()
            call = "log"
            while call != "finish":
                call, record = self._records.get()
                getattr(self._mirror, call)(record)
        except Exception as error:
            self._error = error

    def _put(self, call: str, record: dict[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        self._records.put((call, record))

    def log(self, record: dict[str, Any]) -> None:
        self._put("log", record)

    def finish(self, summary: dict[str, Any]) -> None:
        self._put("finish", summary)
        self._thread.join(PATIENCE)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(f"not everything was uploaded after {PATIENCE:g} seconds: `wandb sync` does it later")

    @property
    def note(self) -> str:
        return self._mirror.note


class _Wandb:
    """One W&B run a run folder: its id is kept beside it, so a resumed run continues the same curves.

    A run that is killed takes with it what W&B had not written, and one that goes on trains the steps after its checkpoint
    once more. Offline, each sitting therefore begins with all that metrics.jsonl has kept: the newest file holds the whole
    run, every line once. Online the server keeps what has reached it, and has the steps that are trained again twice, at the
    same tokens.

    Args:
        mode: of `wandb_mode`.
        told: bytes of metrics.jsonl that sittings before this one wrote.
    """

    def __init__(self, config: Config, folder: Path, mode: str, told: int) -> None:
        import wandb

        kept = folder / "wandb_id"
        if not kept.exists():
            with atomic_write(kept) as file:
                file.write(secrets.token_hex(4))
        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = wandb.init(
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            project=config.logger.project,
            entity=config.logger.entity,
            group=config.logger.group,
            job_type=config.logger.job_type,
            tags=list(config.logger.tags),
            name=config.run,
            config={**to_dict(config), "config_hash": config_hash(config)},
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                init_timeout=60,
                x_disable_stats=True,
                finish_timeout=PATIENCE - 5,  # before our own
                finish_timeout_raises=True,
            ),
        )
        self.run.define_metric("tokens")
        for kind in KINDS:
            self.run.define_metric(f"{kind}/*", step_metric="tokens")
        self.note = f"W&B: {self.run.url or mode}"
        if mode in OFFLINE:
            self.note = f"W&B: offline; `wandb sync {folder / 'wandb' / 'latest-run'}` uploads it"
            lines = (folder / "metrics.jsonl").read_bytes()[:told].splitlines() if told else []
            for line in lines:
                self.log(json.loads(line))

    def log(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        figures = {f"{kind}/{name}": value for name, value in _scalars(record)}
        self.run.log({**figures, "tokens": record["tokens"], "step": record["step"]})

    def finish(self, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)
        self.run.finish(exit_code=0 if summary.get("status") != "failed" else 1)


class _TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logger.tensorboard=true needs the package tensorboard: .venv/bin/pip install -c requirements.lock tensorboard"
            ) from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.note = f"TensorBoard: `tensorboard --logdir {folder / 'tensorboard'}`"

    def log(self, record: dict[str, Any]) -> None:
        for name, value in _scalars(record):
            if name != "step":
                self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def finish(self, summary: dict[str, Any]) -> None:  # noqa: ARG002 (the mirrors share one interface)
        self.writer.close()
