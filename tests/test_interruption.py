"""How a training is told to stop."""

import signal
import threading

import pytest

from mplug2 import interruption as interruption_module
from mplug2.interruption import Interruption

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_signals_of_one_moment_are_one_and_a_later_one_aborts(number, monkeypatch):
    said: list[str] = []
    with Interruption() as interruption:
        interruption.hold(said.append)
        assert not interruption.asked(1)
        for again in (number, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(again)
        assert said == []  # a handler that prints may wait for what it has interrupted
        assert interruption.asked(2) and interruption.asked(3)
        assert said == [f"{number.name}: finishing this step and saving; once more stops at once"]
        monkeypatch.setattr(interruption_module, "MOMENT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_before_there_is_anything_to_save_the_first_one_ends_it_and_its_echo_does_not_disturb():
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.noted


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            interruption.hold(print)
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.noted
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back_and_other_threads_do_without():
    before = [signal.getsignal(number) for number in STOPS]

    def elsewhere() -> None:
        with Interruption() as interruption:
            assert not interruption.noted

    with Interruption():
        assert [signal.getsignal(number) for number in STOPS] != before
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert [signal.getsignal(number) for number in STOPS] == before
