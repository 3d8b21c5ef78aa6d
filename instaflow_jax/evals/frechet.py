"""The Fréchet distance of two sets of features, taken as Gaussians (Heusel et al., 2017); FID if they are Inception's.

    distance = ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

All on the host and in float64, since both terms are small differences of large numbers.
"""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Real

from instaflow_jax.infra import files


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of features seen so far; adding gives a new one.

    Attributes:
      count: features seen, or None where a file does not say.
      mean: [D] in float64.
      covariance: [D, D] in float64, unbiased as np.cov's; zeros for fewer than two features.
    """

    count: int | None
    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """Of no features, each of which will have `dim` numbers."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, features: Real[np.ndarray, "N D"]) -> "Moments":
        """With `features` too.

        Raises:
          ValueError: features of another width, or not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {features.shape}, expected [N, {len(self.mean)}]")
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features).all(1)).sum())
            raise ValueError(
                f"{bad} of {len(features)} features are not finite: the pictures, or the network's "
                "weights, hold NaN or infinity"
            )
        if not len(features):
            return self
        mean = features.mean(0)
        centred = features - mean
        return self.merge(type(self)(len(features), mean, centred.T @ centred / max(len(features) - 1, 1)))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan et al., 1979): deviations from the means are summed, never squares of raw
        features, so that features far from zero lose no digits.

        Raises:
          ValueError: the widths differ, or a count is not known.
        """
        _check_same_width(self, other)
        if self.count is None or other.count is None:
            raise ValueError("statistics from a file that does not say of how many features cannot be added to")
        count = self.count + other.count
        if count < 2:
            return other if other.count else self
        shift = other.mean - self.mean
        scatter = sum(max(part.count - 1, 0) * part.covariance for part in (self, other))
        scatter += np.outer(shift, shift) * (self.count * other.count / count)
        return type(self)(count, self.mean + shift * (other.count / count), scatter / (count - 1))

    def save(self, path: str | Path) -> None:
        """Writes `mu` and `sigma` as pytorch-fid reads them, and `count`, which it does not look at."""
        count = {} if self.count is None else {"count": self.count}
        with files.atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, **count)

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Reads a `.npz` of `save` or of pytorch-fid; the count of the latter is not known.

        Raises:
          FileNotFoundError: no such file.
          ValueError: it is no such file, or its arrays do not belong together.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected statistics as pytorch-fid writes them (mu, sigma)")
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no .npz file of arrays, or a truncated one ({error})") from error
        absent = {"mu", "sigma"} - arrays.keys()
        if absent:
            raise ValueError(
                f"{path} holds {', '.join(arrays)}, but no {' and no '.join(sorted(absent))}; expected "
                "statistics as pytorch-fid writes them"
            )
        mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(
                f"{path}: mu of shape {mean.shape} and sigma of shape {covariance.shape} do not belong together"
            )
        return cls(int(arrays["count"]) if "count" in arrays else None, mean, covariance)


def distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance of two Gaussians; finite and not negative, also with fewer features than dimensions.

    With Σ = F Fᵀ, the trace of (Σ_a Σ_b)^½ is the sum of the singular values of F_aᵀ F_b. Nothing is taken the root of
    but eigenvalues of symmetric matrices that stand clear of rounding; scipy's sqrtm of the product, which pytorch-fid
    uses, gives NaN or imaginary parts where the product is singular. Equal to it to 1e-6 where it is not.

    Raises:
      ValueError: the widths differ, one of them has fewer than two features, or is not finite.
    """
    _check_same_width(a, b)
    for moments in (a, b):
        if moments.count is not None and moments.count < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 features in each set, got {moments.count}")
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
            raise ValueError("the statistics hold NaN or infinity: make them again")
    shift = a.mean - b.mean
    cross = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def _factor(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D r"]:
    """F with F Fᵀ = covariance, a column for each eigenvalue above rounding: the root of a rounding error of 1e-16 is
    1e-8, which two thousand dimensions add up."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    sure = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, sure] * np.sqrt(values[sure])


def _check_same_width(a: Moments, b: Moments) -> None:
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"features of {len(a.mean)} and of {len(b.mean)} numbers cannot be compared: were both made "
            "by the same network?"
        )
