"""Signals are noted, not obeyed at once; silence ends the process with all stacks."""

import signal
import threading
import time

import pytest

from jaxseg.errors import RESTART
from jaxseg.life import Life, Stopped


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_is_noted_and_the_handlers_come_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Life() as life:
        assert not life.asked()
        signal.raise_signal(number)
        assert life.asked() and life.signal == life.name() == name
        with pytest.raises(Stopped):
            life.check()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_obeyed_at_once_and_a_second_sigterm_is_not():
    with Life() as life:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert life.signal == "SIGTERM"


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Life() as life:
            signal.raise_signal(signal.SIGHUP)
        assert not life.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_has_no_handlers_and_goes_on():
    seen = []

    def work():
        with Life() as life:
            life.check()
            seen.append(life.asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_silence_prints_all_stacks_and_leaves(capfd, monkeypatch):
    monkeypatch.setattr("sys.__stderr__", open(2, "w", closefd=False))
    codes = []
    with Life(0.3, codes.append) as life:
        life.beat("the step that never ends")
        time.sleep(1)
    assert codes == [RESTART]
    err = capfd.readouterr().err
    assert "no progress for" in err and "in the step that never ends" in err
    assert "test_silence_prints_all_stacks_and_leaves" in err and "the same command goes on" in err


def test_progress_keeps_it_quiet(capfd):
    codes = []
    with Life(0.5, codes.append) as life:
        for _ in range(10):
            time.sleep(0.1)
            life.beat("a step")
    assert codes == [] and capfd.readouterr().err == ""


def test_an_evaluation_step_counts_as_progress_and_ends_after_a_signal():
    def step(a, b):
        return a + b

    step._cache_size = lambda: 3
    with Life() as life:
        watched = life.watched(step)
        assert watched(1, 2) == 3 and watched._cache_size() == 3 and life.doing == "an evaluation"
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Stopped):
            watched(1, 2)
