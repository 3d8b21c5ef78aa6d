"""Augmentation of emoji: small shifts and scalings keep what an emoji shows; symmetries and recoloring do not."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def augment(
    key: PRNGKeyArray, images: Float[Array, "B H W C"], max_shift: int = 1, max_zoom: float = 0.05
) -> Float[Array, "B H W C"]:
    """Shifts each image by up to `max_shift` pixels in each direction and scales it about its center by 1 ± `max_zoom`.

    With the defaults, nearly all emoji stay within their margin at 32 pixels, so that nothing is cut off. Images are
    not mirrored, because names may contain "facing right".

    Args:
      key: one key for the batch.
      images: floats whose white is 1; the range may be [0, 1] or [-1, 1].

    Returns:
      Images of the same shape and range; areas outside the original image are white.
    """
    shift_key, zoom_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (len(images), 2), -max_shift, max_shift + 1).astype(images.dtype)
    zoom = jax.random.uniform(zoom_key, (len(images),), images.dtype, 1 - max_zoom, 1 + max_zoom)
    return jax.vmap(_place)(images, shift, zoom)


def _place(image: Float[Array, "H W C"], shift: Float[Array, "2"], zoom: Float[Array, ""]) -> Float[Array, "H W C"]:
    """Transforms ink = 1 - image, whose zero is white, because `scale_and_translate` fills with zeros."""
    center = jnp.array(image.shape[:2]) / 2
    ink = jax.image.scale_and_translate(
        1 - image, image.shape, (0, 1), jnp.stack([zoom, zoom]), center * (1 - zoom) + shift, method="linear"
    )
    return 1 - ink


def turn(key: PRNGKeyArray, images: Float[Array, "B H H 3"]) -> Float[Array, "B H H 3"]:
    """Applies one of the square's eight symmetries to each image, and permutes the color channels of about half.

    Only for networks that do not see names: a "red apple" may become blue and lie on its side.
    """
    keys = jax.random.split(key, 4)

    def coin(key: PRNGKeyArray) -> Array:
        return jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))

    images = jnp.where(coin(keys[0]), images[:, :, ::-1], images)
    images = jnp.where(coin(keys[1]), images[:, ::-1], images)
    images = jnp.where(coin(keys[2]), jnp.swapaxes(images, 1, 2), images)
    orders = jnp.asarray(list(itertools.permutations(range(3))))  # the first is the identity
    chosen = orders[jnp.maximum(jax.random.randint(keys[3], (len(images),), -len(orders), len(orders)), 0)]
    return jnp.take_along_axis(images, chosen[:, None, None, :], axis=3)
