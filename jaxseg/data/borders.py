"""U-Net's weight map: pixels between touching cells count more. Ronneberger et al. 2015, Eq. 2."""

import numpy as np
from scipy import ndimage

REACH = 4  # standard deviations beyond which a border weighs nothing


def border_weights(label: np.ndarray, cell: int, w0: float, sigma: float) -> np.ndarray:
    """1 + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), float32 [H,W].

    label: ids [H,W]; the connected parts of class `cell` are the cells. d1, d2: distance to the
    nearest and to the second nearest of them, pixels; with fewer than two, every weight is 1. The
    paper adds the term to a class weight w_c, here 1; `loss.pixel.class_weights` multiply the sum.
    """
    cells, count = ndimage.label(label == cell)
    weights = np.ones(label.shape, np.float32)
    if count < 2:
        return weights
    d1, (rows, cols) = ndimage.distance_transform_edt(cells == 0, return_indices=True)
    owner = cells[rows, cols]  # the nearest cell of every pixel
    reach = int(np.ceil(REACH * sigma))
    near = np.where(d1 <= reach, owner, 0)
    for number, box in enumerate(ndimage.find_objects(near, max_label=count), start=1):
        if box is None:
            continue
        wide = tuple(slice(max(0, s.start - reach), s.stop + reach) for s in box)
        others = (cells[wide] != 0) & (cells[wide] != number)
        if not others.any():
            continue
        mine = near[wide] == number
        total = d1[wide] + ndimage.distance_transform_edt(~others)
        weights[wide][mine] += w0 * np.exp(-(total[mine] ** 2) / (2 * sigma**2))
    return weights
