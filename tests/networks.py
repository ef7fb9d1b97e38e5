"""What the tests of networks share: tracing and auditing one, and float64 NumPy to test against.

The layers take one image [H,W,C] and are written as Caffe defines them.
"""

from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxseg import models
from jaxseg.backbones.layers import Conv
from jaxseg.experiment import resolve

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def trace(model, size, channels=3):
    """(shapes of the variables, shapes of the outputs), without computing anything."""
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    init = partial(model.init_with_output, train=False)
    outputs, variables = jax.eval_shape(init, jax.random.key(0), image)
    return variables, outputs


def count(variables):
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


def experiment(name, arguments=""):
    """The network of an experiment."""
    path = EXPERIMENTS / f"{name}.py"
    return models.build(resolve(f"{path}:{arguments}" if arguments else str(path), []))[0]


def audit(model, size=(65, 65)):
    """Path -> (stride, rate) of every convolution."""
    found = {}

    def note(run, args, kwargs, context):
        module = context.module
        if isinstance(module, Conv) and context.method_name == "__call__":
            found["/".join(module.path)] = (module.stride, module.rate)
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        trace(model, size)
    return found


def randomised(variables, seed=0):
    """Weights that keep activations near 1, and norm statistics that are not the initial ones."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name = path[-1].key
        if name == "kernel":
            values = rng.normal(size=x.shape) * np.sqrt(2 / np.prod(x.shape[:-1]))
        elif name in ("var", "scale"):
            values = rng.uniform(0.5, 2.0, x.shape)
        else:
            values = 0.2 * rng.normal(size=x.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, variables)


def random_run(model, size, seed=0):
    """(outputs of one image, float64 variables, image [H,W,3]), of random weights, not training."""
    image = np.random.default_rng(seed).normal(size=(*size, 3)).astype(np.float32)
    variables = randomised(trace(model, size)[0], seed)
    outputs = jax.jit(partial(model.apply, train=False))(variables, image[None])
    outputs = {key: np.asarray(value[0]) for key, value in outputs.items()}
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    return outputs, wide, image.astype(np.float64)


def assert_close(ours, reference):
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


def losses(model, loss, size, steps=8, rate=1e-2):
    """The losses of some training steps on two images whose label can be seen."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    label = jnp.where(image[..., 0] > 0.7, 2, 1).at[:, :2].set(255)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), image)
    tx = optax.adam(rate)

    def objective(params, rest, rng):
        outputs, updated = model.apply(
            {"params": params, **rest},
            image,
            train=True,
            rngs={"dropout": rng},
            mutable=["batch_stats"],
        )
        return loss(outputs, {"image": image, "label": label})[0], updated

    @jax.jit
    def step(params, rest, state, rng):
        (value, rest), grads = jax.value_and_grad(objective, has_aux=True)(params, rest, rng)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), rest, state, value

    params = variables["params"]
    rest = {k: v for k, v in variables.items() if k != "params"}
    state, values = tx.init(params), []
    for i in range(steps):
        params, rest, state, value = step(params, rest, state, jax.random.key(i))
        values.append(float(value))
    return values


def relu(x):
    return np.maximum(x, 0)


def conv(x, layer, stride=1, rate=1, pad=0):
    kernel = layer["kernel"]
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    taps = kernel.shape[0]
    h, w = ((n - rate * (taps - 1) - 1) // stride + 1 for n in x.shape[:2])
    out = np.zeros((h, w, kernel.shape[-1]))
    for i, j in np.ndindex(taps, taps):
        rows = slice(i * rate, i * rate + stride * (h - 1) + 1, stride)
        cols = slice(j * rate, j * rate + stride * (w - 1) + 1, stride)
        out += x[rows, cols] @ kernel[i, j]
    return out + layer.get("bias", 0)


def batch_norm(x, layer, stats, epsilon=1e-5):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + epsilon) * layer["scale"] + layer["bias"]


def max_pool(x, window, stride, pad=0):
    """(maxima, their rows, their columns), each [h,w,C]; the size is rounded up."""
    sizes = []
    for n in x.shape[:2]:
        size = -(-(n + 2 * pad - window) // stride) + 1
        sizes.append(size - ((size - 1) * stride >= n + pad))
    values = np.zeros((*sizes, x.shape[2]))
    rows, cols = np.zeros(values.shape, int), np.zeros(values.shape, int)
    for i, j in np.ndindex(*sizes):
        top, left = max(i * stride - pad, 0), max(j * stride - pad, 0)
        part = x[top : i * stride - pad + window, left : j * stride - pad + window]
        flat = part.reshape(-1, x.shape[2])
        values[i, j], best = flat.max(0), flat.argmax(0)
        rows[i, j], cols[i, j] = top + best // part.shape[1], left + best % part.shape[1]
    return values, rows, cols


def max_unpool(x, rows, cols, size):
    out = np.zeros((*size, x.shape[2]))
    out[rows, cols, np.arange(x.shape[2])] = x
    return out


def avg_pool(x, window, pad):
    """Stride 1; the zeros of the border count."""
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    h, w = (n - window + 1 for n in x.shape[:2])
    parts = [x[i : i + h, j : j + w] for i, j in np.ndindex(window, window)]
    return sum(parts) / window**2


def deconv(x, kernel, stride):
    """Every pixel adds its kernel [2 stride, 2 stride, C, D] to the output."""
    h, w, _ = x.shape
    out = np.zeros(((h + 1) * stride, (w + 1) * stride, kernel.shape[-1]))
    for u, v in np.ndindex(h, w):
        window = np.s_[u * stride : (u + 2) * stride, v * stride : (v + 2) * stride]
        out[window] += np.einsum("c,ijcd->ijd", x[u, v], kernel)
    return out


def bilinear_kernel(stride, classes):
    """As Caffe's bilinear filler."""
    size = 2 * stride
    centre = (2 * stride - 1 - stride % 2) / (2.0 * stride)
    line = np.array([1 - abs(i / stride - centre) for i in range(size)])
    return np.outer(line, line)[..., None, None] * np.eye(classes)


def resize_corners(x, size):
    """Bilinear, the corners on each other."""
    for axis, n in enumerate(size):
        at = np.arange(n) * (x.shape[axis] - 1) / max(n - 1, 1)
        low = np.minimum(at.astype(int), max(x.shape[axis] - 2, 0))
        high = np.minimum(low + 1, x.shape[axis] - 1)
        part = np.expand_dims(at - low, tuple(a for a in range(3) if a != axis))
        x = x.take(low, axis) * (1 - part) + x.take(high, axis) * part
    return x


def cross_entropy(logits, label, ignore=255):
    """(sum over the pixels that count, their number)."""
    pixels = zip(logits.reshape(-1, logits.shape[-1]), label.ravel(), strict=True)
    values = [np.log(np.exp(z).sum()) - z[k] for z, k in pixels if k != ignore]
    return sum(values), len(values)
