"""The models of the page: on the device, compiled, and drawing one image at a time, step by step."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from instaflow_jax import flow, pipeline, sampling, solvers
from instaflow_jax.solvers import Multistep
from instaflow_jax.stages.common import control
from instaflow_jax.stages.common.control import Control, ImageFile
from instaflow_jax.stages.common.loading import check_drawn, name_image

ImageBytes = UInt8[np.ndarray, "H W 3"]
Report = Callable[[int], None]  # is told the number of steps done


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an image is drawn from, beside the model and the condition images.

    Attributes:
      negative: negative prompt; '' for none.
      second_seed, position: the noise is the point at `position` on the way from the noise of `seed` (0) to that of
        `second_seed` (1).
      N: number of solver steps.
      alpha: guidance; 1 is none.
    """

    prompt: str
    seed: int
    N: int
    negative: str = ""
    second_seed: int = 0
    position: float = 0.0
    alpha: float = 1.0


@dataclasses.dataclass(frozen=True)
class Model:
    """A compiled model on the device.

    Attributes:
      title: shown above its images, before the number of steps; '' for the model that the page is about.
      choices: the numbers of solver steps N that it may take.
      max_tokens: tokens that a prompt may have.
      count_tokens: prompt → its number of tokens.
      draw: (settings, condition images, report) → uint8 image [H, W, 3]; raises ValueError if the image is NaN or
        infinite.
      alpha: guidance to start from; a model of 1 or less takes neither guidance nor a negative prompt.
      source: where it came from.
    """

    title: str
    choices: tuple[int, ...]
    max_tokens: int
    count_tokens: Callable[[str], int]
    draw: Callable[[Settings, Sequence[ImageFile], Report], ImageBytes]
    alpha: float = 1.0
    source: str = ""

    @property
    def guided(self) -> bool:
        """Whether it takes guidance and a negative prompt."""
        return self.alpha > 1


def heading(title: str, N: int) -> str:
    """ "one step" or "teacher, 25 steps"."""
    steps = "one step" if N == 1 else f"{N} steps"
    return f"{title}, {steps}" if title else steps


def make_model(
    pipe: pipeline.Pipeline,
    title: str,
    *,
    dynamics: str,
    alpha: float,
    choices: tuple[int, ...],
    controls: Sequence[Control] = (),
    source: str = "",
) -> Model:
    """Puts a pipeline on the device, compiles it, and runs each program once.

    One step of the solver is a program, which serves every number of steps and every guidance above 1, and between two
    of them the page can show how far it is. The batch size is 1, so the seconds shown are those of one image, as in
    the paper's table.
    """
    read = sampling.read_dynamics(pipe.scheduler, pipe.index, dynamics)
    tables = {N: rows_of(sampling.solver_table(read, "auto", N)) for N in choices}
    size = pipe.image_size(pipe.latent_shape)
    blank = [np.zeros((*size, 3), np.uint8)] * len(controls)
    conditions = [control.to_condition(image, *size) for image in blank]
    params = jax.device_put(control.inference_params(pipe, controls, conditions))
    encoder = {"text_encoder": params["text_encoder"]}
    encode, step, decode = make_programs(pipe, controls, guided=alpha > 1)
    start = jax.jit(functools.partial(start_of_walk, shape=pipe.latent_shape))

    def run(settings: Settings, files: Sequence[ImageFile], report: Report) -> tuple[jax.Array, jax.Array]:
        steered = control.with_conditions(params, [control.to_condition(image, *size) for image in files])
        text, null = encode(encoder, pipe.tokenizer([settings.prompt]), pipe.tokenizer([settings.negative]))
        seeds = np.array([settings.seed, settings.second_seed], np.uint32)
        carry = start(seeds, np.float32(settings.position))
        for done, row in enumerate(tables[settings.N], 1):
            carry = jax.block_until_ready(step(steered["unet"], carry, row, text, null, np.float32(settings.alpha)))
            report(done)
        return decode(params["vae"], carry[0])

    def draw(settings: Settings, files: Sequence[ImageFile], report: Report) -> ImageBytes:
        drawn, finite = run(settings, files, report)
        check_drawn(np.asarray(finite), [name_image(settings.prompt, settings.seed)])
        return np.asarray(drawn)[0]

    began = time.perf_counter()
    for N in choices:
        jax.block_until_ready(run(Settings("", 0, N, alpha=alpha), blank, lambda done: None))
    print(f"{title or 'one step'}: compiled in {time.perf_counter() - began:.1f} s", flush=True)
    max_tokens = pipe.tokenizer.model_max_length - 2  # without the tokens that mark the start and the end
    return Model(title, choices, max_tokens, pipe.tokenizer.count, draw, alpha, source)


def make_programs(pipe: pipeline.Pipeline, controls: Sequence[Control], *, guided: bool) -> tuple[Callable, ...]:
    """Three programs: text encoder, one step of the solver, decoder."""
    apply, vae = control.make_apply(pipe, controls), pipe.nets["vae"]

    def encode(params, ids, null_ids):
        return sampling.encode_text(pipe.nets, params, ids, null_ids)

    def step(unet, carry, row, text, null, alpha):
        network = functools.partial(apply, unet)
        bound = flow.always_guided(network, text, null, alpha) if guided else flow.guided(network, text, null, 1.0)
        return solvers.make_step(bound)(carry, row)

    def decode(params, X1):
        return sampling.to_uint8_checked(vae.apply(params, X1, method="decode"))

    return jax.jit(encode), jax.jit(step), jax.jit(decode)


def rows_of(table: Multistep) -> list[Multistep]:
    """The rows of a table, in the types that a step computes with."""
    fields = [table.tau.astype(np.float32 if table.tau.dtype.kind == "f" else np.int32)]
    fields += [field.astype(np.float32) for field in table[1:]]
    return [Multistep(*row) for row in zip(*fields, strict=True)]


def start_of_walk(seeds, position, *, shape):
    """The first argument of a solver's step: the noise at `position` between those of two seeds, and zeros."""
    noise = sampling.noise(seeds, shape)
    X0 = sampling.slerp(noise[:1], noise[1:], position)
    return X0, jnp.zeros_like(X0)
