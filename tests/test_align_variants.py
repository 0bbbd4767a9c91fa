"""Every variant that a family lists, as the demo's net: forward and loss are aligned with our own net."""

import pytest
from align_fixtures import Workshop, all_aligned
from conftest import fast

from convert.__main__ import families, family_named
from convert.demo import build_demo

VARIANTS = {f"{family.name}-{variant}": (family, changes)
            for family in map(family_named, families()) for variant, changes in family.variants.items()}


@pytest.mark.parametrize("variant", fast(
    VARIANTS, "bert-gelu_new", "bloom-sliced", "chatglm-positions of one dimension", "gpt2-scores scaled by 1 / layer",
    "gptj-every channel turned", "opt-post-norm", "resnet-both", "t5-max_distance 40"))
def test_every_variant_that_a_family_lists_is_aligned(variant, tmp_path):
    family, changes = VARIANTS[variant]
    shop = Workshop(tmp_path)
    run = shop.convert(family.name, build_demo(family, tmp_path / "source", changes), "net")
    trust = ("--trust-remote-code",) if family.remote_code else ()
    assert all_aligned({stage: shop.align(stage, run, "--target", "models", *trust) for stage in ("forward", "loss")})
