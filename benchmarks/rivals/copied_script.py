"""The script shape that people copy from each other, for GPT-J: ``copied_script.py SOURCE TARGET.pdparams``.

All of the checkpoint is loaded, whatever has two dimensions and is not on a list is transposed, and all of it is saved.
"""

import sys
from pathlib import Path

import paddle
import torch
from safetensors.torch import load_file

hf_to_paddle: dict[str, str] = {}
dont_transpose = ["wte.weight"]


def load(source: Path) -> dict[str, torch.Tensor]:
    if (source / "model.safetensors").exists():
        return load_file(source / "model.safetensors")
    return torch.load(source / "pytorch_model.bin", map_location="cpu")


def convert(source: Path, target: Path) -> None:
    state = {}
    for name, tensor in load(source).items():
        if tensor.ndim == 2 and not any(part in name for part in dont_transpose):
            tensor = tensor.transpose(0, 1)
        for old, new in hf_to_paddle.items():
            name = name.replace(old, new)
        state[name] = tensor.contiguous().numpy()
    paddle.save(state, str(target))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
