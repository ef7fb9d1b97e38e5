"""Modified aligned Xception, of DeepLab v3+ (Chen et al. 2018, arXiv:1802.02611, section 3.2 and
Fig. 4), after Xception: Deep Learning with Depthwise Separable Convolutions (Chollet, CVPR 2017,
arXiv:1610.02357).

image [B,H,W,C] -> c1 [B,H/2,W/2,64], c2 [B,H/4,W/4,256], c3 (stride 8, 728), c4 (stride 16, 728),
c5 (stride 32, 2048). c2 and c3 are the authors' taps: the last map at their stride, before the ReLU
of the strided convolution. Past `output_stride`, stride turns into dilation.

Every module is three separable convolutions around an identity or a 1x1 convolution; the third
takes the stride, so that no max-pooling is left.

Differs from the paper: the classifier is left out.
"""

from functools import partial

import flax.linen as nn
import jax

from jaxseg.backbones.layers import (
    ConvNorm,
    Norm,
    SeparableConvNorm,
    check_fields,
    stage_strides,
)

# (channels, stride) of the entry flow's modules, and how many the middle flow has.
FLOWS = {
    41: (((128, 2), (256, 2), (728, 2)), 8),
    65: (((128, 2), (256, 2), (728, 2)), 16),
    71: (((128, 2), (256, 1), (256, 2), (728, 1), (728, 2)), 16),
}
CHOICES = {"depth": FLOWS, "output_stride": (4, 8, 16, 32)}


class Module(nn.Module):
    """Three separable convolutions: [B,h,w,C] -> (output, the map before the third of them).

    shortcut: "conv" (1x1), "sum" (identity) or "none". relu_after: ReLU follows each convolution,
    as in the exit flow's last module, instead of preceding each separable one.
    """

    features: tuple[int, int, int]
    stride: int
    rate: int
    norm: Norm
    shortcut: str = "conv"
    relu_after: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        act = nn.relu if self.relu_after else None
        separable = partial(SeparableConvNorm, norm=self.norm, act=act)
        y = before = x
        for i, features in enumerate(self.features, start=1):
            before = y
            y = y if self.relu_after else nn.relu(y)
            stride = self.stride if i == 3 else 1
            y = separable(features, 3, stride, self.rate, name=f"separable{i}")(y, train)
        if self.shortcut == "conv":
            project = ConvNorm(
                *(self.features[-1], 1, self.stride), norm=self.norm, act=None, name="shortcut"
            )
            y += project(x, train)
        elif self.shortcut == "sum":
            y += x
        return y, before


class Backbone(nn.Module):
    depth: int = 65
    output_stride: int = 32
    norm: Norm = Norm(momentum=0.9997, epsilon=1e-3)  # the authors' code

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        """image [B,H,W,C] -> c1 [B,H/2,W/2,64] to c5 [B,H/os,W/os,2048]."""
        check_fields(self, CHOICES, "backbone")
        entry, middle = FLOWS[self.depth]
        strides = (2, *(stride for _, stride in entry), 1, 2, 1)
        plan = stage_strides(strides, self.output_stride)
        # A removed stride dilates what comes after its module.
        plan = [(stride, rate) for (stride, _), (_, rate) in zip(plan[1:], plan, strict=False)]
        conv = partial(ConvNorm, norm=self.norm)
        module = partial(Module, norm=self.norm)

        x = conv(32, 3, 2, name="stem1")(image, train)
        x = conv(64, 3, name="stem2")(x, train)
        outputs, level = {"c1": x}, 1
        for i, (features, wanted) in enumerate(entry, start=1):
            x, before = module((features,) * 3, *plan[i - 1], name=f"entry{i}")(x, train)
            if wanted == 2:  # the module leaves this level
                outputs.setdefault(f"c{level}", before)
                level += 1
        rate = plan[len(entry)][1]
        for i in range(1, middle + 1):
            unit = module((728,) * 3, 1, rate, shortcut="sum", name=f"middle{i}")
            x, _ = unit(x, train)
        outputs["c4"] = x
        x, _ = module((728, 1024, 1024), *plan[-2], name="exit1")(x, train)
        last = {"shortcut": "none", "relu_after": True, "name": "exit2"}
        outputs["c5"], _ = module((1536, 1536, 2048), *plan[-1], **last)(x, train)
        return outputs


VARIANTS = {f"xception{depth}": partial(Backbone, depth=depth) for depth in FLOWS}
