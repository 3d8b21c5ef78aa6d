"""A web page: a prompt drawn in one step, beside the teacher at 25, with the seconds that each takes.

    python -m instaflow_jax.main --config=configs/serve.py --workdir=DIR
    python -m instaflow_jax.main --config=configs/serve.py --config.model=DIR_OR_HUB_ID --config.teacher=
    python -m instaflow_jax.main --config=configs/serve.py:instaflow

Needs `pip install -e .[serve]`. Shows DIR/distill/export, the embedded teacher alone until there is one. Compiles first,
then prints the page's address: http://127.0.0.1:7860, which only this machine reaches (--config.host=0.0.0.0 opens it
to others; it knows no passwords). The page fetches nothing from elsewhere.
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
    "openmoji": {"teacher": "openmoji", "teacher_alpha": 3.0},
    "instaflow": {
        "model": "XCLiu/instaflow_0_9B_from_sd_1_5",
        "dynamics": "flow",
        "teacher": common.SD15,
        "teacher_alpha": 7.5,
        **_LARGE,
    },
}


def get_config(variant: str = "openmoji") -> ConfigDict:
    config = common.weights()  # config.model is the one-step model; "" is DIR/distill/export
    config.stage = "serve"
    config.dynamics = "auto"  # flow or teacher, where the directory of config.model does not say it right
    config.alpha = 1.0  # its guidance
    config.N = (1, 2, 4)  # numbers of steps to choose from, each compiled at the start; the first is preset
    config.teacher = ""  # embedded name, directory or hub id of the model beside it; "" is none
    config.teacher_dynamics = "auto"
    config.teacher_N = 25
    config.teacher_alpha = 1.0
    config.examples = ("woman astronaut", "red apple", "cat face", "house", "octopus")  # prompts to click on
    config.max_chars = 500  # the longest prompt
    config.max_pictures = 4  # the most at once
    config.queue = 16  # requests that may wait
    config.host = "127.0.0.1"
    config.port = 7860
    config.update(common.pick(VARIANTS, variant))
    return config.lock()
