"""Ctrl-C and the end of a job, kept for the moment when a step is done."""

import signal

INTERRUPTED = 130  # the shell's exit code for a command ended by Ctrl-C


class CatchInterrupt:
    """Turn the first Ctrl-C or SIGTERM into a request, `wanted`, that training sees after the step it is in.

    So a step is never cut in half. A second one ends the program at once, as always.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    wanted = False

    def __enter__(self) -> "CatchInterrupt":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, *_) -> None:
        self.wanted = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self._restore()
