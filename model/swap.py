"""Continue a run with another activation: `python -m model.swap run=NAME ffn=relu2 [KEY=VALUE ...]`.

    run=NAME           a run by name or by path
    ffn=ARM            the new arm
    KEY=VALUE          overrides for train.py: steps, optim, schedule, eval_every, ...
    swap.steps=N       steps over which the old arm fades into the new one; default: a tenth of the steps
    swap.run=NAME      name of the new run; default: NAME-swap-ARM
    swap.control=true  also train the same continuation without the swap, as NAME-swap-ARM-control; false: do not
    swap.train=true    false: write the runs, and print the commands that train them
    ranks=N            ranks on this machine; default: as many as it needs
    step=N             a checkpoint; default: the newest
    runs=FOLDER        where run folders are; default: runs

The new run starts from the weights of the old one and computes what it computed: its formula is (1 - t)*(old) + t*(new), and t
goes from 0 to 1 over the first swap.steps steps. Both arms must be gated, or both ungated. After that the run has the new arm,
and `model.export` writes it as such. Steps, learning rate and its schedule begin anew, the text goes on after what the old run
has read, and the optimizer keeps its state. At the end the held-out losses of both runs are printed, and the fraction of h that
is 0. A swap that was interrupted goes on by the same command.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from conf.arms import catalogue, layer_arms
from conf.identity import differences, how_to_go_on
from conf.load import find_run, from_yaml, load
from conf.overrides import check_overrides
from conf.schema import Config
from conf.shape import shape_of
from conf.validate import total_steps, validate
from data.ranges import SampleRanges
from data.tokenizer import Tokenizer
from kernels.common.commands import run_command
from kernels.common.errors import UserError
from kernels.common.options import split_options
from kernels.formula import Formula, parse
from kernels.formula.settled import settled
from launch.launchers import on_stop_signals
from launch.local import ranks_of, train_command
from launch.ranks import without_launcher
from model.decoder import Decoder, Layer
from model.generate import load_run
from model.homotopy import Homotopy, homotopy, unchanged
from model.new_run import write_new_run
from model.swap_report import report
from model.weights import NO_STATE, CheckpointReader, OptimizerState

_DEFAULTS = {"run": "", "step": -1, "runs": "runs", "ranks": 0}
_DEFAULTS |= {"swap.steps": 0, "swap.run": "", "swap.control": True, "swap.train": True}
_REQUIRED = {"run": "run=NAME, the run to go on from"}
_KEPT = ("model", "tokenizer", "data")  # groups whose keys must stay as they are in the run
_FREE = ("model.activation_checkpointing", "model.attention", "data.max_epochs", "data.prepared", "data.workers")


@dataclasses.dataclass(frozen=True)
class SwapSource:
    """The run to go on from, at one of its checkpoints."""

    run: Path
    config: Config
    model: Decoder
    tokenizer: Tokenizer
    state: dict[str, Any]

    @property
    def reader(self) -> CheckpointReader:
        """A reader of the checkpoint."""
        return CheckpointReader(self.run / "checkpoints" / f"step_{self.state['step']:08d}")

    def formulas(self) -> list[Formula]:
        """Return each layer's formula, with numbers for what followed a schedule."""
        layers = (cast("Layer", layer).ffn for layer in self.model.layers)
        return [settled(f, ffn.scheduled) if f.scheduled else f for ffn in layers for f in (ffn.activation.formula,)]


def read_source(run: Path, step: int) -> SwapSource:
    """Return a run at its newest checkpoint, or at that of a step.

    Raises:
        UserError: there is none, or it is damaged.
    """
    model, tokenizer, state = load_run(run, step)
    return SwapSource(run, from_yaml(run / "config.yaml"), model, tokenizer, state)


def paths_of(source: SwapSource, config: Config, steps: int) -> list[Homotopy]:
    """Return each layer's path from its formula in the run to that of the configuration with the new arm.

    Raises:
        UserError: a layer is gated before and not after, or the other way round, or no layer changes.
    """
    paths = []
    for old, arm in zip(source.formulas(), layer_arms(config), strict=True):
        if old.gated != arm.formula.gated:
            kind = "gated" if old.gated else "ungated"
            known = {name: arm for name, arm in catalogue().items() if arm["formula"]}
            fitting = [n for n, each in known.items() if parse(each["formula"], each["parameters"]).gated == old.gated]
            has = f"{source.run.name} has {source.config.ffn.name}, a{'n' * (not old.gated)} {kind} arm"
            raise UserError(
                f"{has}, and ffn={config.ffn.name} is {'un' * old.gated}gated: with other matrices it cannot start from the "
                f"function that was trained; choose one of {', '.join(fitting)}"
            )
        paths.append(unchanged(old) if _same(old, arm.formula) else homotopy(old, arm.formula, steps))
    if all(path.text == old.text for path, old in zip(paths, source.formulas(), strict=True)):
        raise UserError(f"{source.run.name} has ffn={config.ffn.name} already: name another arm, as ffn=reglu")
    return paths


def _same(old: Formula, new: Formula) -> bool:
    return (old.text, old.learned, old.fixed, old.scheduled) == (new.text, new.learned, new.fixed, new.scheduled)


def with_arms(config: Config, paths: list[Homotopy], name: str) -> Config:
    """Return a configuration whose layers have these formulas.

    Args:
        name: of the arm, a label.
    """
    base, *_ = paths
    others = {
        str(index): {"formula": path.text, "parameters": path.parameters}
        for index, path in enumerate(paths)
        if (path.text, path.parameters) != (base.text, base.parameters)
    }
    ffn = dataclasses.replace(
        config.ffn,
        name=name,
        formula=base.text,
        parameters=base.parameters,
        from_output="",
        save="packed" if config.ffn.save == "output" else config.ffn.save,
        per_layer=others,
    )
    return dataclasses.replace(config, ffn=ffn)


def write_run(source: SwapSource, config: Config, paths: list[Homotopy]) -> None:
    """Write the folder of a run that goes on with these formulas, or leave it alone if it is there.

    Raises:
        UserError: another run has its name, or it cannot be trained.
    """
    validate(config, ranks_of(config))
    run = Path(config.runs) / str(config.run)
    if run.exists():
        if changed := differences(from_yaml(run / "config.yaml"), config):
            how = how_to_go_on(changed).replace("(run=NAME)", "(swap.run=NAME)")
            raise UserError(f"{run} holds a run with other settings ({'; '.join(changed)}): {how}")
        return
    old, state = source.config, source.state
    same_order = (old.sequence_length, old.data_seed) == (config.sequence_length, config.data_seed)
    read = SampleRanges.of(state.get("skipped_samples") or [])
    done = read.number(state["step"] * old.global_batch_size)
    write_new_run(
        run,
        config,
        source.tokenizer,
        _tensors(source, config, paths),
        {"event": "swapped", "from": os.path.abspath(source.run), "from_step": state["step"]},
        _optimizer(source, config, paths),
        corpus_hash=state.get("corpus_hash"),
        skipped_samples=(read | SampleRanges.of([(0, done)])).ranges if same_order and done else [],
    )


def _tensors(source: SwapSource, config: Config, paths: list[Homotopy]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the new run: those of the old one, and what the new arm learns at its initial values."""
    with torch.device("meta"):
        decoder = Decoder(shape_of(config, source.tokenizer.vocab_size), config.model, "sdpa")
    stored = dict(source.model.named_parameters())
    for name, parameter in decoder.named_parameters():
        if (origin := _origin(name, paths)) is not None:
            yield name, stored[origin]
            continue
        layer, _, symbol = name.partition(".learned.")
        formula = cast("Layer", decoder.layers[int(layer.split(".")[1])]).ffn.activation.formula
        yield name, torch.full(parameter.shape, formula.learned[symbol].init)


def _origin(name: str, paths: list[Homotopy]) -> str | None:
    """Return the name in the old run of a parameter of the new one; None: it is of the new arm."""
    layer, learned, symbol = name.partition(".learned.")
    if not learned:
        return name
    origins = {new: old for old, new in paths[int(layer.split(".")[1])].origins.items()}
    return f"{layer}.learned.{origins[symbol]}" if symbol in origins else None


def _optimizer(source: SwapSource, config: Config, paths: list[Homotopy]) -> OptimizerState:
    """Return the state of the old run's optimizer; none if the new run has another one."""
    if source.config.optim.name != config.optim.name:
        return NO_STATE
    reader = source.reader

    def states(name: str) -> Mapping[str, Tensor]:
        origin = _origin(name, paths)
        return {} if origin is None else {key: reader.tensor(origin, key) for key in reader.states(origin)}

    by_rows = {name: rows for name in reader.shapes() if (rows := reader.row_states(name))}
    return OptimizerState(reader.state["optimizer_steps"], states, by_rows)


# ------------------------------------------------------------------------------------------------------------- command


def read_configs(source: SwapSource, options: Mapping[str, Any], overrides: list[str]) -> tuple[Config, Config]:
    """Return the configurations of the run with the new arm and of the one without, still with the arms as they were named.

    Raises:
        UserError: an override is not understood, or changes what must stay.
    """
    keys = [override.lstrip("+").partition("=")[0] for override in overrides]
    if not any(key.partition(".")[0] == "ffn" for key in keys):
        raise UserError("name the new arm: ffn=reglu, or ffn=custom ffn.formula=...")
    for key in keys:
        if key.partition(".")[0] in _KEPT and key not in _FREE:
            raise UserError(
                f"{key} is that of {source.run.name}, whose weights and text are gone on with: leave it out"
            )
    place = [f"run={source.run.name}", f"runs={source.run.parent}"]
    new, old = (load([*place, *some], "model.swap") for some in (overrides, _without_arm(overrides)))
    name = options["swap.run"] or f"{source.run.name}-swap-{new.ffn.name}"
    fresh = {"runs": options["runs"], "resume": True, "resume_from": None, "resume_optimizer": "keep"}
    return (
        dataclasses.replace(new, run=name, **fresh),
        dataclasses.replace(old, run=f"{name}-control", **fresh),
    )


def _without_arm(overrides: list[str]) -> list[str]:
    return [each for each in overrides if each.lstrip("+").partition("=")[0].partition(".")[0] != "ffn"]


def swap_steps(asked: int, config: Config) -> int:
    """Return the steps over which the arm changes: those asked for, or a tenth of the run's.

    Raises:
        UserError: they are more than the run has.
    """
    steps = total_steps(config)
    if steps is None:
        raise UserError("the length of the run is missing: steps=N, or tokens=N")
    if asked > steps:
        raise UserError(
            f"swap.steps={asked} is more than the {steps} steps of the run, which would not reach the new arm"
        )
    return asked or max(1, round(steps / 10))


def main(argv: list[str]) -> int:
    options, overrides = split_options(argv, _DEFAULTS, {"step": -1, "swap.steps": 1}, _REQUIRED)
    check_overrides(overrides, _DEFAULTS)
    source = read_source(find_run(options["run"], options["runs"]), options["step"])
    new, control = read_configs(source, options, overrides)
    steps = swap_steps(options["swap.steps"], new)
    paths = paths_of(source, new, steps)
    swapped = with_arms(new, paths, f"{source.config.ffn.name}_to_{new.ffn.name}")
    runs = {swapped.run: (swapped, paths)}
    if options["swap.control"]:
        kept = [unchanged(formula) for formula in source.formulas()]
        settles = any(layer.formula.scheduled for layer in source.model.shape.ffn)
        runs[control.run] = with_arms(control, kept, source.config.ffn.name) if settles else control, kept
    for config, each in runs.values():
        write_run(source, config, each)
    print(f"{swapped.run}: {swapped.ffn.formula}")
    ranks = options["ranks"] or ranks_of(swapped)
    for name in runs:
        arguments = [f"run={name}", f"runs={options['runs']}", *_without_arm(overrides)]
        if not options["swap.train"]:
            print(f"deepspeed train.py {shlex.join(arguments)}")
        elif status := _train(train_command(arguments, ranks)):
            return status
    if options["swap.train"]:
        folders = [Path(options["runs"]) / str(name) for name in runs]
        report(folders[0], folders[1] if len(folders) > 1 else None, source.run, source.state["step"], steps)
    return 0


def _train(command: list[str]) -> int:
    """Run a training to its end, or to a signal, which it gets too: it saves then; return the exit status."""
    stopped = False
    with subprocess.Popen(command, env=without_launcher(os.environ), start_new_session=True) as process:

        def stop(*_: Any) -> None:
            nonlocal stopped
            stopped = True
            process.send_signal(signal.SIGTERM)

        with on_stop_signals(stop):
            status = process.wait()
    if stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
    return status or int(stopped)


if __name__ == "__main__":
    run_command(main, __doc__, needs_arguments=True)
