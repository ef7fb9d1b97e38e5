"""FPN: Feature Pyramid Networks for Object Detection. Lin, Dollar, Girshick, He, Hariharan,
Belongie. CVPR 2017, arXiv:1612.03144.

The levels c2 .. c5 of a backbone, all with the same channels, each with what the coarser ones know:

    c5 -> lateral 1x1 --------------------> 3x3 -> p5 -> every second pixel -> p6
    c4 -> lateral 1x1 -> + nearest x2 ----> 3x3 -> p4
    c3 -> lateral 1x1 -> + nearest x2 ----> 3x3 -> p3
    c2 -> lateral 1x1 -> + nearest x2 ----> 3x3 -> p2

The levels stand at strides 4, 8, 16, 32 and 64: see `check_strides`.

Differs from the paper: nothing known.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxseg.backbones.layers import Conv
from jaxseg.errors import InputError
from jaxseg.ops.resize import nearest


class FPN(nn.Module):
    """Levels of a backbone -> {"p2": [B,H/4,W/4,features], ..., "p6": [B,H/64,W/64,features]}.

    Parameters: lateral2 .. lateral5 and output2 .. output5, each with kernel and bias.
    """

    features: int = 256  # section 3, d
    scene: bool = False  # p5's lateral sees the mean of c5 too: UPSNet, the authors' code

    @nn.compact
    def __call__(self, levels: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """{"c2": [B,h,w,C], ..., "c5"} -> {"p2", ..., "p6"}, in this order.

        Each level is as large as its c; p6, a max-pooling 1x1 with stride 2 of p5 (footnote 1), has
        ceil(h / 2) rows.
        """
        init = nn.initializers.lecun_uniform()  # no ReLU follows
        outputs, above = {}, None
        for i in (5, 4, 3, 2):
            x = Conv(self.features, 1, kernel_init=init, name=f"lateral{i}")(levels[f"c{i}"])
            if i == 5 and self.scene:
                mean = jnp.mean(levels["c5"], axis=(1, 2), keepdims=True)
                x += Conv(self.features, 1, kernel_init=init, name="scene")(mean)
            if above is not None:
                x += nearest(above, x.shape[1:3])
            outputs[f"p{i}"] = Conv(self.features, 3, kernel_init=init, name=f"output{i}")(x)
            above = x
        outputs["p6"] = outputs["p5"][:, ::2, ::2]
        return {key: outputs[key] for key in sorted(outputs)}


def check_strides(backbone: nn.Module) -> None:
    """Raises InputError for a backbone whose c2 .. c5 are not at strides 4, 8, 16 and 32."""
    if backbone.output_stride != 32:
        raise InputError(
            f"a pyramid needs levels at strides 4, 8, 16 and 32, got a backbone of output stride "
            f"{backbone.output_stride}: set model.backbone.output_stride=32 and "
            "eval.output_stride=0"
        )
