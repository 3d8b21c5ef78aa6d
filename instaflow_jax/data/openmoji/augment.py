"""One emoji becomes many: moved and scaled a little, it stays itself; turned and recoloured, it is another of its kind."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def augment(
    key: PRNGKeyArray, images: Float[Array, "B H W C"], max_shift: int = 1, max_zoom: float = 0.05
) -> Float[Array, "B H W C"]:
    """Move each picture by up to `max_shift` whole pixels each way and scale it about its centre by 1 ± `max_zoom`.

    The defaults stay within the margin that nearly all emoji leave at 32 pixels, so nothing is cut off.

    Args:
      key: one key a batch; each picture gets its own split.
      images: floats whose white is 1, so [0, 1] and [-1, 1] both do. No mirroring: "facing right" is part of a name.
    Returns:
      Pictures of the same shape and range; what comes in from outside is white.
    """
    shift_key, zoom_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (len(images), 2), -max_shift, max_shift + 1).astype(images.dtype)
    zoom = jax.random.uniform(zoom_key, (len(images),), images.dtype, 1 - max_zoom, 1 + max_zoom)
    return jax.vmap(_place)(images, shift, zoom)


def _place(image: Float[Array, "H W C"], shift: Float[Array, "2"], zoom: Float[Array, ""]) -> Float[Array, "H W C"]:
    """`scale_and_translate` fills with zeros, hence the detour over ink = 1 - image, whose zero is white."""
    centre = jnp.array(image.shape[:2]) / 2
    ink = jax.image.scale_and_translate(
        1 - image, image.shape, (0, 1), jnp.stack([zoom, zoom]), centre * (1 - zoom) + shift, method="linear"
    )
    return 1 - ink


def turn(key: PRNGKeyArray, images: Float[Array, "B H H 3"]) -> Float[Array, "B H H 3"]:
    """One of the square's eight symmetries for each picture, and for half of them another order of colour channels.

    For networks that are to see shapes and read no names: after it, "red apple" may be blue and lie on its side.
    """
    keys = jax.random.split(key, 4)

    def toss(key: PRNGKeyArray) -> Array:
        return jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))

    images = jnp.where(toss(keys[0]), images[:, :, ::-1], images)
    images = jnp.where(toss(keys[1]), images[:, ::-1], images)
    images = jnp.where(toss(keys[2]), jnp.swapaxes(images, 1, 2), images)
    orders = jnp.asarray(list(itertools.permutations(range(3))))  # the first is the order as it is
    chosen = orders[jnp.maximum(jax.random.randint(keys[3], (len(images),), -len(orders), len(orders)), 0)]
    return jnp.take_along_axis(images, chosen[:, None, None, :], axis=3)
