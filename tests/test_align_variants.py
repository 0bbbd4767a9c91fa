"""Every variant that a family lists, as the demo's net: forward and loss are aligned with our own net."""

import pytest
from align_fixtures import Workshop, all_aligned

from convert.__main__ import families, family_named
from convert.demo import build_demo

VARIANTS = [pytest.param(family, changes, id=f"{family.name}-{variant}")
            for family in map(family_named, families()) for variant, changes in family.variants.items()]


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_every_variant_that_a_family_lists_is_aligned(family, changes, tmp_path):
    shop = Workshop(tmp_path)
    run = shop.convert(family.name, build_demo(family, tmp_path / "source", changes), "net")
    trust = ("--trust-remote-code",) if family.remote_code else ()
    assert all_aligned({stage: shop.align(stage, run, "--target", "models", *trust) for stage in ("forward", "loss")})
