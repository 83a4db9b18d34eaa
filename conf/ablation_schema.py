"""The typed schema of plans: every key of `ablation=`, which `python -m ablation.run` reads.

Values of the plans are in `conf/ablation/<plan>.yaml`; `ablation/resolve.py` checks that they fit together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from conf.schema import key


@dataclass
class AblationConfig:
    """`ablation=`: a plan, which `python -m ablation.run` turns into runs; override its keys as `ablation.KEY=VALUE`."""

    name: str = key("", "name of the plan and of its folder")
    question: str = key("", "the question that the plan answers, in a sentence")
    baseline: str = key("", "the arm to compare all others with")
    reported: Any = key(
        None,
        "what others found, shown beside what the plan finds: {source: ..., unit: ..., values: {arm: ...}, note: ...}",
    )
    arms: Any = key(None, "names of arms in conf/ffn, or {name: overrides}: {mine: ffn=custom ffn.formula=gate*up}")
    sizes: Any = key(None, "{name: overrides of a size}; null: {nano: model=nano}")
    horizons: Any = key(
        [1.0],
        "fractions of the tokens, each with runs and a schedule of its own, as [0.25, 0.5, 1]: they give compute multipliers",
    )
    common: Any = key([], "overrides of every run, as for train.py")
    rates: Any = key(
        [0.5, 1.0, 2.0],
        "learning rates to sweep, times the size's optim.lr; a single one: no sweep, no verdict",
    )
    rate_extensions: int = key(
        2, "how often to extend a sweep whose optimum lies beyond its learning rates", only="ablation.rates>1"
    )
    rate_seeds: Any = key(
        [1000, 1001],
        "seeds of the sweep, none of `seeds`; how far they scatter enters all intervals",
        only="ablation.rates>1",
    )
    rate_choice: str = key(
        "vertex",
        "where `seeds` run: vertex, of the parabola through the sweep | best, of the rates tried",
        only="ablation.rates>1",
    )
    sweep_at: Optional[str] = key(
        None,
        "a size whose sweep gives the learning rates of all, as factors of each size's optim.lr; null: each has its own",
        only="ablation.rates>1",
    )
    seeds: Any = key([0, 1, 2, 3, 4], "seeds of the compared runs, for weights and data")
    init_match: str = key("std", "ffn.init_match of all arms, unless their overrides set it: std | rms")
    held_out_files: int = key(
        300,
        "documents held out (data.held_out_files) unless overrides set data.held_out: few say little of other text; 0: never",
    )
    budget: str = key("parameters", "what is equal between arms: parameters | flops | memory | wallclock | none")
    allowed_mismatch: float = key(
        0.01, "largest relative deviation of an arm's cost from the budget", only="ablation.budget!=none"
    )
    tile: int = key(128, "coarsest multiple to round a width to, on every tensor rank")
    metric: str = key(
        "final_eval_loss",
        "what arms are compared by: final_eval_loss | bits_per_byte | tokens_per_second | mfu | TASK:METRIC of model.evaluate",
    )
    smallest_effect: float = key(
        0.01, "smallest difference of interest, in the metric's unit: nats per token for the loss"
    )
    looks: Any = key(
        None, "numbers of seeds after which verdicts are made, as [5, 10]; null: once, when all seeds have ended"
    )
    until: str = key(
        "complete",
        "complete: `seeds` run | decided: then further ones, look by look, for arms without a verdict, up to the last of looks "
        "(null: each seed up to twice as many)",
    )
    spending: str = key("obrien_fleming", "how looks share the error probability: obrien_fleming | pocock")
    reserve: float = key(0.1, "fraction of the error probability that is kept for seeds added to a plan later")
