"""The parameters of a formula: fixed numbers, and learned ones. Imports neither torch nor SymPy."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

LARGEST, LARGEST_IN_FP32 = sys.float_info.max, 3.4e38


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


def read_parameter(name: str, value: Any) -> float | Learned:
    """Return a checked entry of `parameters`.

    Raises:
        ValueError: it is invalid, in one sentence.
    """
    if not isinstance(value, Mapping):
        return _number(name, value)
    settings = {"share": "layer", **value}
    if settings.keys() - {"groups"} != {"init", "share"}:
        keys = ", ".join(map(str, value)) or "nothing"
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
    if abs(number) > LARGEST_IN_FP32:
        raise ValueError(
            f"the learned parameter {name!r} starts at {number:g}, beyond 32-bit arithmetic, which ends at 3.4e38"
        )
    return Learned(number, share, groups or 0)


def _number(name: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) <= LARGEST:
        raise ValueError(f"the parameter {name!r} must be a finite number, not {number!r}")
    return float(number)
