"""A run of `train.py` on one GPU that is stopped and goes on, beside one that is not; `bench/gpu.py` runs it.

It needs the whole project (DeepSpeed, Hydra, SentencePiece): where one is missing, it is left out.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
_NEEDS = ("deepspeed", "hydra", "sentencepiece")
_STEPS, _SAVE_EVERY = 60, 10
_RUN = (
    f"model=nano model.n_layers=2 steps={_STEPS} save_every={_SAVE_EVERY} keep_last=9 global_batch_size=8 sequence_length=256 "
    "++eval_every=0 telemetry_every=0 log_every=10 deterministic=true ++logger=none ++prompts=[]"
).split()
_PATIENCE = 180  # seconds for a run


def missing() -> list[str]:
    """Return the packages that are not installed."""
    return [name for name in _NEEDS if importlib.util.find_spec(name) is None]


def resumed(*overrides: str) -> dict[str, Any]:
    """Return whether a run that was stopped after a save, and started again, ends with the weights of one that was not.

    Args:
        overrides: further ones of `train.py`.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole, stopped = Path(folder, "whole"), Path(folder, "stopped")
        try:
            _wait(_start(whole, overrides))
            process = _start(stopped, overrides)
            _stop_after_a_save(process, stopped)
            steps = _newest(stopped)
            _wait(_start(stopped, overrides))
            same = _weights(whole, _STEPS) == _weights(stopped, _STEPS)
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            return {"model": "nano", "method": "stop and resume", "failed": str(error).splitlines()[0]}
    seconds = time.monotonic() - began
    return {"model": "nano", "method": "stop and resume", "stopped_after": steps, "equal": same, "seconds": seconds}


def _start(runs: Path, overrides: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), *_RUN, f"runs={runs}", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait(process: subprocess.Popen[str]) -> None:
    """Wait for a run to end.

    Raises:
        RuntimeError: it failed; the last line that it printed.
    """
    try:
        out, _ = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()  # or it would run on beside what is timed next
        raise
    if process.returncode:
        raise RuntimeError((out.strip().splitlines() or [f"train.py ended with {process.returncode}"])[-1])


def _stop_after_a_save(process: subprocess.Popen[str], runs: Path) -> None:
    """Send SIGTERM once a checkpoint is there: the run takes its step to the end, saves, and ends with 0."""
    deadline = time.monotonic() + _PATIENCE
    while not _newest(runs) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _wait(process)


def _newest(runs: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name[5:]) for path in runs.glob("*/checkpoints/step_*") if path.name[5:].isdigit()), default=0)


def _weights(runs: Path, step: int) -> dict[str, bytes]:
    """Return the raw bytes of every weight and moment of a checkpoint."""
    from model.weights import MOMENTS, CheckpointReader

    (folder,) = runs.glob(f"*/checkpoints/step_{step:08d}")
    reader = CheckpointReader(folder)
    return {
        f"{name} {key}": reader.tensor(name, key).contiguous().view(torch.uint8).numpy().tobytes()
        for name in reader.shapes()
        for key in ("", *MOMENTS)
    }
