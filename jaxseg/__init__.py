"""jaxseg: image segmentation in JAX.

Shapes are written with one set of letters everywhere: B batch, H W the image's height and width,
h w a feature map's, C channels, K classes, N instances. Arrays are NHWC. Labels are integers
0..K-1, and 255 means ignore. Boxes are (y0, x0, y1, x1) in pixels, half-open.
"""

from typing import Any

__version__ = "0.1.0"


def load(workdir: Any) -> Any:
    """The trained run in `workdir`, as a function of an image: `load(workdir)(image).label`."""
    from jaxseg.predict import load as load_predictor  # brings jax; importing jaxseg stays light

    return load_predictor(workdir)
