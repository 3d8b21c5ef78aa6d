"""PyTorch references with random weights, shared by the benchmarks and the tests. Needs the [test] extra.

Does not import this package, because a notebook shows that its exports do without it.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np


@functools.cache
def references():
    """The torch module with two threads, after making torchvision importable.

    A torchvision built for another torch (PyPI's is a CUDA build) cannot load its operators, yet registers properties
    of two of them on import. Declaring these two is enough for the networks that we compare with.
    """
    import torch

    torch.set_num_threads(2)
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        for library in sorted(folder.glob("_C*.so")):
            torch.ops.load_library(str(library))
    except OSError:
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401 (so that later imports succeed)

    return torch


def relative(ours, reference) -> float:
    """Relative L2 difference ‖ours − reference‖ / ‖reference‖ of two arrays or tensors of equal shape."""
    ours, reference = (np.asarray(x.detach() if hasattr(x, "detach") else x, np.float64) for x in (ours, reference))
    assert ours.shape == reference.shape, f"shapes differ: {ours.shape} and {reference.shape}"
    assert np.isfinite(reference).all() and np.linalg.norm(reference) > 0
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def randomize(module, seed: int = 0, gain: float = 1.0):
    """Gives a torch module random weights and statistics whose activations are of order one; returns it in eval mode.

    Matrices and kernels have variance gain² / fan-in. Norms get scales around one and biases around zero, and batch
    statistics differ from zero and one, so that a wrong eps, bias or scale shows in the output.
    """
    torch = references()
    draw = torch.Generator().manual_seed(seed)
    state = dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if "running_" in n}
    embeddings = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, tensor in state.items():
            if tensor.ndim == 0:
                continue
            noise = torch.randn(tensor.shape, generator=draw)
            if name.endswith("running_var"):
                noise = 1 + 0.3 * torch.tanh(noise)
            elif name in embeddings:
                noise = 0.5 * noise
            elif tensor.ndim > 1:
                noise = noise * gain / tensor[0].numel() ** 0.5
            else:
                noise = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
            tensor.copy_(noise)
    return module.eval()
