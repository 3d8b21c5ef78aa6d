"""Stage `control`: a flow and its pairs → a ControlNet that makes the flow follow outlines."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from instaflow_jax import pipeline, sampling
from instaflow_jax.arrays import Params
from instaflow_jax.data.pairs.reader import PairBatches
from instaflow_jax.infra import files, images
from instaflow_jax.models import controlnet
from instaflow_jax.models.controlnet import ControlNetModel
from instaflow_jax.models.net import Net
from instaflow_jax.stages import reflow
from instaflow_jax.stages.common import fit, flow_training, loading
from instaflow_jax.stages.common.control import config_from_unet
from instaflow_jax.stages.generate.stage import check_pairs, has_pairs, need_pairs
from instaflow_jax.train.control import make_control_loss, outline
from instaflow_jax.train.step import Loss
from instaflow_jax.weights.conventions import NUM_TIMESTEPS

_OTHER_NOISE = 1000  # the grid's images start from the seeds after this one, the outlines' images from those after 0


def run(config: ConfigDict, workdir: str) -> None:
    """Trains in `workdir`/`config.output` on `workdir`/pairs, whose images give the outlines.

    First makes what is missing: the flow (if `config.model` is ""), by `reflow` with `config.reflow`, and the pairs.
    Writes the ControlNet to export/ and some outlines to outlines/, for `configs/sample.py`.

    Raises:
      ValueError, FileNotFoundError: a field of the config, the flow or the pairs are wrong.
      OSError, FloatingPointError: see `train.loop`.
    """
    options = read_options(config, workdir)
    if not has_pairs(Path(workdir)) or not (config.model or reflow.is_trained(config.reflow, workdir)):
        check(config, workdir)
    source = config.model or reflow.need(config.reflow, workdir)
    pairs = need_pairs(config.pairs, Path(workdir))
    pipe = loading.load(source, options.weights)
    flow_training.check_fit(pipe, pairs.manifest["recipe"])
    net, directory = make_net(config, options, pipe), Path(workdir) / config.output
    state = fit.train(
        options.train,
        directory,
        init=jax.device_get(controlnet.init_from_unet(net, pipe.params["unet"], jax.random.key(options.train.seed))),
        loss=make_loss(config, options, pipe.nets, net),
        frozen=make_frozen(pipe),
        batches=PairBatches(pairs, batch_size=options.train.batch_size, seed=options.train.seed),
        evaluate=make_evaluate(options.eval, pipe, net, config.threshold),
        cast=net.cast,
    )
    fit.export_ema(state, lambda ema: export(net, ema, directory / loading.EXPORT))


def check(config: ConfigDict, workdir: str) -> None:
    """Every check of `run` and of the stages that it would run first, without training or writing anything.

    Raises:
      ValueError, FileNotFoundError: see `run`.
    """
    options, flow = read_options(config, workdir), None
    if not config.model and not reflow.is_trained(config.reflow, workdir):
        flow = reflow.check(config.reflow, workdir)
    recipe = check_pairs(config.pairs, Path(workdir), None)
    source = config.model or reflow.export_directory(config.reflow, workdir)
    pipe = flow or loading.load(source, options.weights)
    flow_training.check_fit(pipe, recipe)
    fit.check(options.train)
    net = make_net(config, options, pipe)
    loss = make_loss(config, options, pipe.nets, net)
    flow_training.check_loss(options, recipe, loss, net.shapes, make_frozen(pipe))


def read_options(config: ConfigDict, workdir: str) -> flow_training.NetworkOptions:
    """Checks and unpacks the config before anything is loaded. Raises ValueError."""
    options = flow_training.read_network_options(config)
    fit.check_same_run(options.train, Path(workdir) / config.output)
    return options


def make_net(config: ConfigDict, options: flow_training.NetworkOptions, pipe: pipeline.Pipeline) -> Net:
    """The ControlNet of the flow's U-Net.

    Raises:
      ValueError: the model is not a flow with one U-Net, or `config.channels` do not fit its autoencoder.
    """
    unet, factor = pipe.nets["unet"], pipe.nets["vae"].config.factor
    if flow_training.start_dynamics(pipe) != flow_training.FLOW or unet.module is not pipeline.NETWORKS["unet"]:
        raise ValueError("a ControlNet is trained for a flow with one U-Net: use config.model=DIR/reflow/export")
    raw = config_from_unet(unet, tuple(config.channels))
    net = ControlNetModel.from_config(raw, **loading.network_options(options.weights))
    if net.config.factor != factor:
        raise ValueError(
            f"config.channels={tuple(config.channels)} makes images {net.config.factor} times as large as the latents, "
            f"but the autoencoder makes them {factor} times as large: use {factor.bit_length()} numbers"
        )
    return net


def make_loss(config: ConfigDict, options: flow_training.NetworkOptions, nets: Mapping[str, Net], net: Net) -> Loss:
    """The loss of `config.loss`. Raises ValueError for an unknown choice."""
    return make_control_loss(
        nets["unet"].with_remat(options.remat["unet"]),
        net.with_remat(options.remat["unet"]),
        nets["vae"],
        nets["text_encoder"],
        threshold=config.threshold,
        prompt_dropout=options.prompt_dropout,
        num_timesteps=NUM_TIMESTEPS,
        **config.loss,
    )


def make_frozen(pipe: pipeline.Pipeline) -> dict[str, Any]:
    """What the loss reads besides the ControlNet."""
    return flow_training.with_text(pipe, {name: pipe.params[name] for name in ("unet", "vae")})


def export(net: Net, params: Params, directory: Path) -> None:
    """Writes the ControlNet in diffusers layout. Raises ValueError if a weight is NaN or infinite."""
    loading.check_finite(f"the ControlNet for {directory}", params)
    with files.renew_checksums(directory):
        net.save_pretrained(params, directory)
    print(f"wrote the ControlNet to {directory}", flush=True)


# ---------------------------------------------------------------- evaluation


def make_evaluate(options: fit.EvalOptions, pipe: pipeline.Pipeline, net: Net, threshold: float) -> fit.Evaluate:
    """A grid, and how far the outlines of what is drawn are from those that were asked for.

    The flow itself draws the images whose outlines are asked for, with the largest N. Then it draws the same prompts
    from other noise, without the ControlNet and with it. A row of the grid shows, for each seed, the first image, its
    outline, what one step draws without the ControlNet, and what it draws with it for each N.
    """
    prompts, seeds, counts = list(options.prompts), options.seeds, sorted(options.N)
    ids, null_ids = np.repeat(pipe.tokenizer(prompts), seeds, 0), pipe.tokenizer([""])
    first, second = (
        jnp.tile(sampling.noise(np.arange(start, start + seeds), pipe.latent_shape), (len(prompts), 1, 1, 1))
        for start in (0, _OTHER_NOISE)
    )
    apply = controlnet.make_apply(pipe.nets["unet"], [net])
    solves = {N: sampling.make_solve(apply, flow_training.FLOW, "euler", N, options.alpha) for N in counts}
    programs = {N: jax.jit(sampling.make_generate(pipe.nets, solve)) for N, solve in solves.items()}
    names = [loading.name_image(prompt, seed) for prompt in prompts for seed in range(seeds)]
    size = pipe.image_size(pipe.latent_shape)

    def draw(ema, condition, scale: float, N: int, X0) -> np.ndarray:
        part = {"params": ema, "condition": condition, "scale": np.float32(scale)}
        params = pipe.params | {"unet": {"unet": pipe.params["unet"], "controls": [part]}}
        drawn, finite = programs[N](params, ids, null_ids, X0)
        loading.check_drawn(np.asarray(finite), names)
        return np.asarray(drawn)

    def outlines(drawn):
        return np.asarray(outline(images.to_pixels(drawn), threshold))

    def evaluate(ema: Params, path: Path) -> dict[str, float]:
        sources = draw(ema, np.zeros((len(ids), *size, 3), np.float32), 0.0, counts[-1], first)
        asked = outlines(sources)
        without = draw(ema, asked, 0.0, counts[0], second)
        steered = {N: draw(ema, asked, 1.0, N, second) for N in counts}
        columns = [sources, (255 * asked).astype(np.uint8), without, *steered.values()]
        shown = np.stack(columns, 1).reshape(-1, *sources.shape[1:])
        labels = ["image", "outline", "without", *(f"N={N}" for N in counts)] * seeds
        grid = images.grid(shown, columns=len(labels), row_labels=prompts, column_labels=labels, scale=2)
        images.save_png(path, grid, {"prompts": "|".join(prompts), "alpha": str(options.alpha)})
        write_outlines(path.parents[1] / "outlines", prompts, columns[1][::seeds])
        error = {f"outline_error_N{N}": float(np.mean(np.abs(outlines(x) - asked))) for N, x in steered.items()}
        return {"outline_error_without": float(np.mean(np.abs(outlines(without) - asked))), **error}

    return evaluate


def write_outlines(directory: Path, prompts: list[str], drawn: np.ndarray) -> None:
    """The outlines as PNGs named by their prompts, to try in `configs/sample.py`."""
    for prompt, image in zip(prompts, drawn, strict=True):
        slug = re.sub(r"\W+", "-", prompt).strip("-")
        images.save_png(directory / f"{slug}.png", image, {"prompt": prompt})
