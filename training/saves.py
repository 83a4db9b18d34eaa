"""What became of the saves of a run: recorded, said on the console, and kept for how the run ends.

`checkpoint.py` saves in the background; `loop.py` decides when.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.common.errors import ExitStatus
from training.recorder import RunRecorder

if TYPE_CHECKING:
    from training.checkpoint import Saver


class Saves:
    """The results of a run's saves. All ranks call its methods together.

    Attributes:
        poison: the weight or moment that is not finite, once a save has found one.
        failure: why the newest checkpoint could not be saved, the same on every rank; "": it could.
        failed_status: the exit status of a run that ends for it.
    """

    def __init__(self, saver: Saver, recorder: RunRecorder) -> None:
        self._saver, self._recorder = saver, recorder
        self.poison = self.failure = ""
        self.failed_status = ExitStatus.FAILED.value

    def record(self, wait: bool = False) -> None:
        """Record the result of the last save, if it has ended. A failed save leaves earlier checkpoints intact."""
        result = self._saver.take_result(wait)
        if result is None:
            return
        self.failure, self.failed_status = result.failure or result.refused, result.status
        self.poison = f"{result.refused} after step {result.step}" if result.poisoned else ""
        if result.refused:
            self._recorder.console.warn(f"the checkpoint of step {result.step} was not written: {result.refused}")
            self._recorder.event("save_refused", result.step, path=result.path.name, reason=result.refused)
        elif result.failure:
            self._recorder.console.warn(f"the checkpoint of step {result.step} could not be saved: {result.failure}")
            self._recorder.event("save_failed", result.step, path=result.path.name, reason=result.failure)
        else:
            seconds = {"seconds": result.seconds, "waited_seconds": result.blocked_seconds}
            self._recorder.saved(result.step, path=result.path.name, **seconds)
        if result.warning:
            self._recorder.console.warn(f"older checkpoints could not be removed: {result.warning}")

    def complete(self) -> None:
        """Wait for a save that has started before this rank fails: it needs all ranks, whatever they do meanwhile."""
        try:
            self.record(wait=True)
        except Exception as error:
            self._recorder.console.warn(f"the checkpoint could not be completed: {error}")
