"""The range of every number in a config: one table, which each stage checks before anything else.

A number must also fit the type that computes with it: int32 and float32, unless the table says otherwise.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

_INT = 2**31 - 1
_FLOAT, _TINY, _BELOW_1 = (float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny), 1 - 2.0**-24)
_COUNT, _INDEX, _SHARE, _BELOW, _SCALE = (1, _INT), (0, _INT), (0, 1), (0, _BELOW_1), (0, _FLOAT)
_POSITIVE = (_TINY, _FLOAT)
_PHILOX = (0, 2**64 - 1)  # seeds of `data.noise`; those of jax.random are 32 bits wide

RANGES: dict[str, tuple[float, float]] = {  # last words of STAGE.BLOCK.FIELD → the least and the largest value
    **dict.fromkeys(("N", "teacher_N", "batch", "batch_size", "accumulate", "fsdp", "eval_every", "size"), _COUNT),
    **dict.fromkeys(("loop.steps", "log_every", "save_every", "max_skipped", "keep_last", "total_steps"), _COUNT),
    **dict.fromkeys(("rounds.steps", "eval.seeds", "shard_size", "preview", "neighbours", "repeats"), _COUNT),
    **dict.fromkeys(("max_chars", "max_images", "queue", "copies", "toned_copies", "channels", "consistency"), _COUNT),
    **dict.fromkeys(("height", "width", "count", "profile_steps", "keep_every", "warmup_steps", "max_shift"), _INDEX),
    **dict.fromkeys(("crop", "margin", "processes", "process", "cleaning.min_chars", "cleaning.max_chars"), _INDEX),
    **dict.fromkeys(("ema_decay", "prompt_dropout", "empty", "threshold", "images.share"), _SHARE),
    **dict.fromkeys(("b1", "b2", "match", "smoothing", "max_zoom", "refine.t", "regression"), _BELOW),
    **dict.fromkeys(("alpha", "alphas", "teacher_alpha", "weight_decay", "peak", "schedule.end", "lpips.l2"), _SCALE),
    **dict.fromkeys(("kl_weight", "l1_weight", "matching", "adversarial"), _SCALE),
    **dict.fromkeys(("eps", "min_snr"), _POSITIVE),
    "clip": (_TINY, math.inf),  # inf turns clipping off
    "seed": (0, 2**32 - 1),
    "reflow.k": (2, _INT),  # the 1-rectified flow is the teacher
    "pretrain.seed": (0, 2**32 - 2**20),  # each group of images takes one of the seeds after it
    "sample.seeds": (0, 2**32 - 1),
    "generate.seed": _PHILOX,
    "evaluate_coco.seed": _PHILOX,
    "evaluate.seed": (0, 2**64 - 3),  # the two seeds after it are used too
    "evaluate_coco.data.count": (4, _INT),  # precision and recall need a third neighbour
    "evaluate.count": (2, _INT),  # a covariance needs two images
    "evaluate_coco.paper": (0, 2),
    "straightness.count": (2, _INT),
    "lora.rank": _COUNT,
    "lora.alpha": _POSITIVE,
    "fake.updates": _COUNT,
    "fake.first": _INDEX,
    "points": (2, _INT),
    "port": (0, 2**16 - 1),
    "dollars_per_device_hour": _SCALE,
}
_MAY_BE_EMPTY = ("alphas", "formats", "ranks", "consistency")  # export lists the formats it knows


def check_ranges(config: ConfigDict) -> None:
    """Checks every number and every tuple of a config, those of its blocks and of the chained stages included.

    Raises:
      ValueError: naming the first field that is out of its range, not finite, empty, or too large for its type.
    """
    for name, place, value in _fields(config, "", ""):
        if isinstance(value, list | tuple) and not len(value) and name.split(".")[-1] not in _MAY_BE_EMPTY:
            raise ValueError(f"config.{name}={value} must have at least one value")
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check(name, value, number, _find_range(place))


def _fields(config: ConfigDict, prefix: str, place: str) -> Iterator[tuple[str, str, Any]]:
    """Dotted name of each field, its place (STAGE.BLOCK.FIELD) and its value."""
    place = config.get("stage", place)
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.", f"{place}.{name}")
        else:
            yield prefix + name, f"{place}.{name}", value


def _find_range(place: str) -> tuple[float, float] | None:
    words = place.split(".")
    return next((RANGES[key] for i in range(len(words)) if (key := ".".join(words[i:])) in RANGES), None)


def _check(name: str, value: Any, number: float, bounds: tuple[float, float] | None) -> None:
    least, most = bounds or ((-_INT, _INT) if isinstance(number, int) else (-_FLOAT, _FLOAT))
    if isinstance(number, float):
        with np.errstate(over="ignore"):
            narrow = float(np.float32(number))  # the bounds hold for what the device computes with
        if math.isnan(number) or (math.isinf(number) and not math.isinf(most)):
            raise ValueError(f"config.{name}={value} is not a finite number; use one")
        if (math.isinf(narrow) and not math.isinf(number)) or 0 < abs(number) < _TINY:
            raise ValueError(
                f"config.{name}={value} does not fit into float32; use a number from {_TINY:.3g} to 3.4e+38"
            )
        number = narrow
    if not least <= number <= most:
        rule = f"at least {least:.8g}" if most in (_INT, _FLOAT, math.inf) else f"from {least} to {most}"
        if bounds is None or (most in (_INT, _FLOAT) and number > most):
            rule = f"from {least:.0f} to {most:.0f}"
        raise ValueError(f"config.{name}={value} must be {rule}")
