"""GPT-2 at its four published sizes by header only: the plan is total, and PaddleNLP's config has the right widths."""

from math import prod

import pytest
from sparse_fixtures import shapes_of, sparse_checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from convert.checkpoint import opened, read_config
from convert.direction import target_config
from convert.gpt2 import FAMILY
from convert.plan import make_plan

SIZES = {  # layers, width, heads, parameters (the hub's model cards round them to 124M, 355M, 774M and 1.5B)
    "gpt2": (12, 768, 12, 124_439_808), "gpt2-medium": (24, 1024, 16, 354_823_168),
    "gpt2-large": (36, 1280, 20, 774_030_080), "gpt2-xl": (48, 1600, 25, 1_557_611_200),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_is_total_and_cuts_every_fused_tensor_in_three(tmp_path, convert, name):
    layers, width, heads, parameters = SIZES[name]
    assert parameters == (50257 + 1024) * width + layers * (12 * width**2 + 13 * width) + 2 * width
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, architectures=["GPT2LMHeadModel"])
    shapes = {key.removeprefix("transformer."): shape for key, shape in shapes_of(GPT2LMHeadModel, config).items()
              if key != "lm_head.weight"}
    shapes |= {f"h.{layer}.attn.bias": (1, 1, 1024, 1024) for layer in range(layers)}  # as the hub's files have it
    directory = sparse_checkpoint(tmp_path / name, config, shapes, "float32", 10**10)

    with opened(directory) as checkpoint:
        plan = make_plan(FAMILY, read_config(directory), checkpoint.tensors)
    assert plan.head.architecture == "GPT2LMHeadModel"
    assert sum(prod(move.shape) for move in plan.moves) == parameters
    assert len(plan.moves) == 16 * layers + 4
    assert {move.shape for move in plan.moves if "self_attn" in move.target and move.target.endswith("weight")} == {
        (width, width)}
    assert target_config(plan)[0]["n_inner"] == 4 * width

    run = convert(directory, "--dry-run", family="gpt2", output=f"out/{name}")
    assert run.code == 0 and not run.output.exists()
    assert f"in all {4 * parameters:,} bytes" in run.stdout
