"""Non-maximum suppression without a loop: of points and of masks.

Wang et al., SOLOv2, NeurIPS 2020, arXiv:2003.10152, section 3.4.
"""

import jax
import jax.numpy as jnp


def point_nms(scores: jax.Array) -> jax.Array:
    """Scores [...,S,S,K] >= 0, 0 where the cell above, left or above left has more."""
    edge = [(0, 0)] * (scores.ndim - 3)
    padded = jnp.pad(scores, [*edge, (1, 0), (1, 0), (0, 0)])
    above, left = padded[..., :-1, 1:, :], padded[..., 1:, :-1, :]
    most = jnp.maximum(jnp.maximum(above, left), padded[..., :-1, :-1, :])
    return jnp.where(scores >= most, scores, 0)


def matrix_nms(
    masks: jax.Array,
    categories: jax.Array,
    scores: jax.Array,
    kernel: str = "gaussian",
    sigma: float = 2.0,
) -> jax.Array:
    """Scores [M] of masks bool [M,h,w], decayed by what better masks of their category cover.

    Equations 4 and 5: score_j times the least, over masks i with a higher score, of
    f(iou_ij) / f(the largest iou of i with a mask that has a higher score than i); f(iou) is
    exp(-sigma iou^2), as in the authors' code, or 1 - iou. An empty mask suppresses nothing.

    kernel: "gaussian" or "linear".
    """
    order = jnp.argsort(scores, descending=True)
    flat = masks.reshape(len(masks), -1)[order].astype(jnp.float32)  # 0 and 1: exact products
    both, area = flat @ flat.T, flat.sum(1)
    iou = both / jnp.maximum(area[:, None] + area - both, 1)
    same = categories[order][:, None] == categories[order]
    iou = jnp.triu(jnp.where(same, iou, 0), 1)  # [i, j]: i has the higher score
    covered = iou.max(0)[:, None]
    if kernel == "gaussian":
        decay = jnp.exp(-sigma * (iou**2 - covered**2))
    else:
        decay = (1 - iou) / jnp.maximum(1 - covered, 1e-6)  # of a mask that is there twice: 0 / 0
    return jnp.zeros_like(scores).at[order].set(scores[order] * decay.min(0))
