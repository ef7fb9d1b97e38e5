"""FPN: Feature Pyramid Networks for Object Detection. Lin, Dollar, Girshick, He, Hariharan,
Belongie. CVPR 2017, arXiv:1612.03144.

The levels c2 .. c5 of a backbone, all with the same channels, each with what the coarser ones know:

    c5 -> lateral 1x1 --------------------> 3x3 -> p5 -> every second pixel -> p6
    c4 -> lateral 1x1 -> + nearest x2 ----> 3x3 -> p4
    c3 -> lateral 1x1 -> + nearest x2 ----> 3x3 -> p3
    c2 -> lateral 1x1 -> + nearest x2 ----> 3x3 -> p2

Differs from the paper: nothing known.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import Conv
from jaxseg.ops.resize import nearest


class FPN(nn.Module):
    """Levels of a backbone -> {"p2": [B,H/4,W/4,features], ..., "p6": [B,H/64,W/64,features]}.

    Parameters: lateral2 .. lateral5 and output2 .. output5, each with kernel and bias.
    """

    features: int = 256  # section 3, d
    lowest: int = 2
    highest: int = 6  # above 5: a max-pooling 1x1 with stride 2 of the one before; footnote 1
    scene: bool = False  # p5's lateral sees the mean of c5 too: UPSNet, the authors' code

    @nn.compact
    def __call__(self, levels: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """{"c2": [B,h,w,C], ..., "c5"} -> {"p{lowest}", ..., "p{highest}"}, lowest first.

        Each level is as large as its c; one more has ceil(h / 2) rows. A backbone whose stride is
        capped has levels of the same size, which add up as they are.
        """
        init = nn.initializers.lecun_uniform()  # no ReLU follows
        outputs, above = {}, None
        for i in range(5, self.lowest - 1, -1):
            x = Conv(self.features, 1, kernel_init=init, name=f"lateral{i}")(levels[f"c{i}"])
            if i == 5 and self.scene:
                mean = jnp.mean(levels["c5"], axis=(1, 2), keepdims=True)
                x += Conv(self.features, 1, kernel_init=init, name="scene")(mean)
            if above is not None:
                x += nearest(above, x.shape[1:3])
            outputs[f"p{i}"] = Conv(self.features, 3, kernel_init=init, name=f"output{i}")(x)
            above = x
        for i in range(6, self.highest + 1):
            outputs[f"p{i}"] = outputs[f"p{i - 1}"][:, ::2, ::2]
        return {key: outputs[key] for key in sorted(outputs)}
