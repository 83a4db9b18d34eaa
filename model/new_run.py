"""The folder of a run that starts from given weights: a checkpoint of step 0, from which train.py goes on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from conf.identity import settings_of
from conf.load import to_yaml
from conf.schema import Config
from data.tokenizer import Tokenizer
from kernels.common.files import atomic_folder, explain_os_errors
from model.weights import NO_STATE, OptimizerState, save_weights


def write_new_run(
    run: Path,
    config: Config,
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, Tensor]],
    event: dict[str, Any],
    optimizer: OptimizerState = NO_STATE,
    **more: Any,
) -> None:
    """Write the folder of a run that has trained for 0 steps.

    Args:
        run: the folder. It must not exist, and appears when it is complete.
        tensors: as `save_weights` takes them.
        event: the first line of metrics.jsonl, that tells where the weights come from.
        more: further values of the checkpoint's state.

    Raises:
        UserError: it cannot be written.
    """
    state = {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "batches_hash": 0,
        "optimizer_steps": 0,
        "corpus_hash": None,
        "tokenizer_hash": tokenizer.hash,
        "eval_loss": None,
        "evaluation_missed": False,
        "wall_seconds": 0.0,
        "run_id": uuid.uuid4().hex,
        "settings": settings_of(config),
        **more,
    }
    line = {"kind": "event", "step": 0, "tokens": 0, **event}
    with explain_os_errors("write the run", run), atomic_folder(run) as folder:
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        (folder / "run_id").write_text(f"{state['run_id']}\n", encoding="utf-8")
        (folder / "checkpoints").mkdir()
        save_weights(folder / "checkpoints" / "step_00000000", tensors, state, optimizer)
