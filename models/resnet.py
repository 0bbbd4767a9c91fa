"""ResNet (He et al. 2015) as ``paddle.vision.models`` has it, in the sizes of a config and with transformers' outputs.

Blocks, ``_make_layer`` and ``forward`` are Paddle's, and so are the names of all parameters. Its constructor knows the
five depths of torchvision, one width and three channels; the one here reads them from the config. Pictures are float32
[batch, channels, height, width].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paddle import Tensor, nn
from paddle.nn.initializer import Normal, Uniform
from paddle.vision.models import ResNet
from paddle.vision.models.resnet import BasicBlock, BottleneckBlock

from convert.errors import BadInput
from convert.resnet import unsupported

from .config import Config
from .heads import classified
from .layer import BatchNorm2D
from .pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(Config):
    """``config.json`` of ResNet with the defaults of transformers: ResNet-50."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: Sequence[int] = (256, 512, 1024, 2048)
    depths: Sequence[int] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False

    def __post_init__(self):
        reason = unsupported(asdict(self))
        if reason:
            raise BadInput(f"resnet: {reason}.")

    @property
    def block(self) -> type[nn.Layer]:
        if self.layer_type == "basic":
            return BasicBlock
        return EarlyStrideBottleneck if self.downsample_in_bottleneck else BottleneckBlock


class EarlyStrideBottleneck(BottleneckBlock):
    """The stride in the first convolution, as He et al. have it; Paddle and torchvision have it in the second."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *others: Any, **named: Any):
        super().__init__(inplanes, planes, stride, *others, **named)
        self.conv1 = nn.Conv2D(inplanes, planes, 1, stride=stride, bias_attr=False)
        self.conv2 = nn.Conv2D(planes, planes, 3, padding=1, bias_attr=False)


class ResNetPretrained(Pretrained, ResNet):
    """With 0 ``classes`` the net ends in feature maps [batch, hidden_sizes[-1], height / 32, width / 32]."""

    config_class = ResNetConfig

    def __init__(self, config: ResNetConfig, classes: int):
        nn.Layer.__init__(self)
        self.config = config
        self.num_classes, self.with_pool = classes, classes > 0
        self.groups, self.base_width, self.dilation = 1, 64, 1
        self.inplanes, self._norm_layer = config.embedding_size, BatchNorm2D

        self.conv1 = nn.Conv2D(config.num_channels, self.inplanes, 7, stride=2, padding=3, bias_attr=False)
        self.bn1 = BatchNorm2D(self.inplanes)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2D(kernel_size=3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._make_layer(config.block, width // config.block.expansion, depth, stride=stride)
            for width, depth, stride in zip(config.hidden_sizes, config.depths, self._strides(), strict=True)
        )
        self.avgpool = nn.AdaptiveAvgPool2D((1, 1))
        if classes:
            self.fc = nn.Linear(config.hidden_sizes[-1], classes)
        self.apply(_initialise)

    def _strides(self) -> tuple[int, ...]:
        return (2 if self.config.downsample_in_first_stage else 1, 2, 2, 2)


class ResNetModel(ResNetPretrained):
    def __init__(self, config: ResNetConfig):
        super().__init__(config, classes=0)

    def forward(self, pixel_values: Tensor) -> dict:
        """``last_hidden_state``: feature maps; ``pooler_output`` [batch, hidden_sizes[-1], 1, 1]: their mean."""
        maps = super().forward(pixel_values)
        return {"last_hidden_state": maps, "pooler_output": self.avgpool(maps)}


class ResNetForImageClassification(ResNetPretrained):
    def __init__(self, config: ResNetConfig):
        super().__init__(config, classes=config.num_labels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict:
        """``logits`` [batch, num_labels]; with labels the ``loss`` of the config's ``problem_type``."""
        return classified(super().forward(pixel_values), labels, self.config)


def _initialise(layer: nn.Layer) -> None:
    """As transformers: He et al. 2015 over the outputs of a convolution, and torch's own for the classifier."""
    if isinstance(layer, nn.Conv2D):
        outputs, _, height, width = layer.weight.shape
        Normal(0.0, math.sqrt(2.0 / (outputs * height * width)))(layer.weight)
    elif isinstance(layer, nn.Linear):
        bound = 1.0 / math.sqrt(layer.weight.shape[0])
        Uniform(-bound, bound)(layer.weight)
        Uniform(-bound, bound)(layer.bias)
