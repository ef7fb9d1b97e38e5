"""Mean-field inference in the fully connected CRF that DeepLab v1 and v2 put on their networks.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
NIPS 2011, arXiv:1210.5644. Learnt weights and compatibilities: Zheng et al., "Conditional Random
Fields as Recurrent Neural Networks", ICCV 2015, arXiv:1502.03240.

The energy of a labelling x of pixels at positions p with colours I (0 to 255) is

    E(x) = sum_i unary_i(x_i) + sum_{i<j} mu(x_i, x_j) k(i, j)
    k(i, j) = w_bilateral exp(-|p_i - p_j|^2 / 2 sigma_xy^2 - |I_i - I_j|^2 / 2 sigma_rgb^2)
            + w_gaussian exp(-|p_i - p_j|^2 / 2 sigma_gamma^2)

where mu(a, b) = [a != b] (Potts) unless a compatibility matrix is given. A mean-field step filters
Q with the two Gaussians K and takes a softmax. As in all published code, K includes a pixel's own
value and is normalised by n = 1 / (K 1) in one of two ways, which differ at the same weights:

- "symmetric": sqrt(n) K sqrt(n) Q, the default of pydensecrf;
- "pixel": n K Q, as in DeepLab's own code.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.errors import InputError, unknown
from jaxseg.ops import permutohedral

NORMALIZATIONS = ("symmetric", "pixel")
METHODS = ("exact", "permutohedral")
BLOCK = 2048  # pixels: the exact method holds the kernel between so many and so many, 16 MB

Filter = Callable[[jax.Array], jax.Array]  # [H,W,C] -> [H,W,C], linear

# Published settings, for mean_field(unary, image, **PARAMETERS[name]).
PARAMETERS: dict[str, dict] = {
    # DeepLab v1 (section 5.2) and v2 search w_bilateral and sigma_rgb in 3:6 and sigma_xy in
    # 30:10:100 for every network: here, the middle of each range.
    "deeplab": dict(
        w_bilateral=4.5,
        sigma_xy=65.0,
        sigma_rgb=4.5,
        w_gaussian=3.0,
        sigma_gamma=3.0,
        iterations=10,
        normalization="pixel",
    ),
    # The script released with DeepLab-LargeFOV.
    "largefov": dict(
        w_bilateral=4.0,
        sigma_xy=49.0,
        sigma_rgb=5.0,
        w_gaussian=3.0,
        sigma_gamma=3.0,
        iterations=10,
        normalization="pixel",
    ),
    # kazuto1011/deeplab-pytorch, ResNet-101 of DeepLab v2, through pydensecrf.
    "deeplabv2": dict(
        w_bilateral=4.0,
        sigma_xy=67.0,
        sigma_rgb=3.0,
        w_gaussian=3.0,
        sigma_gamma=1.0,
        iterations=10,
        normalization="symmetric",
    ),
    # The example of pydensecrf's README.
    "pydensecrf": dict(
        w_bilateral=10.0,
        sigma_xy=80.0,
        sigma_rgb=13.0,
        w_gaussian=3.0,
        sigma_gamma=3.0,
        iterations=5,
        normalization="symmetric",
    ),
}


def mean_field(
    unary: jax.Array,
    image: jax.Array,
    *,
    w_bilateral: float | jax.Array,
    sigma_xy: float,
    sigma_rgb: float,
    w_gaussian: float | jax.Array,
    sigma_gamma: float,
    iterations: int,
    normalization: str = "symmetric",
    method: str | None = None,
    compatibility: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Class probabilities Q float32 [H,W,K] after mean-field steps from softmax(-unary).

    unary: [H,W,K] of any float dtype, -log P; finite, so clip P away from 0.
    image: uint8 [H,W,3], RGB. sigma_xy, sigma_gamma in pixels, sigma_rgb in grey levels.
    w_bilateral, w_gaussian: numbers, or one per class [K].
    method: "exact" sums over all pairs of pixels in blocks, at the speed of matrix products;
        "permutohedral" takes time linear in pixels and is a few per cent off in the bilateral term.
        None: permutohedral on a CPU, exact elsewhere.
    compatibility: [K,K], cost mu(a, b) of class a at a pixel beside class b; None: Potts.
    valid: bool [H,W], False where an image was padded: such pixels send no messages, so that the
        others come out as without them.

    iterations has to be known under jit, the rest may be traced. `vmap` gives batches. Gradients
    flow to unary, weights and compatibility; image and sigmas count as constants.
    Raises InputError for wrong shapes, dtypes or names and, outside jit, for values out of range;
    under jit, sigmas too small for the permutohedral method give NaN.
    """
    if method is None:
        method = "permutohedral" if jax.default_backend() == "cpu" else "exact"
    unary, image = (a if hasattr(a, "dtype") else np.asarray(a) for a in (unary, image))
    _check_names(normalization, method)
    _check_arrays(unary, image, compatibility, valid)
    sigmas = {"sigma_xy": sigma_xy, "sigma_rgb": sigma_rgb, "sigma_gamma": sigma_gamma}
    weights = {"w_bilateral": w_bilateral, "w_gaussian": w_gaussian}
    _check_numbers(unary.shape[2], iterations, weights, sigmas)
    if method == "permutohedral":
        _check_fit(image.shape, sigmas)
    valid = np.ones(unary.shape[:2], bool) if valid is None else valid
    return _mean_field(
        jnp.asarray(unary, jnp.float32),
        image,
        tuple(weights.values()),
        tuple(sigmas.values()),
        compatibility,
        valid,
        iterations=iterations,
        symmetric=normalization == "symmetric",
        exact=method == "exact",
    )


def check(classes: int, settings: dict) -> None:
    """Raises InputError for keyword arguments that `mean_field` would refuse for so many classes.

    settings: as a file may hold them: numbers, lists of numbers and names.
    """
    names = ("normalization", "method")
    for name, value in settings.items():
        try:
            if name not in names and value is not None:
                np.asarray(value, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"{name} {value!r} has to be a number") from None
    _check_names(settings.get("normalization", "symmetric"), settings.get("method") or "exact")
    weights = {name: settings[name] for name in ("w_bilateral", "w_gaussian")}
    sigmas = {name: settings[name] for name in ("sigma_xy", "sigma_rgb", "sigma_gamma")}
    _check_numbers(classes, settings["iterations"], weights, sigmas)
    _check_compatibility(classes, settings.get("compatibility"))


@partial(jax.jit, static_argnames=("iterations", "symmetric", "exact"))
def _mean_field(
    unary: jax.Array,
    image: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    sigmas: tuple[jax.Array, jax.Array, jax.Array],
    compatibility: jax.Array | None,
    valid: jax.Array,
    *,
    iterations: int,
    symmetric: bool,
    exact: bool,
) -> jax.Array:
    classes = unary.shape[2]
    # Whole vectors of 8 for the processor: classes of probability 0 fill the last.
    fill = -classes % 8
    unary = jnp.pad(unary, ((0, 0), (0, 0), (0, fill)), constant_values=jnp.inf)
    weights = [jnp.pad(w, (0, fill)) if jnp.ndim(w) else w for w in weights]
    filters = (_exact if exact else _permutohedral)(
        image, valid, symmetric, *jax.lax.stop_gradient(sigmas)
    )

    # Backwards, a step is computed again from its Q: the memory is one Q per step.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(_: int, q: jax.Array) -> jax.Array:
        message = sum(w * filter_(q) for w, filter_ in zip(weights, filters, strict=True))
        if compatibility is not None:
            cost = jnp.pad(compatibility, (0, fill))
            message = -jnp.einsum("hwb,ab->hwa", message, cost, precision="highest")
        # Potts would subtract sum(message) - message: the sum is the same for all classes.
        return jax.nn.softmax(message - unary)

    q = jax.lax.fori_loop(0, iterations, step, jax.nn.softmax(-unary))
    return q[..., :classes]


def _normalisation(
    mass: jax.Array, valid: jax.Array, symmetric: bool
) -> tuple[jax.Array, jax.Array]:
    """What to multiply Q by before and after a filter that makes `mass` of valid pixels."""
    mass = jnp.where(valid, mass, 1)
    if symmetric:
        return valid / jnp.sqrt(mass), 1 / jnp.sqrt(mass)
    return valid.astype(jnp.float32), 1 / mass


def _exact(
    image: jax.Array,
    valid: jax.Array,
    symmetric: bool,
    sigma_xy: jax.Array,
    sigma_rgb: jax.Array,
    sigma_gamma: jax.Array,
) -> list[Filter]:
    """Both filters as sums over all pixels."""
    points = _points(image)
    scale = 0.5 / jnp.stack([sigma_xy, sigma_xy, sigma_rgb, sigma_rgb, sigma_rgb]) ** 2

    def bilateral(x: jax.Array) -> jax.Array:
        return _all_pairs(points, scale, x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def gaussian(x: jax.Array) -> jax.Array:  # separable: columns, then rows
        for axis, equation in enumerate(("Hh,hwc->Hwc", "Ww,hwc->hWc")):
            at = jnp.arange(x.shape[axis])
            matrix = jnp.exp(-0.5 * ((at[:, None] - at) / sigma_gamma) ** 2)
            x = jnp.einsum(equation, matrix, x, precision="highest")
        return x

    def normalised(kernel: Filter) -> Filter:
        mass = kernel(valid[..., None].astype(jnp.float32))
        send, receive = _normalisation(mass, valid[..., None], symmetric)
        return lambda q: receive * kernel(send * q)

    return [normalised(bilateral), normalised(gaussian)]


@jax.custom_vjp
def _all_pairs(points: jax.Array, scale: jax.Array, x: jax.Array) -> jax.Array:
    """sum_j exp(-sum_k scale_k (points_ki - points_kj)^2) x_j: points [5,N], x [N,C] -> [N,C].

    Attention without a softmax, block by block, never N x N. Differences are taken before they are
    scaled: those of whole numbers are exact, which a product of points would not be.
    """
    n, channels = x.shape
    size = min(BLOCK, n)
    pad = -n % size
    points = jnp.pad(points, ((0, 0), (0, pad))).reshape(len(points), -1, size).swapaxes(0, 1)
    x = jnp.pad(x, ((0, pad), (0, 0))).reshape(-1, size, channels)  # zeros send nothing

    def rows(here: jax.Array) -> jax.Array:
        def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            there, values = block
            squares = sum(
                s * (a[:, None] - b) ** 2 for s, a, b in zip(scale, here, there, strict=True)
            )
            return total + jnp.matmul(jnp.exp(-squares), values, precision="highest"), None

        return jax.lax.scan(add, jnp.zeros((size, channels)), (points, x))[0]

    return jax.lax.map(rows, points).reshape(-1, channels)[:n]


def _all_pairs_forward(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _all_pairs(*inputs), inputs[:2]


def _all_pairs_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple:
    return None, None, _all_pairs(*saved, cotangent)  # the kernel is symmetric


_all_pairs.defvjp(_all_pairs_forward, _all_pairs_backward)


def _permutohedral(
    image: jax.Array,
    valid: jax.Array,
    symmetric: bool,
    sigma_xy: jax.Array,
    sigma_rgb: jax.Array,
    sigma_gamma: jax.Array,
) -> list[Filter]:
    """Both filters on lattices."""
    valid = valid.ravel()
    points = _points(image)

    def normalised(sigma: jax.Array) -> Filter:
        features, span = (a[: len(sigma)] for a in (points, _extent(image.shape)))
        features, span = features / sigma[:, None], span / sigma
        lattice = permutohedral.build(features, span, valid)
        mass = permutohedral.apply(lattice, lattice, valid[:, None].astype(jnp.float32))[:, 0]
        send, receive = _normalisation(mass, valid, symmetric)
        receive = jnp.where(permutohedral.fits(span, len(valid)), receive, jnp.nan)
        lattice, transpose = (
            permutohedral.scale(lattice, *factors) for factors in ((send, receive), (receive, send))
        )

        def filter_(q: jax.Array) -> jax.Array:
            flat = q.reshape(-1, q.shape[-1])
            return permutohedral.apply(lattice, transpose, flat).reshape(q.shape)

        return filter_

    bilateral = jnp.stack([sigma_xy, sigma_xy, sigma_rgb, sigma_rgb, sigma_rgb])
    return [normalised(bilateral), normalised(jnp.stack([sigma_gamma] * 2))]


def _points(image: jax.Array) -> jax.Array:
    """Row, column and colour of every pixel: float32 [5,N], whole numbers."""
    height, width, _ = image.shape
    row, column = jnp.mgrid[:height, :width].reshape(2, -1)
    return jnp.stack([row, column, *image.reshape(-1, 3).T]).astype(jnp.float32)


def _extent(shape: tuple[int, ...]) -> np.ndarray:
    """Bounds of `_points`: float32 [5]."""
    return np.float32([shape[0], shape[1], 255, 255, 255])


def _traced(value: object) -> bool:
    return isinstance(value, jax.core.Tracer)


def _finite(value: float | jax.Array) -> bool:
    """Whether all values are, as far as can be told."""
    return _traced(value) or bool(np.isfinite(np.asarray(value)).all())  # jnp would trace it


def _check_names(normalization: str, method: str) -> None:
    if normalization not in NORMALIZATIONS:
        raise unknown("CRF normalization", normalization, NORMALIZATIONS)
    if method not in METHODS:
        raise unknown("CRF method", method, METHODS)


def _check_arrays(
    unary: jax.Array,
    image: jax.Array,
    compatibility: jax.Array | None,
    valid: jax.Array | None,
) -> None:
    if np.ndim(unary) != 3 or 0 in np.shape(unary):
        raise InputError(f"unary {np.shape(unary)} has to be [H,W,K]; use jax.vmap for a batch")
    if not jnp.issubdtype(unary.dtype, jnp.floating):
        raise InputError(f"unary has dtype {unary.dtype}, not float: give -log P")
    height, width, classes = unary.shape
    if image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise InputError(
            f"image {image.shape} {image.dtype} has to be RGB ({height}, {width}, 3) uint8, "
            f"as unary is {unary.shape}"
        )
    if valid is not None and (np.shape(valid) != (height, width) or valid.dtype != bool):
        raise InputError(f"valid {np.shape(valid)} has to be ({height}, {width}) bool")
    _check_compatibility(classes, compatibility)
    if not _finite(unary):
        raise InputError(
            "unary has NaN or infinite values: clip probabilities before -log, say to 1e-8"
        )


def _check_compatibility(classes: int, compatibility: jax.Array | None) -> None:
    if compatibility is not None and np.shape(compatibility) != (classes, classes):
        raise InputError(
            f"compatibility {np.shape(compatibility)} has to be ({classes}, {classes}), "
            "one cost for every pair of classes"
        )
    if compatibility is not None and not _finite(compatibility):
        raise InputError("compatibility has NaN or infinite values")


def _check_numbers(
    classes: int, iterations: int, weights: dict[str, float], sigmas: dict[str, float]
) -> None:
    if not isinstance(iterations, int) or iterations < 0:
        raise InputError(f"iterations {iterations} has to be a whole number, 0 or more")
    for name, weight in weights.items():
        if np.shape(weight) not in ((), (classes,)):
            raise InputError(f"{name} {np.shape(weight)} has to be a number or ({classes},)")
        if not _finite(weight):
            raise InputError(f"{name} {weight} has to be finite")
    for name, sigma in sigmas.items():
        if np.shape(sigma) != () or not (_traced(sigma) or 0 < float(sigma) < np.inf):
            raise InputError(f"{name} {sigma} has to be a positive number")


def _check_fit(shape: tuple[int, ...], sigmas: dict[str, float]) -> None:
    """Raises InputError where a lattice has more vertices than 64 bits can tell apart."""
    bilateral = ("sigma_xy", "sigma_xy", "sigma_rgb", "sigma_rgb", "sigma_rgb")
    for names in (bilateral, ("sigma_gamma",) * 2):
        used = {name: sigmas[name] for name in names}
        if any(map(_traced, used.values())):
            continue
        span = _extent(shape)[: len(names)] / np.array([float(used[name]) for name in names])
        if not permutohedral.fits(span, shape[0] * shape[1]):
            few = ", ".join(f"{name} {value}" for name, value in used.items())
            raise InputError(
                f"{few} too small for the permutohedral method on {shape[0]}x{shape[1]} "
                'pixels: use larger ones or method="exact"'
            )
