"""A console that shows text from runs and plans as text: control sequences in a name or a sample do nothing."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from kernels.common.text import CONTROL, printable


class SafeConsole(Console):
    r"""Rich's console, which writes control characters of any text as their escapes, such as \x1b; its own still work."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable, before they are measured and aligned."""
        for segment in super().render(renderable, options):
            if segment.control or not CONTROL.search(segment.text):
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)
