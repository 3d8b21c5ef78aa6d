"""A web page that draws a prompt in one step beside the teacher at 25, with the seconds each takes.

    python -m instaflow_jax.main --config=configs/serve.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/serve.py --config.model=DIR_OR_HUB_ID --config.teacher=
    python -m instaflow_jax.main --config=configs/serve.py:instaflow

Needs `pip install -e '.[serve]'`. Shows DIR/distill/export, or the embedded teacher alone until that exists. Compiles
first, then prints the page's address: http://127.0.0.1:7860, which only this machine reaches (--config.host=0.0.0.0
opens it to others; there are no passwords). The page loads nothing from other servers.
"""

from ml_collections import ConfigDict

from configs import common

_LARGE = {
    "dtype": "bfloat16",
    "examples": (
        "a photograph of a fox in the snow",
        "a red barn, oil on canvas",
        "an astronaut riding a horse",
        "a bowl of lemons by a window",
    ),
}
VARIANTS = {
    "openmoji": {"teacher": "openmoji", "teacher_alpha": 2.0},
    "instaflow": {
        "model": "XCLiu/instaflow_0_9B_from_sd_1_5",
        "dynamics": "flow",
        "teacher": common.SD15,
        "teacher_alpha": 7.5,
        **_LARGE,
    },
}


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = common.weights()  # of config.model, the one-step model; "" is DIR/distill/export
    config.stage = "serve"
    config.dynamics = "auto"  # or flow or teacher, where the model's files do not say it
    config.alpha = 1.0  # guidance of config.model; above 1 visitors may change it, and give a negative prompt
    config.N = (1, 2, 4)  # solver steps to choose from, each compiled at the start; the first is the default
    config.teacher = ""  # embedded name, directory or hub id of the model beside it; "" for none
    config.teacher_dynamics = "auto"
    config.teacher_N = 25
    config.teacher_alpha = 1.0  # as config.alpha
    config.controls = ""  # ControlNets of both models, as in configs/sample.py; the page asks for an image for each
    config.examples = ("woman astronaut", "red apple", "cat face", "house", "octopus")  # prompts to click on
    config.max_chars = 500  # characters of a prompt
    config.max_images = 4  # of one request
    config.queue = 16  # requests that may wait
    config.host = "127.0.0.1"
    config.port = 7860
    config.update(common.pick(VARIANTS, variant))
    return config.lock()
