"""Print every published arm: `python -m kernels.catalogue [ARM ...] [format=text | markdown]`.

    python -m kernels.catalogue
    python -m kernels.catalogue swiglu geglu reglu
    python -m kernels.catalogue format=markdown

    ARM                 only these arms of conf/ffn
    format=markdown     as in docs/catalogue.md

Prints formula and source, operations per element and bytes moved, whether the curve is smooth and monotone, the share of
zeros, and the operators of other libraries that compute the same function. `python -m kernels.show FORMULA` says which arm a
formula is.
"""

from __future__ import annotations

from ..common.commands import run_command
from ..common.errors import UserError, unknown
from ..common.options import read_positional
from ..formula import FormulaError
from . import arms

_FORMATS = ("text", "markdown")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: an argument is invalid, or the arms are not installed.
    """
    options, chosen = read_positional(argv, {"format": "text"})
    if options["format"] not in _FORMATS:
        raise unknown("format", options["format"], _FORMATS)
    published = [arms.arm(name) for name in dict.fromkeys(map(str.lower, chosen))] if chosen else arms.arms()
    if not published:
        raise UserError("the arms are not installed here: they are the files of conf/ffn in the repository")
    from . import table  # imports torch, which takes a second or two

    try:
        rows = [table.row(arm) for arm in published]
    except FormulaError as error:
        raise UserError(str(error)) from error
    print(table.as_markdown(rows) if options["format"] == "markdown" else table.as_text(rows))


def run() -> None:
    """Run the command line program."""
    package = (__package__ or "kernels.catalogue").rpartition(".")[0]
    run_command(main, (__doc__ or "").replace("kernels.", f"{package}."))


if __name__ == "__main__":
    run()
