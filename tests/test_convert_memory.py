"""Peak memory: bounded by a tile for each thread, whatever the dtypes and formats, and flat in the number of layers.

Each conversion is a process of its own that tells its VmHWM: ``ru_maxrss`` counts what its parent held at the fork.
Python and numpy differ from machine to machine: a peak is held against that of a conversion of next to nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convert import gptj
from convert.plan import expand
from convert.stream import TILES

ROOM = sum(TILES) + (16 << 20)
"""What a conversion may hold beside the interpreter; a widened matrix held beside its tile would not go into it."""
NOTHING = dict(n_layer=1, n_embd=64, n_inner=64, vocab_size=272, n_positions=64)
GROWTH = 1 / 16
"""Of the bytes that were added; a model that is held at all has all of them."""
CONVERSION = """
import sys
from pathlib import Path
from convert.cli import main
from convert.gptj import FAMILY
code = main(FAMILY, sys.argv[1:])
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
sys.exit(code)
"""


def shapes(config):
    """Name and shape of every tensor of GPT-J that a checkpoint of today holds."""
    sizes, rules = gptj.sizes(config), gptj.FAMILY.rules_of(gptj.FAMILY.head("GPTJForCausalLM"))
    stored = [rule for rule in rules if rule.moves and rule.when(config)]
    return {rule.sources[0][0]: list(rule.source_shape(sizes)) for rule in expand(stored, {"i": config["n_layer"]})}


def safetensors(directory, tensors, code, width):
    """Zeros without a byte of disk: a header, and a hole."""
    header, position = {}, 0
    for name, shape in tensors.items():
        nbytes = width * int(torch.Size(shape).numel())
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def float16(directory, tensors):
    safetensors(directory, tensors, "F16", 2)


def float32(directory, tensors):
    safetensors(directory, tensors, "F32", 4)


def zipped(directory, tensors):
    torch.save({name: torch.zeros(shape, dtype=torch.float16) for name, shape in tensors.items()},
               directory / "pytorch_model.bin")


def across(directory, tensors):
    """Matrices in the order of their columns, whose rows no piece of the file holds."""
    torch.save({name: torch.zeros(shape[::-1], dtype=torch.float16).t() if len(shape) == 2 else
                torch.zeros(shape, dtype=torch.float16) for name, shape in tensors.items()},
               directory / "pytorch_model.bin")


def configured(**changes):
    return {**gptj.FAMILY.demo, "n_embd": 1024, "n_inner": 16_384, "vocab_size": 2000, "n_positions": 512, **changes}


def parameters(**changes) -> int:
    return sum(int(torch.Size(shape).numel()) for shape in shapes(configured(**changes)).values())


def peak(directory: Path, save, flags, **changes) -> int:
    """Bytes that a conversion of zeros in the shapes of a GPT-J was resident with at most."""
    config = configured(**changes)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save(directory, shapes(config))
    arguments = ["--source", directory, "--output", directory / "out", "--reports", directory / "reports", *flags]
    result = subprocess.run([sys.executable, "-c", CONVERSION, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for file in directory.rglob("*"):
        if file.suffix in (".safetensors", ".bin", ".pdparams"):
            file.unlink()
    return int(result.stdout.split()[-1]) * 1024


VARIANTS = {
    "float16": (float16, []), "widened": (float16, ["--dtype", "float32"]), "zip": (zipped, []),
    "pdparams": (float16, ["--format", "pdparams"]),
}
FURTHER = {
    "float32": (float32, []), "narrowed": (float32, ["--dtype", "float16"]),
    "bfloat16": (float32, ["--dtype", "bfloat16"]),
}


@pytest.fixture(scope="module")
def idle(tmp_path_factory) -> int:
    return peak(tmp_path_factory.mktemp("idle") / "nothing", float16, [], **NOTHING)


@pytest.mark.parametrize("variant", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.full) for name in FURTHER)])
def test_memory_is_bounded_and_flat_in_the_number_of_layers(variant, tmp_path, idle):
    """Two matrices of every layer fill a tile. With so many, both threads hold a full one at some time."""
    save, flags = (VARIANTS | FURTHER)[variant]
    few, many = (peak(tmp_path / str(layers), save, flags, n_layer=layers) for layers in (2, 6))
    print(f"{variant}: {idle / 1e6:.0f}, {few / 1e6:.0f} and {many / 1e6:.0f} MB")
    added = 2 * (parameters(n_layer=6) - parameters(n_layer=2))
    assert added > 300e6 and many - few <= GROWTH * added
    assert max(few, many) - idle <= ROOM


@pytest.mark.full
def test_memory_is_bounded_where_a_bin_holds_columns(tmp_path, idle):
    """Only digests and comparisons go across here; whether two of them do so at once is the scheduler's."""
    assert peak(tmp_path / "across", across, [], n_layer=4) - idle <= ROOM


def test_a_mask_of_many_positions_is_never_whole(tmp_path, idle):
    large = peak(tmp_path / "large", float16, [], **{**NOTHING, "n_positions": 8192})
    print(f"{idle / 1e6:.0f} and {large / 1e6:.0f} MB")
    assert large - idle <= (8192 * 8192) // 4


@pytest.mark.full
@pytest.mark.parametrize("variant,numbers", [("float16", (4, 14, 28)), ("widened", (2, 4)), ("float32", (2, 4)),
                                             ("narrowed", (2, 4)), ("pdparams", (2, 4))])
def test_memory_at_the_shapes_of_gptj(variant, numbers, tmp_path, idle):
    """28 layers of float16 are 12 GB, the whole model."""
    save, flags = (VARIANTS | FURTHER)[variant]
    sizes = [dict(n_embd=4096, n_inner=None, vocab_size=50400, n_positions=2048, n_layer=number) for number in numbers]
    peaks = [peak(tmp_path / str(number), save, flags, **size) for number, size in zip(numbers, sizes, strict=True)]
    print(f"{variant}: {', '.join(f'{nbytes / 1e6:.0f}' for nbytes in peaks)} MB")
    assert max(peaks) - idle <= ROOM
    assert max(peaks) - min(peaks) <= GROWTH * 2 * (parameters(**sizes[-1]) - parameters(**sizes[0]))
