"""Load what the runs of a plan wrote to their folders: losses, curves, and the comparisons of every size.

Everything is checked while it is read: the manifest against its hashes, the `config.yaml` of every run against the manifest,
and the data order of runs that share a seed. Runs that are missing, unfinished or cut short are listed in `notes`; the others
count.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ablation.budget import REFUSE
from ablation.learning_rates import Noise, SweepResult, arm_noises, mean_losses, sweep_result
from ablation.manifest import Manifest, read_manifest
from ablation.metrics import LOSS, Metric, median_of, metric_of, value_of
from ablation.outcomes import DIVERGED, ENDED, FINISHED, Outcome, is_finite, read_metrics, read_outcome, run_folders
from ablation.plan import Plan, PlannedRun, possible_seeds, swept_at, transferred
from ablation.statistics import Comparison, Pair, compare, pairs_with
from ablation.text_scatter import TextScatter, text_scatter
from ablation.ttest import FEWEST_SEEDS
from conf.load import values_of
from conf.provenance import summarise
from kernels.common.errors import UserError
from kernels.common.json_files import DocumentLosses, read_document_losses, read_object

FEWEST_RATES = 3  # learning rates that a verdict needs
MODELS = ("unigram", "bigram", "xz")  # that are no neural networks


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run of a plan, as read from its folder."""

    planned: PlannedRun
    folder: Path
    outcome: Outcome
    lines: list[dict[str, Any]]  # of metrics.jsonl

    def lines_of(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    @functools.cached_property
    def documents(self) -> DocumentLosses | None:
        """The final loss of each held-out document; None if the run has not ended, or does not have them."""
        losses = read_document_losses(self.folder) if self.outcome.state == FINISHED else None
        return losses if losses is not None and losses.step == self.outcome.summary.get("steps") else None

    @property
    def tokens_per_second(self) -> float:
        """Median over the run; nan without lines."""
        return median_of(self.lines_of("train"), "tokens_per_second")

    @property
    def memory_gib(self) -> float:
        """Peak memory; nan without lines."""
        return max((line["memory_gib"] for line in self.lines_of("train") if line.get("memory_gib")), default=math.nan)

    def curve(self) -> dict[int, float]:
        """Return the held-out loss by tokens trained on. All points use the same text: the last evaluation uses more."""
        lines = [line for line in self.lines_of("eval") if is_finite(line.get("loss"))]
        lines = [line for line in lines if None not in (line.get("held_out_tokens"), line.get("tokens"))]
        fewest = min((line["held_out_tokens"] for line in lines), default=0)
        return {line["tokens"]: line["loss"] for line in lines if line["held_out_tokens"] == fewest}


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The runs of a plan, and what follows from them."""

    folder: Path
    manifest: Manifest
    runs: dict[str, Run]  # by the name of the folder
    notes: tuple[str, ...]  # sentences about what is missing, unfinished or cut short

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return self.manifest.plan.baseline

    @property
    def sizes(self) -> list[str]:
        """The sizes of the plan, in its order, without those at shorter horizons."""
        return self.manifest.sizes

    @property
    def places(self) -> list[str]:
        """The sizes of the plan at all horizons."""
        return list(self.manifest.arms)

    def arms(self, size: str) -> list[str]:
        """Return the arms of a size, the baseline first."""
        return sorted(self.manifest.arms[size], key=lambda arm: arm != self.baseline)

    def size_arm_pairs(self) -> Iterator[tuple[str, str]]:
        """Yield every (size, arm) at all horizons, the baseline first within a size."""
        for size in self.places:
            for arm in self.arms(size):
                yield size, arm

    def runs_of(self, size: str, arm: str, stage: str) -> list[Run]:
        """Return the runs of an arm at a size in one stage, by learning rate and seed."""
        runs = [r for r in self.runs.values() if (r.planned.size, r.planned.arm, r.planned.stage) == (size, arm, stage)]
        return sorted(runs, key=lambda run: (run.planned.lr, run.planned.seed))

    def sweep_losses(self, size: str, arm: str) -> dict[float, dict[int, float]]:
        """Return the final loss by learning rate and seed of the sweep's runs that ended; nan where one diverged."""
        losses: dict[float, dict[int, float]] = {}
        for run in self.runs_of(size, arm, "sweep"):
            if run.outcome.state in ENDED:
                losses.setdefault(run.planned.lr, {})[run.planned.seed] = run.outcome.loss
        return losses

    def sweep(self, size: str, arm: str) -> SweepResult | None:
        """Return the result of the sweep; None before any of its learning rates has a loss."""
        swept = swept_at(self.manifest.plan, size)
        if swept != size:
            found = self.sweep(swept, arm)
            return found and dataclasses.replace(
                found, best_lr=self._transferred(size, arm, found.best_lr), loss=math.nan
            )
        losses = self.sweep_losses(size, arm)
        if not any(map(math.isfinite, mean_losses(losses).values())):
            return None
        result = sweep_result(losses, self.manifest.plan.rate_choice == "vertex")
        chosen = self.manifest.chosen.get((size, arm))
        return result if chosen is None else result.at(chosen.lr)

    def noises(self, size: str) -> dict[str, Noise]:
        """Return how the losses of each arm of a size scatter over runs."""
        return arm_noises({arm: self.sweep_losses(size, arm) for arm in self.arms(size)}, self.losses(size))

    def regrets(self, size: str) -> dict[str, float]:
        """Return what each arm may lose by missing its best learning rate, in nats: `SweepResult.regret`; nan if unknown."""
        return self._regrets[size]

    @functools.cached_property
    def _regrets(self) -> dict[str, dict[str, float]]:
        by_size = {}
        for size in self.places:
            noises, sweeps = self.noises(size), {arm: self.sweep(size, arm) for arm in self.arms(size)}
            by_size[size] = {arm: sweep.regret(noises[arm]) for arm, sweep in sweeps.items() if sweep is not None}
        return by_size

    def known_regrets(self, size: str) -> dict[str, float]:
        """Return `regrets` without the arms whose regret is unknown: they are blocked."""
        return {arm: regret for arm, regret in self.regrets(size).items() if not math.isnan(regret)}

    def best_lr(self, size: str, arm: str) -> float | None:
        """Return the learning rate at which seeds are compared; None while it is unknown, or if all diverged."""
        rates = self.manifest.learning_rates(size, arm)
        if (size, arm) in self.manifest.chosen:
            return self.manifest.chosen[size, arm].lr
        if len(rates) == 1:
            return rates[0]
        swept = swept_at(self.manifest.plan, size)
        if swept != size:
            best = self.best_lr(swept, arm)
            return None if best is None else self._transferred(size, arm, best)
        result, losses = self.sweep(size, arm), self.sweep_losses(size, arm)
        seeds = set(self.manifest.plan.rate_seeds)
        complete = set(rates) <= losses.keys() and all(seeds <= of_seeds.keys() for of_seeds in losses.values())
        return result.best_lr if result and complete else None

    def _transferred(self, size: str, arm: str, lr: float) -> float:
        places = swept_at(self.manifest.plan, size), size
        return transferred(lr, *(self.manifest.learned(place, arm)["optim.lr"] for place in places))

    def final_runs(self, size: str, arm: str) -> list[Run]:
        """Return the runs that are compared and have ended, by seed."""
        lr = self.best_lr(size, arm)
        return [r for r in self.runs_of(size, arm, "final") if r.planned.lr == lr and r.outcome.state in ENDED]

    def losses(self, size: str) -> dict[str, dict[int, float]]:
        """Return the final loss by arm and seed; nan where the run diverged."""
        return {arm: {r.planned.seed: r.outcome.loss for r in self.final_runs(size, arm)} for arm in self.arms(size)}

    @property
    def metric(self) -> Metric:
        """What the arms are compared by."""
        return metric_of(self.manifest.plan.metric)

    def values(self, size: str) -> dict[str, dict[int, float]]:
        """Return the metric by arm and seed; nan where the run diverged. A run that does not have it is left out."""
        return self.losses(size) if self.metric == LOSS else self._values[size]

    @functools.cached_property
    def _values(self) -> dict[str, dict[str, dict[int, float]]]:
        return {size: self._read_values(size) for size in self.places}

    def _read_values(self, size: str) -> dict[str, dict[int, float]]:
        by_arm: dict[str, dict[int, float]] = {}
        for arm in self.arms(size):
            by_arm[arm] = {}
            for run in self.final_runs(size, arm):
                value = value_of(self.metric, run.outcome.summary, run.lines_of("train"), run.folder)
                if run.outcome.state == DIVERGED or not math.isnan(value):
                    by_arm[arm][run.planned.seed] = math.nan if run.outcome.state == DIVERGED else value
        return by_arm

    def _per_nat(self, size: str) -> float:
        """Return the metric per nat of loss; 0 where it is none of the held-out text."""
        if self.metric == LOSS or not self.metric.of_text:
            return float(self.metric == LOSS)
        losses = self.losses(size)
        ratios = [
            value / losses[arm][seed]
            for arm, values in self.values(size).items()
            for seed, value in values.items()
            if losses[arm][seed] > 0
        ]
        return float(np.median(ratios)) if ratios else math.nan  # the same for all: they are measured on one text

    def ceiling(self, size: str) -> float:
        """Return the loss of a model that predicts uniformly, ln(vocabulary size), in nats per token."""
        vocabularies = [
            run.outcome.summary["vocab_size"]
            for run in self.runs.values()
            if run.planned.size == size and run.outcome.summary.get("vocab_size")
        ]
        return math.log(max(vocabularies)) if vocabularies else math.inf

    def blocked(self, size: str) -> dict[str, str]:
        """Return the arms that can have no verdict, whatever their losses, with the reason."""
        reasons = {}
        budget, regrets = self.manifest.plan.budget, self.regrets(size)
        for arm in self.arms(size):
            result = self.sweep(size, arm)
            mismatch = self.manifest.cost[size][arm]["mismatch"]
            if budget != "none" and abs(mismatch) > REFUSE:  # whatever mismatch the plan allowed
                reasons[arm] = f"its {budget} differ from the baseline's by {mismatch:+.1%}"
            elif len(self.manifest.learning_rates(size, arm)) < FEWEST_RATES:
                reasons[arm] = f"a verdict needs {FEWEST_RATES} learning rates per arm, the plan has fewer"
            elif self.sweep_losses(size, arm) and result is None:
                reasons[arm] = "every learning rate diverged"
            elif result is not None and self.best_lr(size, arm) and result.edge:
                reasons[arm] = f"its best learning rate, {result.best_lr:g}, is the {result.edge} that was tried"
            elif result is not None and self.best_lr(size, arm) and math.isnan(regrets[arm]):
                reasons[arm] = f"how much its learning rate, {result.best_lr:g}, misses the best one is not determined"
        return reasons

    def baselines(self, size: str) -> dict[str, float]:
        """Return the losses of unigram, bigram and xz on the held-out text of a size, nats per token; those that are known.

        Those of another text than the runs' are not.
        """
        try:
            content = read_object(baselines_path(self.folder, size))
        except (OSError, ValueError):
            return {}
        texts = {run.documents.held_out for run in self.runs.values() if run.planned.size == size and run.documents}
        if texts - {content.get("held_out")}:
            return {}
        return {name: float(content[name]) for name in MODELS if is_finite(content.get(name))}

    def beaten_by_bigram(self, size: str) -> list[str]:
        """Return the arms of a size whose mean loss is no lower than that of the bigram model; [] if that is not known."""
        bigram = self.baselines(size).get("bigram", math.nan)
        return [arm for arm, mean in self.mean_losses(size).items() if not math.isnan(bigram) and not mean < bigram]

    def mean_losses(self, size: str) -> dict[str, float]:
        """Return the mean final loss of each arm that has one; nan where a seed diverged."""
        return {arm: float(np.mean(list(of.values()))) for arm, of in self.losses(size).items() if of}

    def comparisons(self, size: str) -> list[Comparison]:
        """Compare the arms of a size with the baseline; empty before the baseline has a loss. All sizes are one family."""
        return self._comparisons[size]

    @functools.cached_property
    def _comparisons(self) -> dict[str, list[Comparison]]:
        pairs = {size: self._pairs(size) for size in self.sizes}
        family = [pair for of_size in pairs.values() for pair in of_size]
        effect, looks = self.manifest.plan.smallest_effect, self.manifest.looks
        found = iter(compare(family, effect, looks=looks, metric=self.metric))
        by_size = {size: [next(found) for _ in of_size] for size, of_size in pairs.items()}
        # A size whose baseline has no loss yet counts in the family, so that what it shows later changes no verdict of others.
        return {size: of_size if self.values(size)[self.baseline] else [] for size, of_size in by_size.items()}

    def text_scatters(self, size: str) -> dict[str, TextScatter | None]:
        """Return how the difference of each arm of a size scatters over the held-out documents, in nats per token."""
        by_arm = {
            arm: {run.planned.seed: run.documents for run in self.final_runs(size, arm) if run.documents is not None}
            for arm in self.arms(size)
        }
        looks, values, base = self.manifest.looks, self.values(size), by_arm[self.baseline]
        compared = {arm: Pair(arm, values[arm], values[self.baseline]).seeds(looks) for arm in by_arm}
        return {
            arm: text_scatter({seed: own[seed] for seed in compared[arm] if seed in own}, base)
            for arm, own in by_arm.items()
        }

    def _pairs(self, size: str) -> list[Pair]:
        values, blocked, per_nat = self.values(size), self.blocked(size), self._per_nat(size)
        if self.baseline in blocked:
            blocked[self.baseline] = f"the baseline: {blocked[self.baseline]}"
        regrets = {arm: regret * per_nat for arm, regret in self.known_regrets(size).items()}
        texts = {
            arm: dataclasses.replace(text, error=text.error * per_nat) if text and per_nat else None
            for arm, text in self.text_scatters(size).items()
        }
        worst = self.ceiling(size) * per_nat if per_nat else self._worst(values)
        return pairs_with(self.baseline, values, worst, blocked, regrets, texts)

    def _worst(self, values: dict[str, dict[int, float]]) -> float:
        """Return what a diverged run counts as, by a metric that is no loss: the worst of any run, or 0, if worse."""
        known = [value for of_arm in values.values() for value in of_arm.values() if math.isfinite(value)]
        return min([0.0, *known]) if self.metric.higher_is_better else max([0.0, *known])


def baselines_path(folder: Path, size: str) -> Path:
    """Return where a plan's runner keeps what `data.baselines` measures for a size."""
    return folder / "baselines" / f"{size}.json"


def why_no_verdict(plan: Plan) -> list[str]:
    """Return why a plan can give no verdict, or none on some arm, whatever its runs show: known before the first one."""
    config = plan.config
    reasons = []
    if len(config.rates) < FEWEST_RATES:
        reasons.append(f"a verdict needs {FEWEST_RATES} learning rates per arm, ablation.rates has {len(config.rates)}")
    if len(config.seeds) < FEWEST_SEEDS:
        reasons.append(f"a verdict needs {FEWEST_SEEDS} seeds, ablation.seeds has {len(config.seeds)}")
    for size, name in plan.size_arm_pairs(horizons=False):
        mismatch = plan.arms[size][name].width.mismatch
        if config.budget != "none" and abs(mismatch) > REFUSE:
            reasons.append(f"{name} at {size}: its {config.budget} differ from the baseline's by {mismatch:+.1%}")
    return reasons


def read_results(folder: Path) -> Results:
    """Read the folder of a plan.

    Raises:
        UserError: it is not one, or it contains a run of something else; the message names it.
    """
    manifest = read_manifest(folder)
    notes: list[str] = []
    runs: dict[str, Run] = {}
    for path in run_folders(folder):
        config, (lines, broken) = values_of(path / "config.yaml"), read_metrics(path)
        run = Run(_planned_run(manifest, path, config), path, read_outcome(path, lines), lines)
        _check_config(manifest, run, config)
        runs[path.name] = run
        if broken:
            notes.append(f"{path.name}: {broken} broken line(s) of metrics.jsonl were skipped")
        if run.outcome.state == DIVERGED:
            notes.append(f"{path.name} diverged")
        elif run.outcome.state not in ENDED:
            notes.append(f"{path.name} is {run.outcome.state} at step {run.outcome.step}")
    check_data_order(runs)
    results = Results(folder, manifest, runs, ())
    missing = [planned.name for planned in expected_runs(results) if planned.name not in runs]
    if missing:
        examples = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
        notes.append(f"{len(missing)} run(s) have not started: {examples}")
    return dataclasses.replace(results, notes=tuple(notes))


def expected_runs(results: Results) -> Iterator[PlannedRun]:
    """Yield the runs of the plan that are known: final ones once the sweep of their arm is complete."""
    plan = results.manifest.plan
    for size, arm in results.size_arm_pairs():
        rates = results.manifest.learning_rates(size, arm)
        if len(rates) > 1 and swept_at(plan, size) == size:
            yield from (PlannedRun("sweep", size, arm, lr, seed) for lr in rates for seed in plan.rate_seeds)
        best = results.best_lr(size, arm)
        if best is not None:
            yield from (PlannedRun("final", size, arm, best, seed) for seed in plan.seeds)


def check_data_order(runs: dict[str, Run]) -> None:
    """Check that runs of one size and seed trained on the same data in the same order.

    Raises:
        UserError: two runs did not; the message names them.
    """
    first: dict[tuple[str, int], tuple[str, str]] = {}
    for name, run in runs.items():
        actual = run.outcome.summary.get("data_order_hash")
        if run.outcome.state != FINISHED or not actual:
            continue
        other, expected = first.setdefault((run.planned.size, run.planned.seed), (name, actual))
        if actual != expected:
            raise UserError(f"{name} trained on other data than {other}: data_order_hash {actual} and {expected}")


def _planned_run(manifest: Manifest, path: Path, config: dict[str, Any]) -> PlannedRun:
    """Return the planned run of a folder, from its name and the learning rate of its configuration."""
    plan, named = manifest.plan, manifest.planned_run(path.name)
    message = f"{path} is not a run of the plan {plan.name}"
    if named is None:
        raise UserError(f"{message}: its name has no size and arm of the manifest")
    if named.seed not in (*possible_seeds(plan), *plan.rate_seeds):
        raise UserError(f"{message}: seed={named.seed} is not one of its seeds")
    planned = dataclasses.replace(named, lr=config.get("optim.lr", math.nan))
    if planned.name != path.name:
        raise UserError(f"{message}: its optim.lr is {planned.lr}")
    return planned


def _check_config(manifest: Manifest, run: Run, config: dict[str, Any]) -> None:
    """Compare the configuration of a run with the manifest.

    Raises:
        UserError: they differ; the message names the key.
    """
    planned = run.planned
    expected = manifest.learned(planned.size, planned.arm)
    expected |= {"optim.lr": planned.lr, "seed": planned.seed, "data_seed": planned.seed}
    if run.outcome.state == FINISHED:
        config = config | {"steps": run.outcome.summary.get("steps")}
    else:
        del expected["steps"]
    for name, value in expected.items():
        if config.get(name) != value:
            difference = f"{name} is {config.get(name)}, the plan has {value}"
            raise UserError(f"{run.folder} is not a run of the plan {manifest.plan.name}: {difference}")


def provenance_lines(results: Results) -> list[str]:
    """Return where the runs come from, a line per commit, machine and set of versions; [] if no run knows it."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, run in results.runs.items():
        content = run.outcome.summary.get("provenance")
        if content:
            same = {key: value for key, value in content.items() if key not in ("date", "command")}
            groups.setdefault(json.dumps(same, sort_keys=True), (content, []))[1].append(name)
    lines = [f"{len(names)} run(s): {summarise(content)}" for content, names in groups.values()]
    if len({content.get("commit") for content, _ in groups.values()}) > 1:
        lines.append("The runs were trained by different commits of the code")
    return lines
