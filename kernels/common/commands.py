"""The frame of every command line program: `--help`, exit status, and errors in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from .errors import UserError

HELP = ("-h", "--help")


def run_command(
    main: Callable[[list[str]], int | None],
    usage: str | Callable[[], str] | None = None,
    *,
    needs_arguments: bool = False,
) -> None:
    """Run a command line program and exit with its status; bad input is one sentence on standard error and status 2.

    Args:
        main: takes the arguments, returns the exit status (None is 0).
        usage: what `--help` prints, most often the module's docstring; None: `main` answers `--help` itself.
        needs_arguments: print the usage also when there are no arguments.
    """
    argv = sys.argv[1:]
    try:
        if usage is not None and (any(argument in HELP for argument in argv) or (needs_arguments and not argv)):
            print((usage if isinstance(usage, str) else usage()).strip())
            status = 0
        else:
            status = main(argv)
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head` closed the pipe, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    raise SystemExit(status or 0)
