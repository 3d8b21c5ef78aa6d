"""The measurements of the embedded world, each made once and kept (`evaluate_store`)."""

import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.data import prompts
from instaflow_jax.data.noise import noise
from instaflow_jax.data.openmoji import dataset as openmoji
from instaflow_jax.data.openmoji.captions import captions
from instaflow_jax.evals import frechet, straightness
from instaflow_jax.evals import kid as kernel
from instaflow_jax.evals import precision_recall as neighbours
from instaflow_jax.infra.files import sha256_of_json
from instaflow_jax.stages.evaluate import path as evaluate_path
from instaflow_jax.stages.evaluate.cache import Record, Store
from instaflow_jax.stages.evaluate.judge import Judge
from instaflow_jax.stages.evaluate.models import Model
from instaflow_jax.stages.evaluate.programs import Programs
from instaflow_jax.stages.pretrain.recipe import to_pixels

_VERSION = 2  # raise it when a measurement changes its meaning, so that kept ones are made again
_LONGEST = 100  # solver steps that the compiled programs have room for
_KID_SUBSETS = 20


class Bench:
    """Measures models on the same prompts and the same noise: names of emoji drawn without replacement, and their kinds.

    A name ("woman astronaut light skin tone") is one picture; a kind ("a person", "a flag") has hundreds of right ones.
    Of the seeds from `config.seed` on, the first is that noise's, the second that of the teacher's pictures which others
    are compared with, the third that of the pictures shown.
    """

    def __init__(self, config: ConfigDict, workdir: Path, teacher: Model):
        self._config, self._teacher = config, teacher
        self._judge = Judge(pipeline.locate(config.judge), openmoji.load(config.data_dir or workdir / "data"))
        self._store = Store(workdir / "evaluate" / "measured")
        emoji = self._judge.data.emoji
        if not 2 <= config.count <= len(emoji):
            raise ValueError(f"config.count={config.count} must be 2 to the {len(emoji)} emoji there are")
        self._chosen = np.random.default_rng(config.seed).choice(len(emoji), config.count, replace=False)
        words = [captions(emoji[i]) for i in self._chosen]
        names, kinds = [each["full"] for each in words], [each["kind"] for each in words]
        self._shown, self._names, self._kinds = map(teacher.pipe.tokenizer, (list(config.show.prompts), names, kinds))
        self._settings = {
            "version": _VERSION,
            "count": config.count,
            "seed": config.seed,
            "prompts": prompts.sha256(names + kinds),
            "shown": list(config.show.prompts),
            "judge": config.judge,
            "neighbours": config.neighbours,
            "teacher": teacher.weights,
            "teacher_alpha": teacher.alpha,
            "teacher_N": max(teacher.steps),
        }

    @functools.cached_property
    def _programs(self) -> Programs:
        pipe = self._teacher.pipe
        return Programs(pipe.nets, pipe.tokenizer([""]), per_device=self._config.batch, longest=_LONGEST)

    def _noise(self, seed: int, count: int) -> Float[np.ndarray, "N h w c"]:
        """Of other seeds than the pairs', by the same generator."""
        return np.stack([noise(seed, i, self._teacher.pipe.latent_shape) for i in range(count)]).astype(np.float32)

    # ------------------------------------------------------------ quality

    def row(self, model: Model, N: int, alpha: float) -> tuple[Record, bool]:
        """Quality of one model at N steps; its array `shown` holds the pictures of the grid."""
        first = self._teacher, max(self._teacher.steps), self._teacher.alpha

        def make() -> Record:
            count = self._config.count
            X0 = self._noise(self._config.seed, count)
            ids, X0 = (
                np.concatenate([self._names, self._kinds, self._shown]),
                np.concatenate([X0, X0, self._noise(self._config.seed + 2, len(self._shown))]),
            )
            latents, pictures = self._programs.draw(model, model.table(N), alpha, ids, X0)
            named, of_kinds, shown = np.split(pictures, [count, 2 * count])
            is_first, latents = model is first[0] and (N, alpha) == first[1:], latents[: 2 * count]
            error = np.square(latents - (latents if is_first else self.row(*first)[0].arrays["latents"]))
            numbers = (
                self._quality(named)
                | self._latent_distance(latents[:count])
                | {
                    "fd_kinds": self._distance(self._judge.look(of_kinds)),
                    "error_names": float(error[:count].mean()),
                    "error_kinds": float(error[count:].mean()),
                }
            )
            return Record(numbers, {"shown": shown} | ({"latents": latents} if is_first else {}))

        settings = {"what": "row", "weights": model.weights, "N": N, "alpha": alpha}
        return self._store.get(self._settings | settings, make)

    def real(self, decoded: bool) -> tuple[Record, bool]:
        """The pictures of the prompted emoji themselves, or as the autoencoder gives them back: the best possible."""

        def make() -> Record:
            images = self._judge.data.images[self._chosen]
            numbers = self._quality(self._through_autoencoder(images) if decoded else images)
            return Record(numbers | {"fd_kinds": numbers["fd_emoji"]}, {})  # they are of those kinds too

        return self._store.get(self._settings | {"what": "real", "decoded": decoded}, make)

    def _quality(self, pictures: UInt8[np.ndarray, "N H W 3"]) -> dict[str, float]:
        features, real = self._judge.look(pictures), self._judge.pictures
        reference = self.reference()[0].arrays
        precision, recall = neighbours.precision_recall(real[self._chosen], features, self._config.neighbours)
        return self._judge.scores(features, self._chosen) | {
            "fd_emoji": self._distance(features),
            "fd_teacher": frechet.distance(_moments(features), _kept(reference, "pictures")),
            "kid": kernel.kid(features, real, subsets=_KID_SUBSETS)[0],
            "precision": precision,
            "recall": recall,
        }

    def _distance(self, features: Float[np.ndarray, "N D"]) -> float:
        return frechet.distance(_moments(features), self._real)

    @functools.cached_property
    def _real(self) -> frechet.Moments:
        return _moments(self._judge.pictures)

    def _latent_distance(self, latents: Float[np.ndarray, "N h w c"]) -> dict[str, float]:
        return {
            "fd_latents": frechet.distance(
                _moments(latents.reshape(len(latents), -1)), _kept(self.reference()[0].arrays, "latents")
            )
        }

    def reference(self) -> tuple[Record, bool]:
        """Mean and covariance of the teacher's pictures (in CLIP) and latents from noise of the next seed."""

        def make() -> Record:
            model, count = self._teacher, self._config.count
            X0 = self._noise(self._config.seed + 1, count)
            latents, pictures = self._programs.draw(model, model.table(max(model.steps)), model.alpha, self._names, X0)
            found = {"pictures": _moments(self._judge.look(pictures)), "latents": _moments(latents.reshape(count, -1))}
            return Record(
                {"count": count},
                {
                    f"{name}_{field}": getattr(each, field)
                    for name, each in found.items()
                    for field in ("count", "mean", "covariance")
                },
            )

        N = max(self._teacher.steps)
        return self._store.get(self._settings | {"what": "reference", "N": N}, make)

    def _through_autoencoder(self, images: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
        net, params = self._teacher.pipe.nets["vae"], self._teacher.pipe.params["vae"]
        again = jax.jit(lambda params, pixels: images.to_uint8(net.apply(params, pixels)))
        return np.asarray(again(params, to_pixels(images)))

    # ------------------------------------------------------------ straightness and speed

    def straightness(self, model: Model) -> tuple[Record, bool]:
        """S and its standard error, with the model's own guidance."""
        N, count = self._config.straightness.N, min(self._config.straightness.count, self._config.count)

        def make() -> Record:
            ids, X0 = self._names[:count], self._noise(self._config.seed, count)
            S, error = straightness.summary(self._programs.straightness(model, model.alpha, N, ids, X0))
            return Record({"S": S, "S_error": error, "S_samples": count, "S_steps": N}, {})

        settings = {
            "what": "straightness",
            "weights": model.weights,
            "alpha": model.alpha,
            "steps": N,
            "samples": count,
        }
        return self._store.get(self._settings | settings, make)

    def seconds(self, model: Model, N: int) -> tuple[Record, bool]:
        """Seconds a picture; the same for all weights of one kind, so measured once for each kind, N and guidance."""

        def make() -> Record:
            ids, X0 = self._names[:1], self._noise(self._config.seed + 2, 1)
            return Record(
                {"seconds": self._programs.seconds(model, model.table(N), model.alpha, ids, X0, self._config.repeats)},
                {},
            )

        kind = {
            "what": "seconds",
            "flow": isinstance(model.dynamics, sampling.Flow),
            "guided": model.alpha > 1,
            "N": N,
            "networks": sha256_of_json({name: net.raw_config for name, net in model.pipe.nets.items()}),
        }
        return self._store.get(kind | {"machine": machine(), "version": _VERSION}, make)

    # ------------------------------------------------------------ trajectories

    def path(self, model: Model, N: int) -> tuple[Record, bool]:
        """One picture on its way: arrays `t` [P], `on_the_way` and `foreseen` [P, H, W, 3]."""

        def make() -> Record:
            stops = evaluate_path.stops(model, N, self._config.show.points)
            kinds = {"on_the_way": evaluate_path.on_the_way, "foreseen": evaluate_path.foreseen}
            pictures = {
                name: np.concatenate([self._draw_path(model, kind(model, N, stop)) for stop in stops])
                for name, kind in kinds.items()
            }
            return Record({"N": N}, {"t": np.array([stop.t for stop in stops])} | pictures)

        settings = {
            "what": "path",
            "weights": model.weights,
            "alpha": model.alpha,
            "N": N,
            "version": _VERSION,
            "seed": self._config.seed,
            "prompt": self._config.show.path,
            "points": self._config.show.points,
        }
        return self._store.get(settings, make)

    def _draw_path(self, model: Model, table) -> UInt8[np.ndarray, "1 H W 3"]:
        ids = model.pipe.tokenizer([self._config.show.path])
        return self._programs.draw_one(model, table, model.alpha, ids, self._noise(self._config.seed + 2, 1))


def _moments(features: Float[np.ndarray, "N D"]) -> frechet.Moments:
    return frechet.Moments.empty(features.shape[1]).add(features)


def _kept(arrays: Mapping[str, np.ndarray], name: str) -> frechet.Moments:
    return frechet.Moments(int(arrays[f"{name}_count"]), arrays[f"{name}_mean"], arrays[f"{name}_covariance"])


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "devices": jax.device_count(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}"
