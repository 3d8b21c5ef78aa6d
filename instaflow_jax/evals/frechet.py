"""The Fréchet distance of two sets of features, fitted by Gaussians (Heusel et al., 2017); FID if they are Inception's.

    distance = ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

Computed on the host in float64, because both terms are small differences of large numbers.
"""

import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Real

from instaflow_jax.infra import files


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of the features seen so far; `add` and `merge` return new moments.

    Attributes:
      count: number of features, or None if a file does not state it.
      mean: [D] in float64.
      covariance: [D, D] in float64, unbiased like np.cov; zeros for fewer than two features.
    """

    count: int | None
    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """No features yet; each will have `dim` numbers."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, features: Real[np.ndarray, "N D"]) -> "Moments":
        """The moments of the features so far and of `features`.

        Raises:
          ValueError: the features have another width, or are not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {features.shape}, expected [N, {len(self.mean)}]")
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features).all(1)).sum())
            raise ValueError(
                f"{bad} of {len(features)} features are not finite; check the images and the network's weights for NaN "
                "and infinity"
            )
        if not len(features):
            return self
        mean = features.mean(0)
        centred = features - mean
        return self.merge(type(self)(len(features), mean, centred.T @ centred / max(len(features) - 1, 1)))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together (Chan et al., 1979).

        Sums deviations from the means and never squares raw features, so features far from zero lose no digits.

        Raises:
          ValueError: the widths differ, or a count is unknown.
        """
        _check_same_width(self, other)
        if self.count is None or other.count is None:
            raise ValueError("a file of statistics without a count of features cannot be merged; compute them again")
        count = self.count + other.count
        if count < 2:
            return other if other.count else self
        shift = other.mean - self.mean
        scatter = sum(max(part.count - 1, 0) * part.covariance for part in (self, other))
        scatter += np.outer(shift, shift) * (self.count * other.count / count)
        return type(self)(count, self.mean + shift * (other.count / count), scatter / (count - 1))

    def save(self, path: str | Path) -> None:
        """Writes `mu` and `sigma` as pytorch-fid reads them, and `count`, which it ignores."""
        count = {} if self.count is None else {"count": self.count}
        content = io.BytesIO()
        np.savez(content, mu=self.mean, sigma=self.covariance, **count)
        files.write_bytes(path, content.getbuffer())

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Reads a `.npz` file of `save` or of pytorch-fid; the count of the latter is unknown.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is not such a file, or its shapes do not match.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected statistics as pytorch-fid writes them (mu, sigma)")
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not an .npz file of arrays, or is truncated ({error})") from error
        absent = {"mu", "sigma"} - arrays.keys()
        if absent:
            raise ValueError(
                f"{path} holds {', '.join(arrays)} but not {', '.join(sorted(absent))}; expected statistics as "
                "pytorch-fid writes them"
            )
        mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(f"{path}: the shapes of mu {mean.shape} and sigma {covariance.shape} do not match")
        return cls(int(arrays["count"]) if "count" in arrays else None, mean, covariance)


def distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance of two Gaussians; finite and not negative, even with fewer features than dimensions.

    With Σ = F Fᵀ, the trace of (Σ_a Σ_b)^½ is the sum of the singular values of F_aᵀ F_b. This needs square roots only
    of the eigenvalues of symmetric matrices, and only of those above rounding error. pytorch-fid takes scipy's sqrtm of
    the product instead: it gives NaN or imaginary parts where the product is singular, and agrees to 1e-6 elsewhere.

    Raises:
      ValueError: the widths differ, or one of the sets has fewer than two features or is not finite.
    """
    _check_same_width(a, b)
    for moments in (a, b):
        if moments.count is not None and moments.count < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 features in each set, got {moments.count}")
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
            raise ValueError("the statistics hold NaN or infinity; compute them again")
    shift = a.mean - b.mean
    cross = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    return max(0.0, float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def _factor(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D r"]:
    """F with F Fᵀ = covariance, with one column for each eigenvalue above rounding error.

    The square root of a rounding error of 1e-16 is 1e-8, and two thousand dimensions would add those up.
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    sure = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, sure] * np.sqrt(values[sure])


def _check_same_width(a: Moments, b: Moments) -> None:
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"features with {len(a.mean)} and {len(b.mean)} numbers cannot be compared; "
            "compute both with the same network"
        )
