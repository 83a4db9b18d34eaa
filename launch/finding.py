"""What a check of this machine found: the lines of `launch.doctor`."""

from __future__ import annotations

import dataclasses

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check, and advice if it is not green. `node`: the machine is at fault, and another one could do."""

    level: str
    name: str
    text: str
    advice: str = ""
    node: bool = False
