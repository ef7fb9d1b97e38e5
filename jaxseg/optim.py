"""The optimizer: schedule, SGD or AdamW, no decay of norms and biases, learning rates by regex."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxseg.errors import InputError


def schedule(optim: ConfigDict, steps: int) -> Callable[[jax.Array], jax.Array]:
    """step -> learning rate: linear warm-up, poly decay to min_lr (ParseNet, Liu et al. 2015), and
    a drop at each of `drops`."""

    def lr(step: jax.Array) -> jax.Array:
        rest = jnp.clip(1 - step / steps, 0.0, 1.0)
        decayed = (optim.lr - optim.min_lr) * rest**optim.power + optim.min_lr
        for drop in optim.drops:
            decayed *= jnp.where(step >= drop, optim.drop_factor, 1.0)
        return decayed * jnp.minimum(1.0, (step + 1) / max(optim.warmup, 1))

    return lr


def path_of(keys: tuple) -> str:
    """A parameter's path as text: "backbone/stem/conv/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in keys)


def multipliers(optim: ConfigDict, params: Any) -> Any:
    """A tree of learning-rate factors.

    Raises InputError where the rules are no pairs of a regex and a number, or one is never used.
    """
    try:
        rules = [(re.compile(pattern), float(factor)) for pattern, factor in optim.multipliers]
    except (re.error, TypeError, ValueError) as error:
        raise InputError(
            f"optim.multipliers is {optim.multipliers!r} ({error}): needs pairs of a regex and a "
            'factor, such as (("backbone", 0.1),)'
        ) from error
    used = set()

    def factor(keys: tuple, _: Any) -> float:
        path = path_of(keys)
        for pattern, value in rules:
            if pattern.search(path):
                used.add(pattern.pattern)
                return value
        return 1.0

    tree = jax.tree_util.tree_map_with_path(factor, params)
    unused = [pattern.pattern for pattern, _ in rules if pattern.pattern not in used]
    if unused:
        some = [path_of(k) for k, _ in jax.tree_util.tree_leaves_with_path(params)][:5]
        raise InputError(
            f"optim.multipliers {unused} match no parameter that an earlier one leaves. "
            f"Parameters are called {', '.join(some)}, ..."
        )
    return tree


def freeze(optim: ConfigDict, params: Any) -> Any:
    """`params`, of which those with a factor of 0 have no gradient, nor a part in clipping."""
    return jax.tree.map(
        lambda p, factor: p if factor else jax.lax.stop_gradient(p),
        params,
        multipliers(optim, params),
    )


def make_optimizer(optim: ConfigDict, steps: int, params: Any) -> optax.GradientTransformation:
    """The optax chain for `params` (arrays or shapes); gradients in, updates out."""
    # Biases and norm parameters are vectors.
    decayed = jax.tree.map(lambda p: optim.decay_all or p.ndim > 1, params)
    decay = optax.add_decayed_weights(optim.weight_decay, mask=decayed)
    if optim.name == "sgd":
        rule = (decay, optax.trace(optim.momentum))
    else:
        rule = (optax.scale_by_adam(*optim.betas), decay)
    clip = (optax.clip_by_global_norm(optim.clip),) if optim.clip else ()
    factors = multipliers(optim, params)
    by_path = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))
    return optax.chain(*clip, *rule, by_path, optax.scale_by_learning_rate(schedule(optim, steps)))
