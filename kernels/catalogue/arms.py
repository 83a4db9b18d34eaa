"""The arms of conf/ffn, each a YAML file: its keys, and what its comments say.

# Author 2026 (arXiv ...)                  the first line: the source and its date
# Anything else worth knowing.
# also in: vLLM SiluAndMul, ...            operators of other libraries that compute the same function
name: swiglu
formula: silu(gate) * up
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

from ..common.errors import UserError, unknown
from ..formula import Formula, FormulaError, parse

# In the repository, and in the installed package, which has no other rooms beside it.
_FOLDERS = (Path(__file__).parents[2] / "conf" / "ffn", Path(__file__).parents[1] / "arms")
_NO_ARM = "custom"  # the file that takes any formula
_ALSO_IN = "also in: "


@dataclasses.dataclass(frozen=True)
class PublishedArm:
    """An arm of conf/ffn.

    Attributes:
        formula: parsed, with the arm's own parameters.
        source: the paper or model that it is from, with its year.
        also_in: operators of other libraries that compute the same function, "vLLM SiluAndMul" for instance.
        keys: `formula`, `parameters` and `from_output` as the file has them, as far as it does.
    """

    name: str
    formula: Formula
    source: str
    also_in: tuple[str, ...]
    keys: dict[str, Any]


def names() -> list[str]:
    """Return the names of all arms; none where the files are missing."""
    folder = _folder()
    return sorted({path.stem for path in folder.glob("*.yaml")} - {_NO_ARM}) if folder else []


def can_be_read() -> bool:
    """Return whether `arms` works here: the files exist, and so does PyYAML, which the library does not depend on."""
    return _folder() is not None and importlib.util.find_spec("yaml") is not None


@functools.cache
def arms() -> tuple[PublishedArm, ...]:
    """Return all arms, by name.

    Raises:
        UserError: as `arm`.
    """
    return tuple(map(arm, names()))


def arm(name: str) -> PublishedArm:
    """Return an arm by its name, in any case.

    Raises:
        UserError: there is no such arm, its formula is refused, or files or PyYAML are missing.
    """
    folder = _folder()
    if folder is None:
        raise UserError("the arms are not installed here: they are the files of conf/ffn in the repository")
    if name.lower() not in names():
        raise unknown("arm", name, names())
    try:
        import yaml
    except ImportError:
        raise UserError("the arms are YAML files, and PyYAML is not installed: pip install pyyaml") from None
    text = (folder / f"{name.lower()}.yaml").read_text(encoding="utf-8")
    keys = yaml.safe_load(text)
    source, *notes = [line[2:] for line in text.splitlines() if line.startswith("# ")] or [""]
    also_in = [name for note in notes if note.startswith(_ALSO_IN) for name in note.removeprefix(_ALSO_IN).split(", ")]
    try:
        formula = parse(keys["formula"], keys.get("parameters"), keys.get("from_output", ""))
    except FormulaError as error:
        raise UserError(f"the formula of the arm {name} is refused: {error}") from error
    return PublishedArm(keys["name"], formula, source, tuple(also_in), keys)


def _folder() -> Path | None:
    return next((folder for folder in _FOLDERS if folder.is_dir()), None)
