"""How a command line program ends: bad input is one sentence on standard error, and status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from .errors import UserError


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command line program: `main(argv)`; bad input is one sentence on standard error and status 2."""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head` closed the pipe: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    raise SystemExit(status or 0)
