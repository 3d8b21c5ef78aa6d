"""How a flow is written for other programs: conventions for the sign and timestep of its UNet.

"stock": the UNet predicts noise − data, and diffusers' own DPM-Solver++ scheduler integrates it.
"released": as in the authors' checkpoints, the UNet predicts X1 − X0 at timestep 1000·(1 − t). The scheduler file is
still the teacher's; only the class name in `model_index.json` says that the UNet is a flow.
"single file": the UNet predicts noise − data at timestep 1000·(1 − t), as ComfyUI's `ModelSamplingSD3` takes it.
"""

from collections.abc import Mapping
from typing import Any

from instaflow_jax.arrays import Params

NUM_TIMESTEPS = 1000  # timestep that the released flows are given at noise (t = 0)
Index = Mapping[str, Any]  # content of model_index.json


def as_teacher(index: Index) -> dict[str, Any]:
    """The index with diffusers' own pipeline class; weights and scheduler stay as they are."""
    return dict(index) | {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}


def as_released(index: Index, num_timesteps: int) -> dict[str, Any]:
    """The index of a flow in the released convention; weights and scheduler stay as they are.

    Raises:
      ValueError: the flow has another number of timesteps.
    """
    way_out = "use config.convention='stock' and leave 'msgpack' out of config.formats"
    _check_timesteps("the released convention", num_timesteps, way_out)
    return dict(index) | {"_class_name": "RectifiedFlowPipeline"}


def _check_timesteps(what: str, num_timesteps: int, way_out: str) -> None:
    """Raises ValueError if a flow has another number of timesteps than the released ones."""
    if num_timesteps != NUM_TIMESTEPS:
        raise ValueError(
            f"{what} has {NUM_TIMESTEPS} timesteps, but this flow has num_timesteps={num_timesteps}; {way_out}"
        )


def as_stock(unet: Params, index: Index, num_timesteps: int) -> tuple[Params, dict[str, Any], dict[str, Any]]:
    """A flow that PyTorch diffusers' own classes integrate: first-order DPM-Solver++ on flow sigmas is Euler's method.

    Its sigmas begin at 1 − 1/T, so N steps use the timesteps ⌊(T − 1)(1 − i/N)⌋ and are (1 − 1/T)/N long. Setting
    T = num_timesteps + 1 gives the timesteps of `solvers.euler` wherever N divides num_timesteps. Scaling the last
    convolution by T/(T − 1) gives its step lengths; the sign changes because diffusers' velocity is noise − data. A
    shift of one part in 10⁹ keeps the timesteps from rounding to just below an integer and then down by one.

    Args:
      unet: weights that predict X1 − X0.

    Returns:
      the weights, the content of `scheduler_config.json`, and the index that names the scheduler's class.
    """
    T = num_timesteps + 1
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.39.0",
        "num_train_timesteps": T,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 1 + 1e-9,
        "solver_order": 1,
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "steps_offset": 1,
    }
    index = dict(index) | {"scheduler": ["diffusers", scheduler["_class_name"]]}
    return scaled(unet, stock_factor(num_timesteps)), scheduler, index


def stock_factor(num_timesteps: int) -> float:
    """By how much the output of a UNet in the stock convention is larger than X1 − X0; see `as_stock`."""
    return -(num_timesteps + 1) / num_timesteps


def as_single_file(unet: Params, index: Index, num_timesteps: int) -> tuple[Params, dict[str, Any], dict[str, Any]]:
    """A flow as ComfyUI integrates it: x − σ · output is the image at σ = 1 − t and timestep 1000·σ.

    Args:
      unet: weights that predict X1 − X0.

    Returns:
      the weights, the content of `scheduler_config.json`, and the index that names the scheduler's class.

    Raises:
      ValueError: the flow has another number of timesteps.
    """
    _check_timesteps("a single file", num_timesteps, "leave 'single_file' out of config.formats")
    return scaled(unet, -1.0), *single_file_scheduler(index)


def single_file_scheduler(index: Index) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of `scheduler_config.json` and the index of a single file that says that it is a flow."""
    name = "FlowMatchEulerDiscreteScheduler"
    scheduler = {"_class_name": name, "num_train_timesteps": NUM_TIMESTEPS, "prediction_type": "flow_prediction"}
    return scheduler | {"shift": 1.0}, as_teacher(index) | {"scheduler": ["diffusers", name]}


def scaled(unet: Params, factor: float) -> Params:
    """A UNet, stacked or not, whose output is `factor` times as large: its last convolution is scaled."""
    last = [name for name in unet if name.endswith(("conv_out.kernel", "conv_out.bias"))]
    return dict(unet) | {name: (unet[name] * factor).astype(unet[name].dtype) for name in last}
