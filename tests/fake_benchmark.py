"""Sides without a model, for the tests of the benchmark harness; their processes import this module quickly."""

import numpy as np

from benchmarks.timing import Call


def fake(*, memory: int, done: str = "") -> dict[str, Call]:
    """A side without a model."""
    held = []

    def work():
        held.append(np.ones(memory, np.uint8))
        if done:
            with open(done, "a") as file:
                file.write(f"{memory}\n")
        held.clear()

    return {"work": Call(work, 3, 1e6), f"only of {memory}": Call(work)}


def failing() -> dict[str, Call]:
    return {"work": Call(lambda: 1 / 0)}
