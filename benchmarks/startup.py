"""The time before the first result: imports, compilation, the first image; and reading pairs."""

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import Call, process

MODEL = Path(__file__).parent.parent / "instaflow_jax" / "assets" / "openmoji"
_DRAW = """
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
import torch
torch.set_num_threads(2)
pipe = StableDiffusionPipeline.from_pretrained({model!r}, safety_checker=None)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
pipe("red apple", num_inference_steps=25, guidance_scale=3.0, height=32, width=32).images[0].save({to!r})
"""
_PLAIN = "import benchmarks.references as r; r.references()\n"  # makes torchvision importable


def ours(*, cached: bool) -> dict[str, Call]:
    """New processes of ours; `cached`: with the compilation cache of an earlier run, as with the launch scripts."""
    scratch = tempfile.mkdtemp()
    draw = [
        sys.executable,
        "-m",
        "instaflow_jax.main",
        "--config=configs/sample.py",
        f"--workdir={scratch}/runs",
        "--config.prompts=red apple",
        "--config.seeds=(0,)",
    ]
    kept = {"JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled", **_DEFAULTS}
    cold = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    what = "with compilation cache" if cached else "without cache"
    calls = {f"first image of a process, {what}": process(draw, kept if cached else cold)}
    if not cached:
        calls["import the pipeline"] = process([sys.executable, "-c", "from instaflow_jax import pipeline"], {})
    return calls


_DEFAULTS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1.0", "JAX_ENABLE_COMPILATION_CACHE": "true"}


def theirs() -> dict[str, Call]:
    """New processes of PyTorch diffusers with the same model, prompt and number of steps."""
    scratch = tempfile.mkdtemp()
    draw = process([sys.executable, "-c", _PLAIN + _DRAW.format(model=str(MODEL), to=f"{scratch}/apple.png")], _OFFLINE)
    return {
        "first image of a process, without cache": draw,
        "first image of a process, with compilation cache": draw,
        "import the pipeline": process(
            [sys.executable, "-c", _PLAIN + "from diffusers import StableDiffusionPipeline"], _OFFLINE
        ),
    }


_OFFLINE = {"HF_HUB_OFFLINE": "1", "USE_TF": "0", "TRANSFORMERS_VERBOSITY": "error"}


def compiling(*, cached: bool) -> dict[str, Call]:
    """Lowering and compiling the embedded programs; `cached`: with the compilation cache filled by the first run."""
    import jax

    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    jax.config.update("jax_enable_compilation_cache", cached)
    if cached:
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return {title: Call(lambda lower=lower: fresh(jax, lower)) for title, lower in programs(jax).items()}


def fresh(jax, lower):
    """Clears the caches of this process, so that only the cache on disk can help."""
    jax.clear_caches()
    return lower().compile()


def programs(jax) -> dict:
    """Programs that stages compile: the sampler with 25 guided steps, and the reflow step."""
    from benchmarks.training import pairs
    from configs import reflow
    from instaflow_jax import pipeline, sampling
    from instaflow_jax.infra import devices
    from instaflow_jax.train import losses, optim, state, step

    pipe = pipeline.load("openmoji", variant=None, attention="xla")
    data, null, config = pairs(32, pipe.latent_shape, 16), pipe.tokenizer([""]), reflow.get_config()
    dynamics = sampling.read_dynamics(pipe.scheduler, pipe.index, "auto")
    optimizer = optim.make_optimizer(optim.make_schedule(**config.schedule), **config.optim)
    now = state.create(pipe.params["unet"], optimizer)

    def sampler():
        solve = sampling.make_solve(pipe.nets["unet"].apply, dynamics, "auto", 25, 4.0)
        return jax.jit(sampling.make_generate(pipe.nets, solve)).lower(
            pipe.params, data["ids"][:8], null, data["X0"][:8]
        )

    def reflow_step():
        loss = losses.make_reflow_loss(
            pipe.nets["unet"],
            pipe.nets["text_encoder"],
            prompt_dropout=config.prompt_dropout,
            num_timesteps=1000,
            **config.loss,
        )
        mesh = devices.make_mesh(fsdp=1)
        update = step.make_train_step(loss, optimizer, mesh, ema_decay=config.ema_decay, accumulate=1).update
        frozen = {"text_encoder": pipe.params["text_encoder"], "null_ids": null}
        return jax.jit(update).lower(now, frozen, data, jax.random.key(0))

    return {"compile the sampler, embedded": sampler, "compile the reflow step, embedded": reflow_step}


def reading(*, ours: bool, count: int) -> dict[str, Call]:
    """A shuffled pass over stored pairs, with the reader that training uses or with TFDS' own."""
    from benchmarks import pairs
    from instaflow_jax import pipeline

    pipe = pipeline.load("openmoji", variant=None, attention="xla")
    directory = pairs.write(Path(tempfile.mkdtemp()), pipe, count, True)
    rows = (pairs.batches if ours else pairs.tfds_rows)(directory, count)
    return {f"read {count} pairs, shuffled": Call(lambda: sum(rows()), count)}
