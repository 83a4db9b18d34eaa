"""Stop requests: signals are recorded and agreed on, and handlers are restored."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

from launch.launchers import Launchers
from training import signals
from training.signals import StopRequest

NUMBERS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_recorded_and_handlers_are_restored(number):
    before = [signal.getsignal(each) for each in NUMBERS]
    with StopRequest(Launchers()) as stop:
        assert stop.agree() == ""
        os.kill(os.getpid(), number)
        assert stop.agree() == signal.Signals(number).name
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_handlers_are_restored_after_an_exception():
    before = [signal.getsignal(each) for each in NUMBERS]
    with pytest.raises(RuntimeError), StopRequest(Launchers()):
        raise RuntimeError
    assert [signal.getsignal(each) for each in NUMBERS] == before


def test_a_warning_that_arrives_while_the_rank_starts_stops_it():
    before = signal.getsignal(signal.SIGUSR1)
    try:
        launchers = Launchers()
        launchers.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopRequest(launchers) as stop:
            assert stop.agree() == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_lost_terminal_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(Launchers()) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agree() == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_names_the_stop():
    with StopRequest(Launchers()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agree() == "SIGTERM"


def test_the_second_ctrl_c_interrupts_unless_it_is_the_launchers_copy(set_time):
    now = 100.0
    set_time(signals, monotonic=lambda: now)
    with StopRequest(Launchers()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now = 100.5
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agree() == "SIGINT"
        now = 101.5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_launcher_that_has_ended_is_a_request_and_a_signal_comes_first(monkeypatch):
    ended = False
    launchers = Launchers()
    monkeypatch.setattr(launchers, "gone", lambda: ended)
    with StopRequest(launchers) as stop:
        assert stop.agree() == ""
        ended = True
        assert stop.agree() == "the launcher has ended"
    with StopRequest(launchers) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agree() == "SIGTERM"
