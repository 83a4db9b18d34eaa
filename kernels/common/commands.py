"""The frame of every command line program: `--help`, exit status, and errors in one sentence, once per node."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .errors import Failure
from .files import is_of_disk, problem_of, status_of
from .text import printable
from .usage import fit

HELP = ("-h", "--help")
# The variables of launchers: deepspeed and torchrun, Open MPI, srun.
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_RANKS_OF_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
_WAIT_SECONDS = 0.5  # of other ranks, so that rank 0 speaks for all of them where it has the same error
_FRESH_SECONDS = 60.0  # an error that is older was of an earlier command


def run_command(
    main: Callable[[list[str]], int | None],
    usage: str | Callable[[], str] | None = None,
    *,
    needs_arguments: bool = False,
) -> None:
    """Run a command line program and exit with its status; a `Failure` is one sentence on standard error and its status.

    So is an error of a disk that nothing on the way explained.

    Args:
        main: takes the arguments, returns the exit status (None is 0).
        usage: what `--help` prints, fitted to the terminal; most often the module's docstring. None: `main` answers `--help`
            itself.
        needs_arguments: print the usage also when there are no arguments.
    """
    argv = sys.argv[1:]
    try:
        if usage is not None and (any(argument in HELP for argument in argv) or (needs_arguments and not argv)):
            print(fit(usage if isinstance(usage, str) else usage()))
            status = 0
        else:
            status = main(argv)
        sys.stdout.flush()
    except Failure as error:
        _print_once(str(error))
        raise SystemExit(int(error.status)) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head` closed the pipe, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if not is_of_disk(error):
            raise
        _print_once(problem_of(error))
        raise SystemExit(status_of(error)) from None
    raise SystemExit(status or 0)


def _print_once(sentence: str) -> None:
    """Print an error, with the number of the rank unless it is 0. Of the ranks of a node that share it, one prints it."""
    rank = _integer(*_RANK)
    if rank:
        time.sleep(_WAIT_SECONDS)
    if _integer(*_RANKS_OF_NODE) < 2 or _claim(sentence, rank):
        print(printable(f"error: {f'rank {rank}: ' if rank else ''}{sentence}"), file=sys.stderr, flush=True)


def _claim(sentence: str, rank: int) -> bool:
    """Return whether this rank is the one to print an error: the first of those that one launcher started on this node.

    The rank that printed an error claims it again, so that the same command typed twice prints it twice.
    """
    launcher = f"{os.getuid()} {os.getppid()} {os.environ.get('MASTER_PORT', '')}"
    name = hashlib.sha256(f"{launcher} {sentence}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"formula-ffn-error-{name}")
    for claim in path.parent.glob("formula-ffn-error-*"):
        with contextlib.suppress(OSError):
            if time.time() - claim.stat().st_mtime > _FRESH_SECONDS or (
                claim == path and path.read_text() == str(rank)
            ):
                claim.unlink()
    try:
        with open(path, "x") as file:
            file.write(str(rank))
    except FileExistsError:
        return False
    except OSError:  # no temporary folder: better twice than never
        return True
    return True


def _integer(*names: str) -> int:
    """Return the first of these environment variables that is set, as a number; 0 where none is, or it is none."""
    text = next((os.environ[name] for name in names if os.environ.get(name)), "0")
    match = text.split("(")[0].split(",")[0]  # SLURM writes "4(x2),3"
    return int(match) if match.isdigit() else 0
