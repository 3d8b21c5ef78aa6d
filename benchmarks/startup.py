"""What one waits for before the first result: imports, compilation, the first picture; and the reading of pairs."""

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
_PLAIN = "import benchmarks.references as r; r.references()\n"  # makes a torchvision of another build importable


def ours(*, cached: bool) -> dict[str, Call]:
    """Fresh processes of ours; `cached`: with the compiled programs of an earlier run, as the launch scripts keep them."""
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
    what = "compiled programs kept" if cached else "nothing kept"
    calls = {f"first picture of a process, {what}": process(draw, kept if cached else cold)}
    if not cached:
        calls["import the pipeline"] = process([sys.executable, "-c", "from instaflow_jax.models import pipeline"], {})
    return calls


_DEFAULTS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1.0", "JAX_ENABLE_COMPILATION_CACHE": "true"}


def theirs() -> dict[str, Call]:
    """Fresh processes of PyTorch diffusers with the same model, prompt and steps."""
    scratch = tempfile.mkdtemp()
    draw = process([sys.executable, "-c", _PLAIN + _DRAW.format(model=str(MODEL), to=f"{scratch}/apple.png")], _OFFLINE)
    return {
        "first picture of a process, nothing kept": draw,
        "first picture of a process, compiled programs kept": draw,
        "import the pipeline": process(
            [sys.executable, "-c", _PLAIN + "from diffusers import StableDiffusionPipeline"], _OFFLINE
        ),
    }


_OFFLINE = {"HF_HUB_OFFLINE": "1", "USE_TF": "0", "TRANSFORMERS_VERBOSITY": "error"}


def compiling(*, cached: bool) -> dict[str, Call]:
    """Lowering and compiling the embedded programs: with `cached` after another process has done it, else from nothing."""
    import jax

    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    jax.config.update("jax_enable_compilation_cache", cached)
    if cached:
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return {title: Call(lambda lower=lower: fresh(jax, lower)) for title, lower in programs(jax).items()}


def fresh(jax, lower):
    """Forgets what this process has compiled, so that only the disk can help."""
    jax.clear_caches()
    return lower().compile()


def programs(jax) -> dict:
    """What stages compile: the sampler of 25 guided steps, and the reflow step."""
    from benchmarks.training import pairs
    from configs import reflow
    from instaflow_jax import pipeline, sampling
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
            steps=1000,
            **config.loss,
        )
        update = step.make_train_step(loss, optimizer, ema_decay=config.ema_decay, accumulate=1).update
        frozen = {"text_encoder": pipe.params["text_encoder"], "null_ids": null}
        return jax.jit(update).lower(now, frozen, data, jax.random.key(0))

    return {"compile the sampler, embedded": sampler, "compile the reflow step, embedded": reflow_step}


def reading(*, ours: bool, count: int) -> dict[str, Call]:
    """A shuffled pass over stored pairs: by the reader that training uses, or by TFDS' own."""
    from benchmarks import pairs
    from instaflow_jax import pipeline

    pipe = pipeline.load("openmoji", variant=None, attention="xla")
    directory = pairs.write(Path(tempfile.mkdtemp()), pipe, count, True)
    rows = (pairs.batches if ours else pairs.tfds_rows)(directory, count)
    return {f"read {count} pairs, shuffled": Call(lambda: sum(rows()), count)}
