"""Folders of plans as runs leave them, made without training: what reads them is tested in milliseconds."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ablation.learning_rates import mean_losses, sweep_result
from ablation.manifest import write_manifest
from ablation.plan import Plan, PlannedRun, read_plan
from ablation.resolve import resolve
from bench.fuzz.sound import config_of
from conf.load import to_dict
from conf.shape import shape_of
from launch.estimate.counts import parameters

LAYERS = 4
VOCABULARY = 4096
EASIER = 0.15  # nats per token that the part of the held-out text in evaluations within a run has less than all of it
PER_LAYER = {  # name: (first layer, last layer, how it grows over the run)
    "zeros": (0.4, 0.6, 0.1), "saturated": (0.1, 0.3, 0.2), "slope": (0.6, 0.4, 0.0), "mean": (0.1, 0.2, 0.0),
    "rms": (0.5, 0.8, 0.3), "max": (8.0, 20.0, 10.0), "mean_over_std": (0.3, 0.6, 0.0), "kurtosis": (5.0, 40.0, 20.0),
    "gradient_norm": (0.3, 0.1, -0.05), "sign_agreement": (0.1, 0.2, 0.0), "dead": (0.0, 0.05, 0.05),
    "revived": (0.0, 0.01, 0.0),
}  # fmt: skip

Losses = Callable[[PlannedRun], float]  # final loss; nan: it diverges
Figures = Callable[[PlannedRun], dict[str, float | list[float]]]


def plan_of(*words: str) -> Plan:
    """Return the plan `ablation=...` of a command line."""
    return resolve(*read_plan(list(words)))


def losses(effects: dict[str, float], noise: float = 0.004, best: float = 1.0, own: float = 4e-3) -> Losses:
    """Return a rule for final losses: 3.0, what a seed adds to all arms, what an arm adds, noise, a valley over the rate.

    Each halving of the tokens, at a horizon of the plan, adds 0.2.
    """

    def loss(planned: PlannedRun) -> float:
        of_seed = random.Random(planned.seed).gauss(0, 0.02)
        chance = random.Random(f"{planned.size} {planned.arm} {planned.seed}").gauss(0, noise)
        of_rate, fraction = 0.02 * math.log2(planned.lr / own / best) ** 2, float(planned.size.partition("_x")[2] or 1)
        return 3.0 + of_seed + effects.get(planned.arm, 0.0) + chance + of_rate - 0.2 * math.log2(fraction)

    return loss


def make(
    plan: Plan,
    folder: Path,
    loss: Losses,
    planned_runs: list[PlannedRun] | None = None,
    half: str = "",
    figures: Figures | None = None,
) -> Path:
    """Write the folder of a plan whose runs have all ended, and return it.

    Args:
        folder: of plans.
        planned_runs: the runs that there are; None: all, each arm's seeds at the rate that its sweep chooses.
        half: the name of a run that was killed in the middle of a line.
        figures: other values for lines of metrics.jsonl.
    """
    folder = folder / plan.config.name
    write_manifest(plan, folder)
    for planned in all_planned(plan, loss) if planned_runs is None else planned_runs:
        write_run(plan, planned, folder, loss(planned), figures(planned) if figures else {})
    if half:
        path = folder / "runs" / half / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        (path.parent / "summary.json").unlink()
    return folder


def all_planned(plan: Plan, loss: Losses) -> list[PlannedRun]:
    """Return the runs of a plan without extended sweeps."""
    planned_runs = []
    for place in plan.size_arm_pairs():
        swept = plan.sweep_runs(*place)
        planned_runs += swept
        losses_by_rate: dict[float, dict[int, float]] = {}
        for planned in swept:
            losses_by_rate.setdefault(planned.lr, {})[planned.seed] = loss(planned)
        if not swept:
            planned_runs += plan.final_runs(*place, plan.learning_rates(*place)[0])
        elif any(map(math.isfinite, mean_losses(losses_by_rate).values())):
            result = sweep_result(losses_by_rate, plan.config.rate_choice == "vertex")
            planned_runs += plan.final_runs(*place, result.best_lr)
    return planned_runs


def document_losses(planned: PlannedRun, final: float) -> dict[str, Any]:
    """Return the losses of 60 documents, whose mean per token is `final`; an arm finds others hard by 0.02 nats than others."""
    lengths = random.Random("text")
    tokens = [lengths.randint(300, 600) for _ in range(60)]
    chance = random.Random(f"{planned.size} {planned.arm}")
    losses = [3.0 + chance.gauss(0, 0.02) for _ in tokens]
    mean = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    nats = [n * (loss - mean + final) for n, loss in zip(tokens, losses, strict=True)]
    return {"held_out": "the text", "nats": nats, "tokens": tokens}


def _evaluation(at: Mapping[str, int], loss: float, tokens: int) -> dict[str, Any]:
    return {"kind": "eval", **at, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2.5,
            "held_out_tokens": tokens}  # fmt: skip


def write_run(
    plan: Plan,
    planned: PlannedRun,
    folder: Path,
    final: float,
    figures: Mapping[str, float | list[float]] = MappingProxyType({}),
) -> None:
    """Write one run that ended with a loss, or diverged (nan); lines have those `figures` that they have anyway."""
    run = folder / "runs" / planned.name
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    arm = plan.arms[planned.size][planned.arm]
    config = config_of(plan, planned, folder)
    # JSON is YAML too, and written in a twentieth of the time.
    (run / "config.yaml").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    batch, ends = arm.batch, 1.0 if math.isfinite(final) else 0.4
    chance = random.Random(planned.name)
    lines: list[dict[str, Any]] = []
    last = 0
    for part in range(1, int(20 * ends) + 1):
        step = batch.steps * part // 20
        last, at = step, {"step": step, "tokens": step * batch.tokens_per_step}
        speed, curve = 17000 * chance.uniform(0.9, 1.1), (final if ends == 1.0 else 3.0) + 4 * (1 - part / 20) ** 2
        lines.append({"kind": "train", **at, "loss": curve + 0.02, "lr": planned.lr, "grad_norm": 0.5,
                      "tokens_per_second": speed, "mfu": 0.2, "memory_gib": 0.9})  # fmt: skip
        if part % 2 == 0:
            share, own = part / 20, 1 + chance.random()
            of_layers = {
                name: [own * (first + (end - first) * i / (LAYERS - 1) + grows * share) for i in range(LAYERS)]
                for name, (first, end, grows) in PER_LAYER.items()
            }
            lines.append({"kind": "telemetry", **at, **of_layers, "gradient_first_over_last": 3.0 - share,
                          "window_tokens": 1_000_000})  # fmt: skip
        if part % 4 == 0:
            lines.append(_evaluation(at, curve - EASIER, 32768))
    if ends == 1.0:
        lines.append(_evaluation(at, final, 133121) | {"dead": [0.01 * i for i in range(LAYERS)]})
    else:
        lines.append({"kind": "event", "event": "diverged", "step": last, "tokens": last * batch.tokens_per_step})
    lines = [line | {name: value for name, value in figures.items() if name in line} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if ends == 1.0:
        losses = document_losses(planned, final)
        (run / "documents.json").write_text(json.dumps({"step": batch.steps, **losses}), encoding="utf-8")
    counts = parameters(shape_of(config))
    summary = {
        "status": "finished" if ends == 1.0 else "stopped", "final_eval_loss": final if ends == 1.0 else None,
        "bits_per_byte": final / 2.5 if ends == 1.0 else None, "parameters": sum(counts.values()),
        "vocab_size": VOCABULARY, "ffn_parameters": counts["ffn"], "flops_per_token": arm.flops_per_token,
        "data_order_hash": f"{planned.seed:016x}", "config_hash": "0" * 16, "steps": last,
        "tokens": last * batch.tokens_per_step, "wall_seconds": 60.0,
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
