"""The networks of the embedded world, trained from scratch on OpenMoji.

    python -m instaflow_jax.main --config=configs/pretrain.py:autoencoder --workdir=DIR
    python -m instaflow_jax.main --config=configs/pretrain.py:diffusion --workdir=DIR --config.autoencoder=DIR/export
    python -m instaflow_jax.main --config=configs/pretrain.py:clip --workdir=DIR
    python -m instaflow_jax.main --config=configs/pretrain.py:classifier --workdir=DIR

Needs the packages that draw the emoji. Each command can be interrupted and restarted, and writes DIR/export/..., as
`instaflow_jax/assets/openmoji` holds it; `cp -r DIR/export/* instaflow_jax/assets/openmoji/` installs new networks
there and leaves the model cards alone.
Measured on two CPU cores: the four train on 146, about 150 to 200, 250 and 410 images/s (the last two while other
programs were running): an hour each for the first two, less for the others. The cards have their scores.
"""

from ml_collections import ConfigDict

from configs import common

PROMPTS = ("woman astronaut", "red apple", "cat face", "house", "astronaut", "man farmer dark skin tone")
PROMPTS += ("rocket", "flag of japan", "grinning face", "octopus", "a face", "an animal")


def get_config(variant: str = "diffusion") -> ConfigDict:
    config = training()
    config.recipe = variant
    common.pick(VARIANTS, variant)(config)
    return config.lock()


def training() -> ConfigDict:
    config = common.training()
    config.stage = "pretrain"
    config.data_dir = ""  # folder of the drawn emoji, filled on first use; "" is WORKDIR/data
    config.size = 32  # pixels
    config.augment = {"max_shift": 1, "max_zoom": 0.05}  # pixels in each direction; scale 1 ± max_zoom
    config.ema_decay = 0.999
    config.optim.b2 = 0.99
    config.loop.save_every = config.eval_every = 500
    config.schedule = common.cosine(config, peak=1e-3, warmup_steps=200, end=1e-5)
    config.tensorboard = False
    return config


def autoencoder(config: ConfigDict) -> None:
    config.batch_size = 32
    config.ema_decay = 0.998
    config.schedule.peak = 3e-3
    config.augment = {"max_shift": 2, "max_zoom": 0.15}  # this recipe also turns and recolours the images
    config.loop.steps = 8000
    config.loss = {"kl_weight": 1e-6, "l1_weight": 0.02}
    config.model = {"sample_size": 32, "latent_channels": 8, "block_out_channels": (16, 32, 64), "layers_per_block": 1}
    config.model.update({"norm_num_groups": 8, "act_fn": "silu", "down_block_types": ("DownEncoderBlock2D",) * 3})
    config.model.update({"up_block_types": ("UpDecoderBlock2D",) * 3, "scaling_factor": 1.0})  # measured at the export


def diffusion(config: ConfigDict) -> None:
    config.autoencoder = "openmoji"  # embedded name, or directory with vae/
    config.empty = 0.1  # share of empty captions, for guidance
    config.copies = 3  # times that an epoch shows an emoji, slightly scaled every time but the first
    config.toned_copies = 1  # ... if its name has a skin tone, as half of them do
    config.augment = {"max_shift": 0, "max_zoom": 0.03}
    config.loss = {"min_snr": 5.0}
    config.loop.steps = 12000
    config.eval = {"prompts": PROMPTS, "seeds": 8, "N": 25, "alpha": 3.0}
    config.scheduler = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.39.0", "num_train_timesteps": 1000}
    config.scheduler.update({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    config.scheduler.update({"prediction_type": "epsilon", "steps_offset": 1, "set_alpha_to_one": False})
    config.scheduler.update({"skip_prk_steps": True, "clip_sample": False})
    config.scheduler.trained_betas = None
    config.text_encoder = text_tower(layers=2)
    config.unet = {"sample_size": 8, "in_channels": 8, "out_channels": 8, "block_out_channels": (64, 96)}
    config.unet.update({"layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D",) * 2, "act_fn": "silu"})
    config.unet.update({"up_block_types": ("CrossAttnUpBlock2D",) * 2, "attention_head_dim": (2, 3)})
    config.unet.update({"cross_attention_dim": 128, "norm_num_groups": 16, "use_linear_projection": True})


def clip(config: ConfigDict) -> None:
    config.batch_size = 128
    config.empty = 0.02
    config.ema_decay = 0.995
    config.optim.update({"b2": 0.98, "eps": 1e-6, "weight_decay": 0.05})
    config.loop.steps = 2000
    vision = tower("clip_vision_model", layers=4) | {"image_size": 32, "patch_size": 8, "num_channels": 3}
    config.model = {"projection_dim": 128, "logit_scale_init_value": 2.6592}
    config.model.update({"text_config": text_tower(layers=2), "vision_config": vision})


def classifier(config: ConfigDict) -> None:
    config.ema_decay = 0.995
    config.optim.weight_decay = 0.05
    config.loop.steps = 2500
    config.loss = {"smoothing": 0.1}
    config.model = {"net": "vgg", "widths": (16, 32, 64, 96), "depths": (2, 2, 2, 2)}


def tower(model_type: str, layers: int) -> dict:
    """One of CLIP's transformers, 128 wide."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "projection_dim": 128, "num_attention_heads": 4}
    kind = {"model_type": model_type, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    return sizes | kind | {"num_hidden_layers": layers}


def text_tower(layers: int) -> dict:
    """A CLIP text encoder for the embedded tokenizer: 2,048 tokens, prompts of 16."""
    tokenizer = {"vocab_size": 2048, "max_position_embeddings": 16}
    tokenizer |= {"bos_token_id": 2046, "eos_token_id": 2047, "pad_token_id": 2047}
    return tower("clip_text_model", layers) | tokenizer


VARIANTS = {"autoencoder": autoencoder, "diffusion": diffusion, "clip": clip, "classifier": classifier}
