"""The files that benchmarks write: the figures that pages quote are replaced only by the command that measured them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kernels.common.errors import UserError
from kernels.common.files import make_folder_of


def claim_record(path: str | Path, argv: Iterable[str]) -> None:
    """Make the folder of a file that is written after minutes, and refuse to replace a record by figures of something else.

    A benchmark's default file in `bench/results` is what it measures without options. With options, `out=FILE` names another.

    Args:
        path: of the file.
        argv: the arguments of the command, in which `out=` names the file if it is not the default one.

    Raises:
        UserError: the file exists, is the default one, and the command has options; or its folder cannot be made.
    """
    options = list(argv)
    named = any(option.removeprefix("--").startswith("out=") for option in options)
    if options and not named and Path(path).exists():
        raise UserError(f"{path} has other figures, which pages quote: write those of {' '.join(options)} to out=FILE")
    make_folder_of(path)
