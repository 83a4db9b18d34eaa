"""What the process does first in which Triton's kernels are interpreted. A module: a process that starts imports it by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable


def interpret_quickly() -> None:
    """Let Triton's interpreter replace what a module sees of `triton.language` once, not at each call of each function.

    It undoes that rarely, and this process only interprets; it took a third of the time of these tests.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    replace, seen = interpreter._patch_lang, set()

    def once(function: Callable) -> object:
        if function.__module__ not in seen:
            seen.add(function.__module__)
            replace(function)
        return interpreter._LangPatchScope()  # of no changes, so there are none to undo

    interpreter._patch_lang = once
