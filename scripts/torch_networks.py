"""The PyTorch networks of pairs.py: a library's where one is that architecture, else a plain build
of the paper's."""

import parity
import torch
import torch.nn.functional as F
from torch import nn

parity.without_operators()


def torchvision(classes: int, arch: str) -> nn.Module:
    from torchvision.models import segmentation

    build = getattr(segmentation, arch)
    return build(weights=None, weights_backbone=None, num_classes=classes)


def smp(classes: int, arch: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch

    network = getattr(segmentation_models_pytorch, arch)
    return network(encoder, encoder_weights=None, classes=classes)


def block(c: int, d: int, kernel: int = 3, bias: bool = False, norm: bool = True) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    conv = nn.Conv2d(c, d, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, *[nn.BatchNorm2d(d)] * norm, nn.ReLU(True))


def separable(c: int, d: int, rate: int = 1) -> nn.Sequential:
    """Depthwise and 1x1 convolution, norm and ReLU after both."""
    depthwise = nn.Conv2d(c, c, 3, padding=rate, dilation=rate, groups=c, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(c), nn.ReLU(True), block(c, d, 1))


def upsample(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class PSPNet(nn.Module):
    """ResNet of stride 8, pyramid of 1, 2, 3, 6 bins, 3x3 512; without the auxiliary head."""

    def __init__(self, classes: int, depth: int = 50):
        super().__init__()
        from torchvision.models import resnet

        dilate = [False, True, True]
        net = getattr(resnet, f"resnet{depth}")(replace_stride_with_dilation=dilate)
        stem = (net.conv1, net.bn1, net.relu, net.maxpool)
        self.trunk = nn.Sequential(*stem, net.layer1, net.layer2, net.layer3, net.layer4)
        pools = ((nn.AdaptiveAvgPool2d(bins), block(2048, 512, 1)) for bins in (1, 2, 3, 6))
        self.pools = nn.ModuleList(nn.Sequential(*pool) for pool in pools)
        self.fuse = block(4096, 512)
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(512, classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        x = torch.cat([x, *(upsample(pool(x), x.shape[2:]) for pool in self.pools)], 1)
        return self.head(self.fuse(x))


class DeepLabV3PlusXception(nn.Module):
    """timm's Xception-65 of stride 16, separable ASPP 6, 12, 18 and two decoder convolutions."""

    def __init__(self, classes: int):
        super().__init__()
        import timm

        self.trunk = timm.create_model("xception65", features_only=True, output_stride=16)
        self.low = block(256, 48, 1)
        self.first = block(2048, 256, 1)
        self.atrous = nn.ModuleList(separable(2048, 256, rate) for rate in (6, 12, 18))
        self.mean = block(2048, 256, 1)
        self.project = nn.Sequential(block(5 * 256, 256, 1), nn.Dropout(0.1))
        self.decoder = nn.Sequential(separable(304, 256), separable(256, 256))
        self.head = nn.Conv2d(256, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, low, _, _, x = self.trunk(x)
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = torch.cat([self.first(x), *(conv(x) for conv in self.atrous), mean], 1)
        x = upsample(self.project(x), low.shape[2:])
        return self.head(self.decoder(torch.cat([x, self.low(low)], 1)))


class UNet(nn.Module):
    """64 to 1024 channels: the paper's, valid and without norms; or padded, with batch norm."""

    def __init__(self, classes: int, same: bool):
        super().__init__()
        widths = [64, 128, 256, 512, 1024]

        def two(c: int, d: int) -> nn.Sequential:
            convs = block(c, d, bias=not same, norm=same), block(d, d, bias=not same, norm=same)
            for conv in convs:
                conv[0].padding = (int(same),) * 2
            return nn.Sequential(*convs)

        self.down = nn.ModuleList(map(two, [3, *widths[:-1]], widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, d, 2, 2) for c, d in pairs)
        self.conv = nn.ModuleList(two(2 * d, d) for _, d in pairs)
        self.drop, self.head = nn.Dropout(0.5), nn.Conv2d(64, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level, conv in enumerate(self.down):
            x = conv(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        skips.pop()
        x = self.drop(x)
        for up, conv in zip(self.up, self.conv, strict=True):
            x, skip = up(x), skips.pop()
            cut = (skip.shape[2] - x.shape[2]) // 2
            skip = skip[:, :, cut : cut + x.shape[2], cut : cut + x.shape[3]]
            x = conv(torch.cat([skip, x], 1))
        return self.head(x)


class SegNet(nn.Module):
    """VGG-16 with batch norm, its mirror image, and unpooling by indices."""

    def __init__(self, classes: int):
        super().__init__()
        stages = [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]
        mirror = [[512] * 3, [512, 512, 256], [256, 256, 128], [128, 64], [64]]

        def stack(c: int, widths: list[int]) -> tuple[nn.Sequential, int]:
            convs = map(lambda c, d: block(c, d, bias=True), [c, *widths[:-1]], widths)
            return nn.Sequential(*convs), widths[-1]

        c, self.down, self.up = 3, nn.ModuleList(), nn.ModuleList()
        for side, widths in ((self.down, stages), (self.up, mirror)):
            for stage in widths:
                convs, c = stack(c, stage)
                side.append(convs)
        self.head = nn.Conv2d(64, classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = []
        for convs in self.down:
            x = convs(x)
            size = x.shape[2:]
            x, indices = F.max_pool2d(x, 2, return_indices=True)
            pooled.append((indices, size))
        for convs in self.up:
            indices, size = pooled.pop()
            x = convs(F.max_unpool2d(x, indices, 2, output_size=size))
        return self.head(x)
