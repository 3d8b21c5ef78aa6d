"""Being asked to stop: SIGTERM becomes a question that the loop asks once a step."""

import signal

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """Training was asked to stop and has saved; ends the process with exit code 0."""

    def __init__(self):
        super().__init__(0)


class Preemption:
    """Listens for SIGTERM while it is entered as a context (from the main thread).

    With several processes, whichever is told first, all agree on the same step through JAX's preemption
    service, which needs `jax.distributed` and does its own listening.
    """

    def __init__(self):
        self._told = False

    def __enter__(self) -> "Preemption":
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _tell(self, *_) -> None:
        self._told = True

    def requested(self, step: int) -> bool:
        """Whether to save after this step and end."""
        return self._told if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
