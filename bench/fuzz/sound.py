"""The sound folders that campaigns damage copies of, as small as they can be: a prepared corpus, a run, a plan."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import conf.load
from ablation.manifest import write_manifest
from ablation.plan import Plan, PlannedRun, read_plan
from ablation.resolve import resolve
from conf import yaml_files
from conf.identity import settings_of
from conf.load import load, to_yaml
from conf.schema import Config
from conf.shape import shape_of
from data.shards import FORMAT, Shard, write_group, write_index, write_shard
from data.tokenizer import Tokenizer
from data.train_tokenizer import train_sentencepiece
from launch.endings import SessionEnding, write_ending
from model.decoder import Decoder
from model.weights import save_weights
from training.runfolder import RunFolder

VOCABULARY = 300
STEPS = 8  # of the run, whose newest checkpoint is of its end
RUN_ID = "0" * 31 + "1"
TINY = ("model.d_model=8", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1", "model.head_dim=4", "model.d_ff=12",
        "sequence_length=16", "global_batch_size=4", "precision=fp32", "logger=none")  # fmt: skip
# The same on every machine, and so the inputs that are made of it.
PROVENANCE = {"date": "2026-01-01T00:00:00+00:00", "commit": "0" * 40, "dirty": False, "host": "a host",
              "machine": "a machine", "device": "a device", "python": "3.11", "versions": {"torch": "2.0"},
              "command": "train.py"}  # fmt: skip
DATASET: Any = SimpleNamespace(tokenizer=SimpleNamespace(hash="tokenizer"), corpus_hash="text", folder="prepared")


def remember_configurations() -> None:
    """Make this process parse a config.yaml that it has parsed before, or its values, no second time.

    It takes a tenth of a second, and all folders here have the same few. For a child of a campaign that damages other files.
    """
    parse_yaml, from_dict = functools.cache(yaml_files.parse_yaml), conf.load._from_dict
    known: dict[str, Config] = {}

    def remembered(values: Any) -> Config:
        key = repr(values)
        if key not in known:
            known[key] = from_dict(values)
        return copy.deepcopy(known[key])

    yaml_files.parse_yaml = lambda text, as_text=False: copy.deepcopy(parse_yaml(text, as_text))
    conf.load._from_dict = remembered


def texts() -> list[str]:
    """Return documents of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmno", k=draw.randint(1, 6))) for _ in range(80)]
    return [" ".join(draw.choices(words, k=40)) + "\n" for _ in range(30)]


def write_prepared(folder: Path, name: str = "small") -> Path:
    """Write a prepared corpus of two training shards and one held-out shard, and return its folder."""
    path = folder / name
    path.mkdir(parents=True)
    tokenizer = train_sentencepiece(texts(), VOCABULARY, path / "tokenizer.model")
    documents = [tokenizer.encode_document(text) for text in texts()]
    shards = [
        write_shard(path, split, number, part, sum(map(len, part)) * 3, tokenizer.eos_id, tokenizer.vocab_size)
        for split, number, part in (
            ("train", 0, documents[:15]),
            ("train", 1, documents[15:25]),
            ("held_out", 0, documents[25:]),
        )
    ]
    write_group(path, 0, "0" * 32, tokenizer.hash, shards)
    index = {"format": FORMAT, "name": name, "source": "text", "fingerprint": "0" * 32, "corpus_hash": "1" * 32}
    index |= {"held_out": 0.2, "skipped": 0, "xz_bits_per_byte": 2.5}
    write_index(path, index | {"shards": [_record(shard) for shard in shards]} | _about(tokenizer))
    return path


def write_blend(folder: Path, part: Path) -> Path:
    """Write a blend of one prepared corpus with itself beside it, and return its folder."""
    path = folder / "blend"
    path.mkdir()
    (path / "tokenizer.model").write_bytes((part / "tokenizer.model").read_bytes())
    about = {
        key: json.loads((part / "index.json").read_text())[key] for key in ("vocab_size", "eos_id", "tokenizer_hash")
    }
    parts = [{"name": name, "weight": 0.5, "folder": f"../{part.name}"} for name in ("one", "other")]
    index = {"format": FORMAT, "name": "blend", "source": "blend", "corpus_hash": "2" * 32, "parts": parts}
    write_index(path, index | about)
    return path


def _record(shard: Shard) -> dict[str, Any]:
    return dataclasses.asdict(shard)


def _about(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "tokenizer_hash": tokenizer.hash}


def run_config() -> Config:
    """Return the configuration of `write_run`'s run."""
    return load(["data=text", "data.path=corpus", *TINY, f"steps={STEPS}", "run=run"])


def write_run(config: Config, runs: Path) -> Path:
    """Write the folder of a run that has ended, with a checkpoint of random weights, into a folder of runs; return it."""
    folder = RunFolder(dataclasses.replace(config, runs=str(runs)))
    folder.claim(config)
    folder.run_id = RUN_ID
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Decoder(shape_of(config, VOCABULARY), config.model, "sdpa").named_parameters()}
    tensors = ((name, torch.randn(shape, generator=generator)) for name, shape in shapes.items())
    state = {
        "step": STEPS,
        "steps": STEPS,
        "warmup_steps": 2,
        "batches_hash": 1,
        "corpus_hash": "text",
        "run_id": RUN_ID,
    }
    state |= {"tokenizer_hash": "tokenizer", "eval_loss": 2.5, "evaluation_missed": False, "wall_seconds": 1.0}
    state |= {"settings": settings_of(config), "skipped_samples": [[3, 5]], "spikes": {}, "course": None}
    save_weights(folder.checkpoints / f"step_{STEPS:08d}", tensors, state)
    for line in metrics(STEPS, 64, 2.5):
        folder.metrics.append(line)
    folder.write_run_id()
    folder.append_provenance(PROVENANCE)
    folder.write_summary(summary(STEPS, 64, 2.5) | {"run_id": RUN_ID})
    folder.close()
    write_ending(folder.path, SessionEnding("finished", 0, step=STEPS, time="2026-01-01T00:00:00+0000"))
    return folder.path


def metrics(steps: int, tokens: int, final: float) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of a run.

    Args:
        tokens: per step.
        final: held-out loss.
    """
    lines: list[dict[str, Any]] = [{"kind": "event", "step": 0, "tokens": 0, "event": "started", "run_id": RUN_ID}]
    for part in range(1, 5):
        step = steps * part // 4
        at = {"step": step, "tokens": step * tokens}
        loss = final + 1 - part / 4
        lines.append({"kind": "train", **at, "loss": loss, "lr": 0.01, "grad_norm": 0.5, "tokens_per_second": 900.0 + part,
                      "mfu": 0.2, "memory_gib": 0.5})  # fmt: skip
        layers = {name: [0.1 * part, 0.2] for name in ("zeros", "dead", "kurtosis", "max", "sign_agreement")}
        lines.append({"kind": "telemetry", **at, **layers, "revived": [None, 0.1], "window_tokens": tokens})
        lines.append(
            {"kind": "eval", **at, "loss": loss, "perplexity": 9.0, "bits_per_byte": 2.0, "held_out_tokens": 64}
        )
    lines.append({"kind": "event", "step": steps, "tokens": steps * tokens, "event": "saved", "seconds": 0.1})
    return lines


def summary(steps: int, tokens: int, final: float) -> dict[str, Any]:
    """Return the summary.json of a run that has finished."""
    return {"status": "finished", "final_eval_loss": final, "bits_per_byte": final / 2.5, "xz_bits_per_byte": 2.5,
            "parameters": 1000, "vocab_size": VOCABULARY, "ffn_parameters": 400, "flops_per_token": 6000,
            "data_order_hash": "0" * 16, "config_hash": "0" * 16, "steps": steps, "tokens": steps * tokens,
            "wall_seconds": 60.0, "provenance": PROVENANCE}  # fmt: skip


def write_plan(folder: Path) -> tuple[Plan, Path]:
    """Write the folder of a plan of two arms, whose sweeps and seeds, eight runs, have ended; return both."""
    plan = resolve(
        *read_plan(
            [
                "ablation=smoke",
                "ablation.name=small",
                "ablation.rates=[0.5,1.0]",
                "ablation.seeds=[1,2]",
                "ablation.rate_seeds=[0]",
                "ablation.rate_extensions=0",
                f"ablation.common=[{','.join((*TINY, 'model.d_ff=null', 'steps=8'))}]",
            ]
        )
    )
    path = folder / plan.config.name
    write_manifest(plan, path)
    content = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(content | {"provenance": [PROVENANCE]}, indent=1), encoding="utf-8")
    for size, arm in plan.size_arm_pairs():
        for planned in (*plan.sweep_runs(size, arm), *plan.final_runs(size, arm, plan.learning_rates(size, arm)[0])):
            _write_planned_run(plan, planned, path)
    return plan, path


def config_of(plan: Plan, planned: PlannedRun, folder: Path) -> Config:
    """Return the configuration of a planned run in the folder of its plan."""
    arm = plan.arms[planned.size][planned.arm]
    return dataclasses.replace(
        arm.config, seed=planned.seed, data_seed=planned.seed, run=planned.name, runs=str(folder / "runs"),
        optim=dataclasses.replace(arm.config.optim, lr=planned.lr),
        model=dataclasses.replace(arm.config.model, d_ff=arm.width.d_ff),
    )  # fmt: skip


def _write_planned_run(plan: Plan, planned: PlannedRun, folder: Path) -> None:
    run = folder / "runs" / planned.name
    run.mkdir(parents=True)
    arm = plan.arms[planned.size][planned.arm]
    (run / "config.yaml").write_text(to_yaml(config_of(plan, planned, folder)), encoding="utf-8")
    final = 3.0 + 0.01 * planned.seed + 0.1 * planned.lr + (0.01 if planned.arm == plan.config.baseline else 0.0)
    steps, tokens = arm.batch.steps, arm.batch.tokens_per_step
    lines = metrics(steps, tokens, final)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (run / "summary.json").write_text(json.dumps(summary(steps, tokens, final)), encoding="utf-8")
