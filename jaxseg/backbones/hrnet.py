"""HRNetV2: Deep High-Resolution Representation Learning for Visual Recognition. Wang, Sun, Cheng,
Jiang, Deng, Zhao, Liu, Mu, Tan, Wang, Liu, Xiao. TPAMI 2020, arXiv:1908.07919.

Four branches at strides 4, 8, 16, 32 run side by side and exchange what they see (Fig. 2, 3):

    image [B,H,W,C] -> stem c1 [B,H/2,W/2,64] -> 4 bottlenecks [B,H/4,W/4,256]
    -> stage 2, branches 1-2 -> stage 3, branches 1-3 -> stage 4, branches 1-4

c2, c3, c4 are the first three branches. c5 is what the paper's semantic head sees: all four,
brought to `output_stride` and concatenated, [B,H/4,W/4,720] for W48 (Fig. 4b). Nothing is dilated:
past `output_stride` a branch is enlarged. With output_stride=32 c5 is the fourth branch alone, and
the levels are the pyramid that a decoder or an FPN climbs.

Differs from the paper: the classifier is left out.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import ConvNorm, Norm, check_fields
from jaxseg.backbones.resnet import Basic, Bottleneck
from jaxseg.ops.pool import avg_pool
from jaxseg.ops.resize import resize

CHOICES = {"output_stride": (4, 8, 16, 32)}


class Exchange(nn.Module):
    """Residual units on each branch, then every branch gets the sum of all. Section 3, Fig. 3.

    Branches [B,h,w,C], [B,h/2,w/2,2C], ... -> the same shapes.
    """

    units: int
    norm: Norm

    @nn.compact
    def __call__(self, branches: list[jax.Array], train: bool) -> list[jax.Array]:
        conv, widths = partial(ConvNorm, norm=self.norm), [x.shape[-1] for x in branches]
        seen = []
        for j, x in enumerate(branches, start=1):
            for unit in range(1, self.units + 1):
                x = Basic(x.shape[-1], 1, 1, self.norm, name=f"branch{j}_unit{unit}")(x, train)
            seen.append(x)
        fused = []
        for i, target in enumerate(seen):
            total = target
            for j, x in enumerate(seen):
                name = f"from{j + 1}_to{i + 1}"
                if j > i:  # up: 1x1, bilinear
                    x = conv(widths[i], 1, act=None, name=name)(x, train)
                    total += resize(x, target.shape[1:3])
                elif j < i:  # down: 3x3 with stride 2, once an octave, a ReLU between two
                    for step in range(1, i - j):
                        x = conv(widths[j], 3, 2, name=f"{name}_{step}")(x, train)
                    total += conv(widths[i], 3, 2, act=None, name=name)(x, train)
            fused.append(nn.relu(total))
        return fused


class Backbone(nn.Module):
    width: int = 48  # channels of the first branch; each next one has twice as many
    modules: tuple[int, int, int] = (1, 4, 3)  # of exchange in stages 2, 3, 4: section 3
    units: int = 4  # of each branch in a module, and of stage 1
    output_stride: int = 4
    norm: Norm = Norm()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> c1 [B,H/2,W/2,64] to c5 [B,H/os,W/os,15 width or 8 width]."""
        check_fields(self, CHOICES, "backbone")
        conv = partial(ConvNorm, norm=self.norm)
        x = c1 = conv(64, 3, 2, name="stem1")(image, train)
        x = conv(64, 3, 2, name="stem2")(x, train)
        for unit in range(1, self.units + 1):
            x = Bottleneck(256, 1, 1, self.norm, name=f"stage1_unit{unit}")(x, train)
        branches = [conv(self.width, 3, name="branch1")(x, train)]
        for stage, modules in enumerate(self.modules, start=2):
            below = x if stage == 2 else branches[-1]
            new = conv(self.width * 2 ** (stage - 1), 3, 2, name=f"branch{stage}")
            branches.append(new(below, train))
            for i in range(1, modules + 1):
                exchange = Exchange(self.units, self.norm, name=f"stage{stage}_module{i}")
                branches = exchange(branches, train)
        most = CHOICES["output_stride"].index(self.output_stride)
        capped = [_at(branches, i, min(i, most)) for i in range(4)]
        if most < 3:
            capped[3] = jnp.concatenate([_at(branches, i, most) for i in range(4)], axis=-1)
        return {"c1": c1, **{f"c{i}": x for i, x in enumerate(capped, start=2)}}


def _at(branches: list[jax.Array], i: int, j: int) -> jax.Array:
    """Branch i at the size of branch j: averaged (section 3, HRNetV2p) or enlarged."""
    if i < j:
        return avg_pool(branches[i], 2 ** (j - i), 2 ** (j - i), ceil=True)
    return resize(branches[i], branches[j].shape[1:3])


VARIANTS = {
    "hrnet_w18_small": partial(Backbone, width=18, modules=(1, 3, 2), units=2),
    "hrnet_w18": partial(Backbone, width=18),
    "hrnet_w48": Backbone,
}
