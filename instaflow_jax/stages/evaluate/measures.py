"""The measurements of the embedded world, each made once and cached."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from instaflow_jax import __version__, pipeline, sampling
from instaflow_jax.data import prompts
from instaflow_jax.data.noise import noise
from instaflow_jax.data.openmoji.captions import captions
from instaflow_jax.data.openmoji.dataset import Arrays
from instaflow_jax.evals import frechet
from instaflow_jax.evals.diversity import diversity
from instaflow_jax.evals.error_bar import mean_and_error
from instaflow_jax.evals.kid import kid
from instaflow_jax.evals.precision_recall import precision_recall
from instaflow_jax.infra import images
from instaflow_jax.infra.files import sha256_of_json
from instaflow_jax.solvers import Multistep
from instaflow_jax.stages.common.machine import machine
from instaflow_jax.stages.evaluate import path
from instaflow_jax.stages.evaluate.cache import Cache, Record
from instaflow_jax.stages.evaluate.judge import Judge
from instaflow_jax.stages.evaluate.models import Model
from instaflow_jax.stages.evaluate.programs import Programs

_VERSION = 4  # raise it when a measurement changes its meaning, so that cached ones are made again
_LONGEST = 100  # solver steps that the compiled programs have room for
_KID_SUBSETS = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured; see `configs/evaluate.py`."""

    judge: str
    count: int
    seed: int
    neighbours: int
    batch: int
    repeats: int
    straightness_N: int
    straightness_count: int
    shown_prompts: tuple[str, ...]
    path_prompt: str
    path_points: int


class Looked(NamedTuple):
    """Both judges' features of the same images."""

    clip: Float[np.ndarray, "N D"]
    trunk: Float[np.ndarray, "N C"]


class Measurements:
    """Measures models on the same prompts and the same noise.

    The prompts are full names of emoji, drawn without replacement, and the kinds of the same emoji. A name ("woman
    astronaut light skin tone") has one right image; a kind ("a person", "a flag") has hundreds. `seed` draws the
    prompts and the shared noise, `seed + 1` the noise of the teacher's reference images, `seed + 2` that of the images
    shown.

    Every method returns the record, and whether it was cached.
    """

    def __init__(self, options: Options, directory: Path, data: Arrays, teacher: Model):
        """
        Args:
          directory: holds the cache.
          data: all emoji.

        Raises:
          ValueError: there are fewer emoji than prompts asked for.
        """
        self._options, self._teacher = options, teacher
        self._made: dict[Any, Programs] = {}
        count, emoji = options.count, data.emoji
        if not 2 <= count <= len(emoji):
            raise ValueError(f"config.count={count} must be from 2 to {len(emoji)}, the number of emoji")
        self._judge, self._cache = Judge(pipeline.locate(options.judge), data), Cache(directory)
        self._chosen = np.random.default_rng(options.seed).choice(len(emoji), count, replace=False)
        words = [captions(emoji[i]) for i in self._chosen]
        names, kinds, shown = [each["full"] for each in words], [each["kind"] for each in words], options.shown_prompts
        self._kind_words = kinds
        self._names, self._kinds, self._shown = map(teacher.pipe.tokenizer, (names, kinds, list(shown)))
        self._settings = {name: getattr(options, name) for name in ("count", "seed", "judge", "neighbours")} | {
            "version": _VERSION,
            "prompts": prompts.sha256(names + kinds),
            "shown": list(shown),
            "teacher": teacher.weights,
            "teacher_alpha": teacher.alpha,
            "teacher_N": max(teacher.N),
        }

    def _programs(self, model: Model) -> Programs:
        """Models of one architecture share their programs."""
        nets, null_ids = model.pipe.nets, model.pipe.tokenizer([""])
        key = nets["unet"].config
        if key not in self._made:
            self._made[key] = Programs(nets, null_ids, per_device=self._options.batch, longest=_LONGEST)
        return self._made[key]

    def _noise(self, offset: int, count: int) -> Float[np.ndarray, "N h w c"]:
        """Noise of `seed + offset`, from the same generator as that of the pairs."""
        seed, shape = self._options.seed + offset, self._teacher.pipe.latent_shape
        return np.stack([noise(seed, i, shape) for i in range(count)]).astype(np.float32)

    # ------------------------------------------------------------ quality

    def row(self, model: Model, N: int, alpha: float) -> tuple[Record, bool]:
        """Quality of one model at N steps; the array `shown` holds its images of the grid."""
        first = self._teacher, max(self._teacher.N), self._teacher.alpha

        def make() -> Record:
            count, X0 = self._options.count, self._noise(0, self._options.count)
            ids = np.concatenate([self._names, self._kinds, self._shown])
            X0 = np.concatenate([X0, X0, self._noise(2, len(self._shown))])
            latents, drawn = self._programs(model).draw(model, model.table(N), alpha, ids, X0)
            of_names, of_kinds, shown = np.split(drawn, [count, 2 * count])
            is_first, latents = model is first[0] and (N, alpha) == first[1:], latents[: 2 * count]
            error = np.square(latents - (latents if is_first else self.row(*first)[0].arrays["latents"]))
            reference = _load(self.reference()[0], "latents")
            numbers = self._quality(self._look(of_names)) | {
                "fd_latents": frechet.distance(_moments(latents[:count].reshape(count, -1)), reference),
                **self._quality_of_kinds(self._look(of_kinds)),
                "error_names": float(error[:count].mean()),
                "error_kinds": float(error[count:].mean()),
            }
            return Record(numbers, {"shown": shown} | ({"latents": latents} if is_first else {}))

        settings = {"what": "row", "weights": model.weights, "N": N, "alpha": alpha}
        return self._cache.get(self._settings | settings, make)

    def real(self, decoded: bool) -> tuple[Record, bool]:
        """Quality of the prompted emoji's own images, or of what the autoencoder makes of them: the best possible."""

        def make() -> Record:
            real = self._judge.data.images[self._chosen]
            looked = self._look(self._through_autoencoder(real) if decoded else real)
            return Record(self._quality(looked) | self._quality_of_kinds(looked), {})  # they show the kinds too

        return self._cache.get(self._settings | {"what": "real", "decoded": decoded}, make)

    def reference(self) -> tuple[Record, bool]:
        """Mean and covariance of the teacher's images (CLIP's features) and latents, from noise of `seed + 1`."""
        model, count, N = self._teacher, self._options.count, max(self._teacher.N)

        def make() -> Record:
            latents, drawn = self._programs(model).draw(
                model, model.table(N), model.alpha, self._names, self._noise(1, count)
            )
            parts = {"images": self._judge.image_features(drawn), "latents": latents.reshape(count, -1)}
            fields = {name: dataclasses.asdict(_moments(part)) for name, part in parts.items()}
            arrays = {f"{name}_{key}": np.asarray(x) for name, each in fields.items() for key, x in each.items()}
            return Record({"count": count}, arrays)

        return self._cache.get(self._settings | {"what": "reference", "N": N}, make)

    def _look(self, drawn: UInt8[np.ndarray, "N H W 3"]) -> Looked:
        return Looked(self._judge.image_features(drawn), self._judge.trunk_features(drawn))

    def _quality(self, looked: Looked) -> dict[str, float]:
        features, real = looked.clip, self._judge.real
        precision, recall = precision_recall(real[self._chosen], features, self._options.neighbours)
        return self._judge.scores(features, self._chosen) | {
            "fd_emoji": self._distance(features),
            "fd_trunk": frechet.distance(_moments(looked.trunk), self._real_trunk),
            "fd_teacher": frechet.distance(_moments(features), _load(self.reference()[0], "images")),
            "kid": kid(features, real, subsets=_KID_SUBSETS)[0],
            "precision": precision,
            "recall": recall,
        }

    def _quality_of_kinds(self, looked: Looked) -> dict[str, float]:
        """What is measured of images of the prompted kinds."""
        distances = {
            "fd_kinds": self._distance(looked.clip),
            "fd_trunk_kinds": frechet.distance(_moments(looked.trunk), self._real_trunk),
        }
        spread = diversity(looked.clip, self._kind_words)
        return distances | ({} if np.isnan(spread) else {"diversity": spread})  # too few prompts

    @functools.cached_property
    def _real_trunk(self) -> frechet.Moments:
        return _moments(self._judge.real_trunk)

    def _distance(self, features: Float[np.ndarray, "N D"]) -> float:
        return frechet.distance(_moments(features), self._real)

    @functools.cached_property
    def _real(self) -> frechet.Moments:
        return _moments(self._judge.real)

    def _through_autoencoder(self, real: UInt8[np.ndarray, "N H W 3"]) -> UInt8[np.ndarray, "N H W 3"]:
        net, params = self._teacher.pipe.nets["vae"], self._teacher.pipe.params["vae"]
        program = jax.jit(lambda params, pixels: images.to_uint8(net.apply(params, pixels)))
        return np.asarray(program(params, images.to_pixels(real)))

    # ------------------------------------------------------------ straightness and speed

    def straightness(self, model: Model) -> tuple[Record, bool]:
        """S and its standard error, with the model's own guidance."""
        N, count = self._options.straightness_N, min(self._options.straightness_count, self._options.count)

        def make() -> Record:
            S = self._programs(model).straightness(model, model.alpha, N, self._names[:count], self._noise(0, count))
            return Record(dict(zip(("S", "S_error"), mean_and_error(np.asarray(S)), strict=True)), {})

        settings = {"what": "straightness", "weights": model.weights, "alpha": model.alpha, "N": N, "samples": count}
        return self._cache.get(self._settings | settings, make)

    def seconds(self, model: Model, N: int) -> tuple[Record, bool]:
        """Seconds an image; they do not depend on the weights, so each dynamics, N and guidance is measured once."""

        def make() -> Record:
            inputs = model.table(N), model.alpha, self._names[:1], self._noise(2, 1)
            return Record({"seconds": self._programs(model).seconds(model, *inputs, self._options.repeats)}, {})

        settings = {
            "what": "seconds",
            "flow": isinstance(model.dynamics, sampling.Flow),
            "guided": model.alpha > 1,
            "N": N,
            "networks": sha256_of_json({name: net.raw_config for name, net in model.pipe.nets.items()}),
        }
        return self._cache.get(settings | {"machine": machine(), "code": __version__, "version": _VERSION}, make)

    # ------------------------------------------------------------ trajectories

    def path(self, model: Model, N: int) -> tuple[Record, bool]:
        """One image on its way: arrays `t` [P], and `until` and `endpoint` [P, H, W, 3] (see evaluate/path.py)."""
        options = self._options

        def make() -> Record:
            stops = path.stops(model, N, options.path_points)
            arrays = {
                name: np.concatenate([self._draw_path(model, make_table(model, N, stop)) for stop in stops])
                for name, make_table in (("until", path.until), ("endpoint", path.endpoint))
            }
            return Record({"N": N}, {"t": np.array([stop.t for stop in stops])} | arrays)

        settings = {"what": "path", "weights": model.weights, "alpha": model.alpha, "N": N, "version": _VERSION}
        settings |= {"seed": options.seed, "prompt": options.path_prompt, "points": options.path_points}
        return self._cache.get(settings, make)

    def _draw_path(self, model: Model, table: Multistep) -> UInt8[np.ndarray, "1 H W 3"]:
        ids = model.pipe.tokenizer([self._options.path_prompt])
        return self._programs(model).draw_one(model, table, model.alpha, ids, self._noise(2, 1))


def _moments(features: Float[np.ndarray, "N D"]) -> frechet.Moments:
    return frechet.Moments.empty(features.shape[1]).add(features)


def _load(record: Record, name: str) -> frechet.Moments:
    """The moments `name` that `Measurements.reference` stored."""
    count, mean, covariance = (record.arrays[f"{name}_{field}"] for field in ("count", "mean", "covariance"))
    return frechet.Moments(int(count), mean, covariance)
