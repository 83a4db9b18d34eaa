"""What a configuration makes a run learn: the values that determine it, their hash, and which of them differ from a run's.

By these a run is known again: one that goes on must have the settings that it began with, and a checkpoint says which it has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from conf.load import NOT_IN_NAME, flatten, to_dict
from conf.schema import Config
from conf.urls import PLACE_OF_TEXT
from kernels.common.json_files import digest

# A run may resume with other values of these: they change what is written or where it is computed, not what is learned.
NOT_LEARNED = (
    *NOT_IN_NAME,
    "steps",
    "tokens",
    "eval_every",
    "eval_tokens",
    "save_every",
    "keep_last",
    "log_every",
    "log_seconds",
    "sample_every",
    "sample_tokens",
    "prompts",
    "telemetry_every",
    "telemetry_window",
    "model.activation_checkpointing",
    "model.attention",
    "ffn.backend",
    "ffn.save",
)
_PLACE = re.compile(rf"tokenizer\.path|{PLACE_OF_TEXT.pattern}")
# A run that goes on may have other values of these: they decide its initial weights alone.
_AT_START = ("ffn.init_match",)
# Keys that 0.2.0 did not have, and what it did. Where they have these values, the hashes of older plans stay theirs.
_ADDED = {
    "tokenizer.eos": None,
    "tokenizer.bos": None,
    "ffn.init_match": "rms",
    "model.logit_softcap": 0.0,
    "precision.emulate": "none",
    "precision.scaling": "rowwise",
    "data.held_out_files": 0,
    "data.held_out_kib": 2,
    "data.held_out_by": "document",
    "optim.scaling": "none",
    "optim.base_width": 192,
    "optim.base_layers": 4,
    "optim.momentum": 0.95,
    "optim.nesterov": True,
    "optim.update_scale": "rms",
    "optim.ns_steps": 5,
    "optim.ns_coefficients": "quintic",
    "optim.ns_dtype": "auto",
    "optim.split_heads": False,
    "optim.qk_clip": 0.0,
    "optim.adamw_lr": None,
    "optim.adamw_weight_decay": None,
}


def what_is_learned(config: Config) -> dict[str, Any]:
    """Return the values that determine what a run learns, by dotted key, without its length."""
    values = {k: v for k, v in flatten(to_dict(config)).items() if k not in _ADDED or v != _ADDED[k]}
    return {k: v for k, v in values.items() if not any(k == free or k.startswith(free + ".") for free in NOT_LEARNED)}


def config_hash(config: Config) -> str:
    """Return the hash of the values that determine what a run learns."""
    return digest(what_is_learned(config))


def settings_of(config: Config) -> dict[str, Any]:
    """Return what a checkpoint says about the configuration that it was trained with, as JSON gives it back.

    That is what determines what a run learns, without the places of text and tokenizer: a checkpoint has their hashes.
    """
    values = {key: value for key, value in what_is_learned(config).items() if not _PLACE.fullmatch(key)}
    return json.loads(json.dumps(values))


def changed_settings(before: Mapping[str, Any] | None, config: Config) -> list[str]:
    """Return "key: before -> now" for each setting in which a configuration differs from those of a checkpoint.

    Args:
        before: from `settings_of`, perhaps of an earlier version: a key that it did not have had its default. None: they are
            unknown, and nothing differs.
    """
    if before is None:
        return []
    defaults, now = (_ADDED | settings_of(each) for each in (Config(), config))
    old = {key: before.get(key, defaults.get(key)) for key in before.keys() | now.keys()}
    changed = [key for key in sorted(old) if old[key] != now.get(key) and not _may_change(key, config)]
    return [f"{key}: {old[key]} -> {now.get(key)}" for key in changed]


def how_to_go_on(changed: Sequence[str]) -> str:
    """Return what to do about changes from `differences` or `changed_settings`."""
    only_optimizer = all(each.startswith("optim.") for each in changed)
    fresh = ", or let its optimizer start anew (resume_optimizer=fresh)" if only_optimizer else ""
    return f"give this run another name (run=NAME){fresh}"


def _may_change(key: str, config: Config) -> bool:
    """Return whether a run that goes on may have another value of a setting."""
    return key in _AT_START or (key.startswith("optim.") and config.resume_optimizer == "fresh")


def differences(before: Config, now: Config) -> list[str]:
    """Return what prevents a run from resuming: "key: before -> now" for each changed key that determines what it learns.

    Where the text lies may change: the hash of its content in the checkpoint tells whether it is the same.
    """
    old, new = (_ADDED | what_is_learned(config) for config in (before, now))
    if old.get("tokenizer.path") and new.get("tokenizer.path"):  # the file may have moved; checkpoints know its hash
        new["tokenizer.path"] = old["tokenizer.path"]
    changed = [
        key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not _may_change(key, now)
    ]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed if not PLACE_OF_TEXT.fullmatch(key)]
