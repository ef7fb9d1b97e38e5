"""jaxseg: image segmentation in JAX.

Shapes are written with one set of letters everywhere: B batch, H W the image's height and width,
h w a feature map's, C channels, K classes, N instances. Arrays are NHWC. Labels are integers
0..K-1, and 255 means ignore. Boxes are (y0, x0, y1, x1) in pixels, half-open.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def load(workdir: Any) -> Any:
    """The trained run in `workdir`, as a function of an image: `load(workdir)(image).label`."""
    from jaxseg.verbs.predict import (
        load as load_predictor,  # brings jax; importing jaxseg stays light
    )

    return load_predictor(workdir)


def __getattr__(name: str) -> Any:
    """`jaxseg.hub`, imported when it is first asked for: it brings jax."""
    if name == "hub":
        return importlib.import_module("jaxseg.hub")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
