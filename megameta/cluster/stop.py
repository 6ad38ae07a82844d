"""The request to stop: a time limit, a preemption, a person."""

import signal


class StopRequest:
    """Set by SIGTERM and SIGUSR1, from the moment that ``listen`` is called."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Take these signals. What arrives while the run is being set up counts: one step is made, and saved."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.request)

    def request(self, _number: int, _frame: object) -> None:
        """A signal handler."""
        self.requested = True
