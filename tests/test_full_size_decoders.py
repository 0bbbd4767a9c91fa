"""OPT and BLOOM at full size by header only: total plans, memory and shards of up to 176 billion parameters.

The checkpoints are files of the right apparent size whose data is a hole; names and shapes are those of transformers'
own classes. How many parameters BLOOM has is published in each model's card; OPT's are counted from the sizes in table
1 of Zhang et al. 2022.
"""

import re
from math import ceil, prod

import pytest
from sparse_fixtures import room_taken, shapes_of, sparse_checkpoint
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

OPT = {  # layers, hidden, heads
    "opt-125m": (12, 768, 12), "opt-350m": (24, 1024, 16), "opt-1.3b": (24, 2048, 32), "opt-2.7b": (32, 2560, 32),
    "opt-6.7b": (32, 4096, 32), "opt-13b": (40, 5120, 40), "opt-30b": (48, 7168, 56), "opt-66b": (64, 9216, 72),
    "opt-175b": (96, 12288, 96),
}
BLOOM = {
    "bloom-560m": (24, 1024, 16), "bloom-1b1": (24, 1536, 16), "bloom-1b7": (24, 2048, 16), "bloom-3b": (30, 2560, 32),
    "bloom-7b1": (30, 4096, 32), "bloom": (70, 14336, 112),
}
PUBLISHED = {
    "bloom-560m": 559_214_592, "bloom-1b1": 1_065_314_304, "bloom-1b7": 1_722_408_960, "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064, "bloom": 176_247_271_424,
}
SHARD = 10**10


def opt_parameters(name):
    """Words and positions, 12 d^2 + 13 d a layer, and the last norm, or (350m) two projections to 512 channels."""
    layers, d, _ = OPT[name]
    words, behind = (512, 2 * 512 * d) if name == "opt-350m" else (d, 2 * d)
    return 50272 * words + 2050 * d + layers * (12 * d * d + 13 * d) + behind


PARAMETERS = PUBLISHED | {name: opt_parameters(name) for name in OPT}


def source(directory, name, without=()):
    """(a checkpoint of that shape without some tensors, the shapes in it). BLOOM's keys on the hub have no prefix."""
    if name in OPT:
        layers, hidden, heads = OPT[name]
        like_350m = dict(word_embed_proj_dim=512, do_layer_norm_before=False) if name == "opt-350m" else {}
        cls, dtype = OPTForCausalLM, "float16"
        config = OPTConfig(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_dim=4 * hidden,
                           architectures=["OPTForCausalLM"], **like_350m)
        shapes = shapes_of(cls, config)
    else:
        layers, hidden, heads = BLOOM[name]
        config = BloomConfig(n_layer=layers, hidden_size=hidden, n_head=heads, pad_token_id=3,
                             architectures=["BloomForCausalLM"])
        dtype = "bfloat16"
        shapes = {key.removeprefix("transformer."): shape
                  for key, shape in shapes_of(BloomForCausalLM, config).items()}
    shapes = {key: shape for key, shape in shapes.items() if key not in without}
    return sparse_checkpoint(directory, config, shapes, dtype, SHARD), shapes


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_plan_is_total_and_tells_bytes_shards_and_memory(tmp_path, convert, name):
    directory, shapes = source(tmp_path / name, name)
    assert sum(map(prod, shapes.values())) == PARAMETERS[name]
    assert sum(file.stat().st_size for file in directory.iterdir()) > 2 * PARAMETERS[name]
    assert room_taken(directory) < 2_000_000

    run = convert(directory, "--dry-run", family="opt" if name in OPT else "bloom", output=f"out/{name}")
    assert run.code == 0, run.stderr
    assert not run.output.exists()
    if name in OPT:
        shapes["lm_head.weight"] = shapes["model.decoder.embed_tokens.weight"]  # PaddleNLP's head is not tied
    total = 2 * sum(map(prod, shapes.values()))
    said = re.search(r"in all ([\d,]+) bytes of tensors in (\d+) file\(s\); expected memory at most ([\d,]+) MB",
                     run.stdout)
    found, files, memory = (int(number.replace(",", "")) for number in said.groups())
    assert found == total
    assert ceil(total / 5e9) <= files <= 2 * ceil(total / 5e9)
    assert memory < 200
    assert f"{len(shapes)} tensors" in run.stdout
    sizes = [int(size.replace(",", "")) for size in re.findall(r"\.safetensors: ([\d,]+) bytes", run.stdout)]
    assert len(sizes) == files and total < sum(sizes) < total + 10**6
    largest = max(2 * prod(shape) for shape in shapes.values())
    assert max(sizes) < max(5e9, largest) + 10**5


@pytest.mark.parametrize("name,missing", [
    ("opt-175b", "model.decoder.layers.95.fc2.bias"), ("bloom", "h.69.self_attention.query_key_value.weight")])
def test_one_tensor_too_few_of_a_thousand_is_named(tmp_path, refused, name, missing):
    directory, _ = source(tmp_path / name, name, without=(missing,))
    target = {"opt-175b": "opt.decoder.layers.95.linear2.bias",
              "bloom": "bloom.h.69.self_attention.query_key_value.weight"}[name]
    refused(directory, "--dry-run", family="opt" if name in OPT else "bloom", output=f"out/{name}",
            says=("1 target tensor that no source tensor fills", target))


@pytest.mark.parametrize("name", ["opt-175b", "bloom"])
def test_a_config_of_another_size_is_refused_with_both_shapes(tmp_path, refused, name):
    directory, _ = source(tmp_path / name, name)
    file = directory / "config.json"
    hidden = (OPT | BLOOM)[name][1]
    other = hidden // 2  # which the heads divide, too
    file.write_text(file.read_text().replace(f'"hidden_size": {hidden}', f'"hidden_size": {other}'))
    refused(directory, "--dry-run", family="opt" if name in OPT else "bloom", output=f"out/{name}",
            says=("has shape", f"the config asks for [{250880 if name == 'bloom' else 2050}, {other}]"))
