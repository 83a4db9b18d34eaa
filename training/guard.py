"""Watches over the numbers of a run: steps that are skipped, checkpoints that must not be kept, and spikes.

A run whose numbers stay non-finite ends as `Diverged`, with a sentence that names the culprit and says how to go on before it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from conf.schema import Config
from data.batches import BatchStream
from data.ranges import SampleRanges
from kernels.common.errors import Diverged
from model.finite import kind_of_number
from model.health import Inspector
from model.weights import CheckpointReader, checkpoints
from training.culprit import find_culprit
from training.recorder import RunRecorder
from training.silent import compare_repeated, compare_replicas
from training.spikes import Spike, SpikeDetector

if TYPE_CHECKING:
    from training.engine import Engine

_NO_GRADIENT = "activations are so large that their squares overflow, and the norms make zeros of them"
REWINDS = 3  # to the same checkpoint, before a run has diverged


class Guard:
    """Counts skipped steps, and finds out what was wrong. All ranks call its methods together.

    Args:
        folder: of the run's checkpoints.
        settle: waits for a save that has started.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        stream: BatchStream,
        recorder: RunRecorder,
        folder: Path,
        global_batch: int,
        settle: Callable[[], None],
    ) -> None:
        self.config, self.engine, self.stream, self.recorder = config, engine, stream, recorder
        self._folder, self._global_batch, self._settle = folder, global_batch, settle
        self._skipped_in_a_row = self._zeros_in_a_row = 0
        guard = config.guard
        self.spikes = SpikeDetector(guard.spike_window, guard.spike_sigmas)
        self.refuse = self._refuse if guard.spike == "skip" else None  # for `Engine.train_step`
        self._refused: Spike | None = None  # why the current step was left out
        self._rewinds: collections.Counter[Path] = collections.Counter()
        self._left_out = False  # whether the newest step changed nothing
        self._first_skipped = ""  # of the steps skipped in a row: its number, and the culprit

    def count(self, applied: bool, grad_norm: torch.Tensor | float, tokens: torch.Tensor, numbers: np.ndarray) -> None:
        """Report a skipped step. Collective.

        Args:
            tokens: (sequences of this data rank, S + 1), those of the step.
            numbers: of these samples.

        Raises:
            Diverged: `guard.skip_limit` steps in a row were skipped.
        """
        self._left_out = not applied
        if self._refused is not None:
            self._report(self._refused, "the step was skipped")
            self._refused = None
            return
        if applied:
            self._skipped_in_a_row = 0
            return
        recorder, norm, limit = self.recorder, float(grad_norm), self.config.guard.skip_limit
        self._skipped_in_a_row += 1
        culprit = ""
        if self._skipped_in_a_row == 1:
            culprit = find_culprit(self.engine, tokens, numbers)
            self._first_skipped = f"the first was step {recorder.step}, in which {culprit}"
        details: dict[str, Any] = {"culprit": culprit} if culprit else {}
        recorder.event("skipped_step", grad_norm=norm, **details)
        what = f": {culprit}" if culprit else ""
        recorder.console.warn(
            f"step {recorder.step} was skipped: its gradient is not finite ({kind_of_number(norm)}){what}"
        )
        if self._skipped_in_a_row >= limit:
            recorder.event("diverged", skipped=self._skipped_in_a_row)
            raise self.diverged(f"the gradients of {limit} steps in a row were not finite; {self._first_skipped}")

    def _refuse(self, loss: float, grad_norm: float) -> bool:
        """Return whether to leave a step out."""
        spike = self.spikes.check(loss, grad_norm)
        self._refused = spike if math.isfinite(grad_norm) else None  # else it is skipped, and counts as not finite
        return self._refused is not None

    def watch(self, loss: float, grad_norm: float) -> None:
        """Report a gradient of zero, and a spike where nothing is done about it. Collective.

        Raises:
            Diverged: the gradient was zero for `guard.skip_limit` calls in a row.
        """
        if self.config.guard.spike == "report" and (spike := self.spikes.check(loss, grad_norm)):
            self._report(spike, "guard.spike=skip would leave such steps out")
        self._zeros_in_a_row = self._zeros_in_a_row + 1 if grad_norm == 0.0 else 0
        if self._zeros_in_a_row == 1:
            self.recorder.event("zero_gradient")
            self.recorder.console.warn(f"the gradient of step {self.recorder.step} is zero: {_NO_GRADIENT}")
        if self._zeros_in_a_row >= self.config.guard.skip_limit:
            self.recorder.event("diverged", zero_gradients=self._zeros_in_a_row)
            raise self.diverged(f"its gradient stays zero: {_NO_GRADIENT}")

    def must_rewind(self, loss: torch.Tensor, grad_norm: torch.Tensor | float) -> bool:
        """Return whether a step with this loss of this rank and this norm is to be undone. Collective."""
        if self.config.guard.spike != "rewind":
            return False
        means = torch.stack([loss.float(), torch.as_tensor(grad_norm, device=loss.device).float()])
        dist.all_reduce(means)  # the norm is the same on every rank; so is its mean, to the last bit
        mean_loss, norm = (means / dist.get_world_size()).tolist()
        spike = self.spikes.check(mean_loss, norm)
        if spike is not None:
            self._report(spike, "the run goes back to the last checkpoint before it")
        return spike is not None

    def checkpoint_before(self, inspector: Inspector) -> Path | None:
        """Return the newest healthy checkpoint, the same on every rank; None: there is none. Collective.

        Raises:
            Diverged: the run has gone back to it again and again.
        """
        healthy = (path for path in checkpoints(self._folder) if not inspector.problem(path))
        found: list[Path | None] = [next(healthy, None) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        if found[0] is not None:
            self._rewinds[found[0]] += 1
            if self._rewinds[found[0]] > REWINDS:
                raise self.diverged(f"it went back to {found[0].name} {REWINDS} times, and a spike followed each time")
        return found[0]

    def _report(self, spike: Spike, what: str) -> None:
        step, spike_figures = self.recorder.step, dataclasses.asdict(spike)
        self.recorder.console.warn(f"spike at step {step}: {spike}; {what}")
        action = self.config.guard.spike
        self.recorder.event("spike", what=spike_figures.pop("name"), action=action, **spike_figures)

    def compare(self, tokens: torch.Tensor) -> None:
        """Compare replicas, and gradients computed twice, in the steps in which that is due. Collective.

        Args:
            tokens: (sequences of this data rank, S + 1) of the step.

        Raises:
            Failure: they differ.
        """
        guard, step = self.config.guard, self.recorder.step
        if guard.replicas and step % guard.replicas == 0:
            compare_replicas(self.engine)
        if guard.repeat and step % guard.repeat == 0:
            compare_repeated(self.engine, tokens)

    def doubt(self, loss: torch.Tensor, grad_norm: torch.Tensor | float, stopping: bool) -> str:
        """Return why this rank would not keep a checkpoint of a step with this loss and norm; "" if it would.

        A run that is stopping has no later step to save: where this one was left out, the weights are those before it, and
        whether they are finite decides alone.
        """
        if stopping and self._left_out:
            return ""
        if kind := kind_of_number(float(loss)):
            return f"a loss of {kind}"
        norm = float(grad_norm)
        if norm == 0.0:
            return "a gradient of zero"
        kind = kind_of_number(norm)
        return f"a gradient with the norm {kind}" if kind else ""

    def diverged(self, reason: str) -> Diverged:
        """Return the exception that ends the run, with the same sentence on every rank. Collective."""
        self._settle()  # the newest checkpoint may not be complete yet
        sentence: list[Any] = [f"the run has diverged: {reason}; {self._way_on()}" if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(sentence, src=0)
        return Diverged(sentence[0])

    def _way_on(self) -> str:
        """Return how to go on before the fault."""
        newest = next(checkpoints(self._folder), None)
        if newest is None:
            return (
                "no checkpoint was saved before it: start another run (run=NAME) with a lower optim.lr or more warmup"
            )
        state, skipped = CheckpointReader(newest).state, self.stream.skipped
        position, now = (step * self._global_batch for step in (state["step"], self.recorder.step))
        # A rewind leaves samples out in memory; the command has to repeat those that the checkpoint does not record.
        recorded = SampleRanges.of(state.get("skipped_samples", [])).ranges
        ranges = [each for each in skipped.ranges if each not in recorded]
        if position < now:
            ranges.append((skipped.number(position), skipped.number(now)))
        left_out = f" guard.skip_samples={SampleRanges.of(ranges)}" if ranges else ""
        return f"to go on before it and leave its samples out: resume_from={newest.name}{left_out}"
