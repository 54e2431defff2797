"""Stopping a run after the current step, so that neither Ctrl-C nor a closed terminal loses a step."""

import signal


class StopSignal:
    """A context in which Ctrl-C, SIGTERM and SIGHUP set `requested`. A second one raises KeyboardInterrupt."""

    requested = False

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        if self.previous[signal.SIGHUP] == signal.SIG_IGN:  # ignored by `nohup`, which keeps the run alive
            del self.previous[signal.SIGHUP]
        for number in self.previous:
            signal.signal(number, self.request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def request(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
