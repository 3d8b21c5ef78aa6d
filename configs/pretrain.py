"""The networks of the embedded world, trained from nothing on OpenMoji.

    python -m instaflow_jax.main --config=configs/pretrain.py:autoencoder --workdir=DIR
    python -m instaflow_jax.main --config=configs/pretrain.py:diffusion --workdir=DIR --config.autoencoder=DIR/export
    python -m instaflow_jax.main --config=configs/pretrain.py:clip --workdir=DIR
    python -m instaflow_jax.main --config=configs/pretrain.py:classifier --workdir=DIR

Each may be killed and started again, and writes DIR/export/..., which is what `instaflow_jax/assets/openmoji` holds
(`cp -r DIR/export/* instaflow_jax/assets/openmoji/` puts a new one there; the READMEs stay). On two CPU cores the
four train 146, some 150 to 200, 250 and 410 pictures/s (the last two beside other work): an hour each for the first and
second, less for the others. Measured on what is shipped: see the cards.
"""

from ml_collections import ConfigDict

from configs import common

PROMPTS = (
    "woman astronaut",
    "red apple",
    "cat face",
    "house",
    "astronaut",
    "man farmer dark skin tone",
    "rocket",
    "flag of japan",
    "grinning face",
    "octopus",
    "a face",
    "an animal",
)


def get_config(variant: str = "diffusion") -> ConfigDict:
    config = training()
    config.recipe = variant
    common.pick(VARIANTS, variant)(config)
    return config.lock()


def training() -> ConfigDict:
    config = ConfigDict()
    config.stage = "pretrain"
    config.data_dir = ""  # where the emoji are, or are drawn to; "" is WORKDIR/data
    config.size = 32  # pixels
    config.seed = 0
    config.augment = {"max_shift": 1, "max_zoom": 0.05}  # pixels each way; scale 1 ± max_zoom
    config.batch_size = 64
    config.accumulate = 1  # micro-batches a batch is cut into
    config.fsdp = 1  # devices that hold one copy of the state between them
    config.ema_decay = 0.999
    config.optim = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0}
    config.loop = {"steps": 1, "log_every": 50, "save_every": 500, "max_skipped": 10, "profile_steps": (0, 0)}
    config.schedule = {
        "name": "cosine",
        "peak": 1e-3,
        "warmup_steps": 200,
        "end": 1e-5,
        "total_steps": config.loop.get_ref("steps"),
    }
    config.checkpoints = {"keep_last": 2, "keep_every": 0}
    config.eval_every = 500  # steps between looks at the running mean: a grid of pictures and a few numbers
    config.tensorboard = False
    return config


def autoencoder(config: ConfigDict) -> None:
    config.batch_size = 32
    config.ema_decay = 0.998
    config.schedule.peak = 3e-3
    config.augment = {"max_shift": 2, "max_zoom": 0.15}  # and turned and recoloured, which no other network is shown
    config.loop.steps = 8000
    config.loss = {"kl_weight": 1e-6, "l1_weight": 0.02}
    config.model = {
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "sample_size": 32,
        "scaling_factor": 1.0,
        "act_fn": "silu",  # the factor is measured when training ends
    }


def diffusion(config: ConfigDict) -> None:
    config.autoencoder = "openmoji"  # directory with vae/, or the embedded one
    config.empty = 0.1  # share of empty captions, for guidance
    config.copies = 3  # how often an epoch shows an emoji, every time but the first scaled a little
    config.toned_copies = 1  # ... one with a skin tone in its name: these are half of all
    config.augment = {"max_shift": 0, "max_zoom": 0.03}
    config.loss = {"min_snr": 5.0}
    config.loop.steps = 12000
    config.eval_every = 500
    config.eval = {"prompts": PROMPTS, "seeds": 8, "N": 25, "alpha": 3.0}
    config.scheduler = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.39.0",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "skip_prk_steps": True,
        "trained_betas": None,
        "clip_sample": False,
        "prediction_type": "epsilon",
    }
    config.text_encoder = text_tower(layers=2)
    config.unet = {
        "sample_size": 8,
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": 128,
        "attention_head_dim": (2, 3),
        "norm_num_groups": 16,
        "act_fn": "silu",
        "use_linear_projection": True,
    }


def clip(config: ConfigDict) -> None:
    config.batch_size = 128
    config.empty = 0.02
    config.ema_decay = 0.995
    config.optim.update({"b2": 0.98, "eps": 1e-6, "weight_decay": 0.05})
    config.loop.steps = 2000
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
    }
    config.model = {
        "projection_dim": 128,
        "logit_scale_init_value": 2.6592,
        "text_config": text_tower(layers=2),
        "vision_config": vision,
    }


def classifier(config: ConfigDict) -> None:
    config.ema_decay = 0.995
    config.optim.weight_decay = 0.05
    config.loop.steps = 2500
    config.loss = {"smoothing": 0.1}
    config.model = {"net": "vgg", "widths": (16, 32, 64, 96), "depths": (2, 2, 2, 2)}


def text_tower(layers: int) -> dict:
    """A CLIP text encoder for the embedded tokenizer: 2,048 tokens, prompts of 16."""
    return {
        "model_type": "clip_text_model",
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 512,
        "projection_dim": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 2046,
        "eos_token_id": 2047,
        "pad_token_id": 2047,
    }


VARIANTS = {"autoencoder": autoencoder, "diffusion": diffusion, "clip": clip, "classifier": classifier}
