"""How a campaign runs. Inputs are made and read in forked children, whose memory and processor time are bounded.

A library that crashes ends a child, not the campaign: the input that it died of is a failure, and the next child goes on
behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from kernels.common.text import printable

STOP_SECONDS = 10.0  # of a processor after which an input is given up
MEMORY = 1 << 30  # bytes of address space that a child may add to what it starts with
_SILENT_SECONDS = 300.0  # without a report, after which a child counts as waiting for something
_BATCH = 500  # inputs of a child
_SHOWN = 400  # characters of an input
# What reading never does: events of `sys.addaudithook`.
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")


@dataclasses.dataclass(frozen=True)
class Campaign:
    """What makes an input, what reads it, and what may be raised.

    Attributes:
        make: an input; a function of its argument alone.
        read: raises one of `refusals` if it refuses the input, and anything else if it fails.
        begin: called once in each child, before its first input.
    """

    make: Callable[[random.Random], Any]
    read: Callable[[Any], object]
    refusals: tuple[type[Exception], ...]
    begin: Callable[[], object] = tuple


@dataclasses.dataclass
class Fuzzed:
    """What became of the inputs of a campaign."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds of a processor
    slowest_input: str = ""
    failures: list[str] = dataclasses.field(default_factory=list)


class _TimeOut(BaseException):
    """An input took `STOP_SECONDS`; no handler of `Exception` may swallow it."""


def fuzz(name: str, campaign: Campaign, numbers: range, seed: int, seconds: float = 1.0) -> Fuzzed:
    """Run a campaign.

    Args:
        name: of the campaign; with `seed` and its number it decides an input.
        numbers: of the inputs.
        seconds: of a processor that an input may take; more is a failure.
    """
    result, start = Fuzzed(), 0
    while start < len(numbers):
        start += _run_batch(name, campaign, numbers[start : start + _BATCH], seed, seconds, result)
    return result


def input_of(name: str, campaign: Campaign, seed: int, number: int) -> Any:
    """Return an input of a campaign."""
    return campaign.make(random.Random(f"{name} {seed} {number}"))


def _run_batch(name: str, campaign: Campaign, numbers: range, seed: int, seconds: float, result: Fuzzed) -> int:
    """Read inputs in a child, count what became of them, and return how many are done."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _be_child(name, campaign, numbers, seed, writing)
    os.close(writing)
    done = 0
    for line in _lines(reading, child):
        number, ending, reason, taken, shown = json.loads(line)
        done += 1
        if taken > result.slowest:
            result.slowest, result.slowest_input = taken, shown
        if ending == "accepted":
            result.accepted += 1
        elif ending == "refused":
            result.refused += 1
        if reason or taken > seconds:
            result.failures.append(f"{number}: {taken:.2f} s {shown} {reason}")
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if done == len(numbers):
        return done
    died = numbers[done]
    how = (
        signal.Signals(os.WTERMSIG(status)).name
        if os.WIFSIGNALED(status)
        else f"status {os.waitstatus_to_exitcode(status)}"
    )
    given = printable(repr(input_of(name, campaign, seed, died)))
    result.failures.append(f"{died}: {given[:_SHOWN]} the process ended with {how}")
    return done + 1


def _lines(reading: int, child: int) -> Iterator[bytes]:
    """Yield the lines that a child writes, until it ends; kill it once it is silent for too long."""
    rest = b""
    while True:
        ready, _, _ = select.select([reading], [], [], _SILENT_SECONDS)
        if not ready:
            os.kill(child, signal.SIGKILL)
        part = os.read(reading, 1 << 16)
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
        if not part:
            return


def _be_child(name: str, campaign: Campaign, numbers: range, seed: int, writing: int) -> None:
    """Read inputs and report what became of each; never return."""
    status = 1
    with contextlib.suppress(BaseException):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        faulthandler.disable()  # a crash is reported by the parent
        events: list[str] = []
        sys.addaudithook(lambda event, _: events.append(event) if event in _FORBIDDEN else None)
        signal.signal(signal.SIGVTALRM, _stop)
        _bound(resource.RLIMIT_AS, _address_space() + MEMORY)
        _bound(resource.RLIMIT_CORE, 0)
        campaign.begin()
        for number in numbers:
            given = input_of(name, campaign, seed, number)
            _bound(resource.RLIMIT_CPU, int(time.process_time() + 2 * STOP_SECONDS) + 1)  # C++ notices no timer
            began = time.process_time()
            ending, reason = _ending(campaign, given)
            taken = time.process_time() - began
            if events:
                ending, reason = "failed", f"it reached {', '.join(sorted(set(events)))}"
                events.clear()
            shown = printable(repr(given))[:_SHOWN]
            report = json.dumps([number, ending, reason[:300], taken, shown]) + "\n"
            os.write(writing, report.encode())
        status = 0
    os._exit(status)


def _ending(campaign: Campaign, given: Any) -> tuple[str, str]:
    """Return accepted, refused or failed, and what is wrong with that."""
    signal.setitimer(signal.ITIMER_VIRTUAL, STOP_SECONDS)
    try:
        campaign.read(given)
        return "accepted", ""
    except campaign.refusals as error:
        return "refused", "" if str(error) else "an empty sentence"
    except BaseException as error:  # a panic of a library in Rust is no Exception
        return "failed", printable(f"{_place(error)} {type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _place(error: BaseException) -> str:
    """Return file and line of the project's own code that raised an error."""
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "site-packages" not in code.co_filename and "/lib/python" not in code.co_filename:
            place = f"{'/'.join(code.co_filename.split('/')[-2:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _stop(*_: object) -> None:
    raise _TimeOut(f"{STOP_SECONDS:g} s of a processor")


def _bound(what: int, limit: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _address_space() -> int:
    """Return the bytes of address space of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
