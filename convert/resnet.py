"""ResNet: torchvision's names on the Paddle side; running statistics renamed, only the classifier transposed."""

from convert.rules import Config

STAGES = 4


def unsupported(config: Config) -> str | None:
    """Why ``paddle.vision.models.ResNet`` cannot be built so, None where it can."""
    depths, widths = config.get("depths", [3, 4, 6, 3]), config.get("hidden_sizes", [256, 512, 1024, 2048])
    kind, function = config.get("layer_type", "bottleneck"), config.get("hidden_act", "relu")
    for name, sizes in (("depths", depths), ("hidden_sizes", widths)):
        if not isinstance(sizes, (list, tuple)) or not all(type(size) is int and size > 0 for size in sizes):
            return f"{name} is {str(sizes)[:40]}; a whole number above 0 for each stage is needed"
        if len(sizes) != STAGES:
            return f"{name} names {len(sizes)} stages; paddle.vision.models.ResNet has {STAGES}"
    if kind not in ("basic", "bottleneck"):
        return f"layer_type is {kind!r}; basic and bottleneck are known"
    if function != "relu":
        return f"hidden_act is {function!r}; the blocks of paddle.vision.models.ResNet know relu only"
    if kind == "bottleneck" and any(width % 4 for width in widths):
        return f"hidden_sizes are {list(widths)}; a bottleneck is a quarter as wide as its output, so each must be " \
               "a multiple of 4"
    return None
