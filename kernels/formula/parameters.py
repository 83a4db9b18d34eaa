"""The parameters of a formula: fixed numbers, learned ones, and scheduled ones. Imports neither torch nor SymPy."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

LARGEST, LARGEST_IN_FP32 = sys.float_info.max, 3.4e38
SMALLEST_IN_FP32 = 2.0**-126  # with all digits; what is smaller loses them one by one
SCHEDULES = ("linear", "cosine")
# The attributes of torch.nn.ParameterDict, which holds a layer's learned parameters as attributes beside its own. Written out,
# because formulas are read without torch, and alike under every version of it.
_ATTRIBUTES = frozenset(
    """
    T_destination _apply _backward_hooks _backward_pre_hooks _buffers _call_impl _compiled_call_impl _forward_hooks
    _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks _forward_pre_hooks_with_kwargs
    _get_backward_hooks _get_backward_pre_hooks _get_name _is_full_backward_hook _key_to_attr _keys _load_from_state_dict
    _load_state_dict_post_hooks _load_state_dict_pre_hooks _maybe_warn_non_full_backward_hook _modules _named_members
    _non_persistent_buffers_set _parameters _register_load_state_dict_pre_hook _register_state_dict_hook
    _replicate_for_data_parallel _save_to_state_dict _slow_forward _state_dict_hooks _state_dict_pre_hooks _version
    _wrapped_call_impl add_module apply bfloat16 buffers call_super_init children clear compile copy cpu cuda double
    dump_patches eval extra_repr float forward fromkeys get get_buffer get_extra_state get_parameter get_submodule half ipu
    items keys load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters pop popitem
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule
    setdefault share_memory state_dict to to_empty train training type update values xpu zero_grad
    """.split()  # noqa: SIM905 (a list literal would be three times as long)
)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A learned parameter of a formula.

    Attributes:
        init: initial value.
        share: "layer" for one per layer, "channel" for one for each of the d_ff channels, "group" for one for each of `groups`
            equal blocks of consecutive channels.
        groups: number of blocks; 0 unless `share` is "group".
    """

    init: float
    share: str = "layer"
    groups: int = 0

    def size(self, d_ff: int) -> int:
        """Return how many numbers a layer of this width learns."""
        return {"layer": 1, "channel": d_ff, "group": self.groups}[self.share]

    def settings(self) -> dict[str, Any]:
        """Return the mapping that `parse` reads this from, with every default written out."""
        settings = {"init": self.init, "share": self.share}
        return settings | {"groups": self.groups} if self.share == "group" else settings

    def in_kernels(self) -> Learned:
        """Return the parameter as kernels read it: that of a group is given to them channel by channel."""
        return Learned(self.init, "channel") if self.share == "group" else self

    def on_ranks(self, tensor: int) -> Learned:
        """Return the parameter of one of the tensor ranks over which channels, and with them groups, are sharded."""
        return dataclasses.replace(self, groups=self.groups // tensor)


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A parameter of a formula whose value is a function of the step: neither learned, nor a constant of the kernels.

    Attributes:
        schedule: "linear", or "cosine" (half a period, which begins and ends slowly).
        first, last: the values before and after the schedule.
        start: steps before it begins.
        steps: its length in steps; None: to the end of the run. A number below 1, as `start` may be too, is a fraction of the
            run's steps.
    """

    schedule: str
    first: float
    last: float
    start: float = 0
    steps: float | None = None

    share = "layer"  # kernels read it as they read a learned parameter of a layer

    @property
    def init(self) -> float:
        """The value in a model that has not been trained."""
        return self.first

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return min(self.first, self.last), max(self.first, self.last)

    def value(self, step: int, of: int) -> float:
        """Return the value after `step` steps of a run of `of` steps, with which the next step is taken.

        It is `first` until the schedule begins, and exactly `last` once it has ended.
        """
        start = self.start if self.start >= 1 else round(self.start * of)
        if self.steps is None:
            length = of - start
        else:
            length = self.steps if self.steps >= 1 else round(self.steps * of)
        if step <= start:
            return self.first
        if step >= start + length:
            return self.last
        progress = (step - start) / length
        progress = progress if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
        return (1 - progress) * self.first + progress * self.last

    def size(self, d_ff: int) -> int:  # noqa: ARG002
        """Return how many numbers a layer has of it."""
        return 1

    def settings(self) -> dict[str, Any]:
        """Return the mapping that `parse` reads this from."""
        settings: dict[str, Any] = {"schedule": self.schedule, "from": self.first, "to": self.last}
        settings |= {"start": self.start} if self.start else {}
        return settings if self.steps is None else settings | {"steps": self.steps}


def read_parameter(name: str, value: Any) -> float | Learned | Scheduled:
    """Return a checked entry of `parameters`.

    Raises:
        ValueError: it is invalid, in one sentence.
    """
    if not isinstance(value, Mapping):
        return _number(name, value)
    return _scheduled(name, value) if "schedule" in value else _learned(name, value)


def _learned(name: str, given: Mapping[str, Any]) -> Learned:
    if name in _ATTRIBUTES or (name.startswith("__") and name.endswith("__")):
        raise ValueError(
            f"a learned parameter cannot be named {name!r}, which torch.nn.ParameterDict has as an attribute of its own: "
            "choose another name"
        )
    settings = {"share": "layer", **given}
    if settings.keys() - {"groups"} != {"init", "share"}:
        keys = ", ".join(map(str, given)) or "nothing"
        raise ValueError(f"the learned parameter {name!r} takes init and share, not {keys}")
    number, share, groups = _number(name, settings["init"]), settings["share"], settings.get("groups")
    if share not in ("layer", "channel", "group"):
        raise ValueError(f"the parameter {name!r} is shared by layer, by channel or by group, not {share!r}")
    if share != "group" and groups is not None:
        raise ValueError(f"the parameter {name!r}, one per {share}, has no groups: they belong to share: group")
    if share == "group" and groups is None:
        raise ValueError(f"the parameter {name!r} with share: group needs groups, the number of blocks of channels")
    if share == "group" and (type(groups) is not int or groups < 1):
        raise ValueError(f"the parameter {name!r} has groups: {groups!r}; it must be a whole number of at least 1")
    _refuse_beyond_fp32(f"the learned parameter {name!r} starts at", number)
    return Learned(number, share, groups or 0)


def _scheduled(name: str, given: Mapping[str, Any]) -> Scheduled:
    if unknown := given.keys() - {"schedule", "from", "to", "start", "steps"}:
        raise ValueError(
            f"the scheduled parameter {name!r} takes schedule, from, to, start and steps, not {', '.join(map(str, unknown))}"
        )
    if missing := {"from", "to"} - given.keys():
        raise ValueError(
            f"the scheduled parameter {name!r} needs {' and '.join(sorted(missing))}: its values at the ends"
        )
    if given["schedule"] not in SCHEDULES:
        raise ValueError(
            f"the parameter {name!r} has schedule: {given['schedule']!r}; it must be {' or '.join(SCHEDULES)}"
        )
    first, last = (_number(name, given[key]) for key in ("from", "to"))
    for number in (first, last):
        _refuse_beyond_fp32(f"the scheduled parameter {name!r} reaches", number)
    for key in ("start", "steps"):
        steps = given.get(key)
        fits = type(steps) is int or (type(steps) is float and steps < 1)
        if steps is not None and not (fits and steps >= 0 and (steps or key == "start")):
            raise ValueError(
                f"the parameter {name!r} has {key}: {steps!r}; it must be a whole number of steps, or a fraction of the run "
                "below 1"
            )
    return Scheduled(str(given["schedule"]), first, last, given.get("start") or 0, given.get("steps"))


def _refuse_beyond_fp32(what: str, number: float) -> None:
    if abs(number) > LARGEST_IN_FP32:
        raise ValueError(f"{what} {number:g}, beyond 32-bit arithmetic, which ends at 3.4e38")
    if 0 < abs(number) < SMALLEST_IN_FP32:
        raise ValueError(f"{what} {number:g}, too small for 32-bit arithmetic, which begins at 1.2e-38: write 0")


def _number(name: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= LARGEST:
        raise ValueError(f"the parameter {name!r} must be a finite number, not {number!r}")
    return float(number)
