"""Preemption: SIGTERM sets a flag that the training loop reads once a step."""

import signal

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """Training was preempted and has saved its state; ends the process with exit code 0."""

    def __init__(self):
        super().__init__(0)


class Preemption:
    """A context, entered from the main thread, that handles SIGTERM.

    With several processes, the preemption service of `jax.distributed` handles the signal, and all processes stop after
    the same step.
    """

    def __init__(self):
        self._signalled = False

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, *_) -> None:
        self._signalled = True

    def requested(self, step: int) -> bool:
        """Whether to save after this step and stop."""
        return self._signalled if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
