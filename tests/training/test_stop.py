import signal

import pytest

from minidoctor.training.stop import StopSignal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_first_signal_requests_a_stop_and_a_second_interrupts(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert not StopSignal().requested


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(number)
            assert not stop.requested
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
