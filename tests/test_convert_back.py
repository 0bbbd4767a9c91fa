"""Back to torch: to the byte what ``save_pretrained`` of the loaded original writes, for every family that is here."""

import importlib
import json

import pytest
import torch
import transformers

from convert.__main__ import families, family_named
from convert.back import main as back_main
from convert.cli import main as convert_main
from tests.conftest import call

FAMILIES = [family_named(name) for name in families()]
HEADS = [(family, head) for family in FAMILIES for head in family.heads if hasattr(transformers, head.architecture)]
VARIANTS = [(family, name) for family in FAMILIES for name in family.variants
            if hasattr(transformers, family.heads[0].architecture)]


def named(pairs):
    return [pytest.param(*pair, id="-".join(getattr(part, "architecture", getattr(part, "name", part))
                                            for part in pair)) for pair in pairs]


def original(family, head, directory, dtype=torch.float32, **overrides):
    """A random model of transformers' class in ``family``'s demo sizes, saved; what it writes once it is loaded again."""
    torch.manual_seed(7)
    cls = getattr(transformers, head.architecture)
    config = {**family.demo, **overrides, "architectures": None}
    model = cls(cls.config_class(**config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(len(name))
    model.save_pretrained(directory / "source")
    loaded = cls.from_pretrained(directory / "source", torch_dtype="auto")
    loaded.save_pretrained(directory / "expected")
    return directory / "source", (directory / "expected/model.safetensors").read_bytes()


def converted(family, source, *flags):
    code, _, said = call(convert_main, family, ["--source", str(source), "--output", "out/there", *flags])
    assert code == 0, said
    return "out/there"


def back(source, *flags, output="out/back"):
    code, told, said = call(back_main, ["--source", str(source), "--output", output, *flags])
    assert code == 0, said
    return told


def config(directory):
    return json.loads((directory / "config.json").read_text("utf-8"))


@pytest.mark.parametrize("family,head", named(HEADS))
@pytest.mark.parametrize("form", ["safetensors", "pdparams"])
def test_every_head_comes_back_to_the_byte(family, head, form, tmp_path, workdir):
    source, expected = original(family, head, tmp_path)
    told = back(converted(family, source, "--format", form))
    assert (workdir / "out/back/model.safetensors").read_bytes() == expected
    assert config(workdir / "out/back") == config(source)
    assert f"it has the digest of {source}" in told


@pytest.mark.parametrize("family,name", named(VARIANTS))
def test_every_variant_comes_back_to_the_byte(family, name, tmp_path, workdir):
    source, expected = original(family, family.heads[0], tmp_path, torch.bfloat16, **family.variants[name])
    back(converted(family, source))
    assert (workdir / "out/back/model.safetensors").read_bytes() == expected
    assert config(workdir / "out/back") == config(source)


# --- checkpoints that PaddleNLP saved


PADDLENLP = [(family, head) for family, head in HEADS if head.paddlenlp]


def paddlenlp_class(family, head):
    return getattr(importlib.import_module(f"paddlenlp.transformers.{family.paddlenlp or family.name}.modeling"),
                   head.paddlenlp)


@pytest.mark.parametrize("family,head", named(PADDLENLP))
@pytest.mark.parametrize("safe", [False, True], ids=["pdparams", "safetensors"])
def test_what_paddlenlp_saves_again_comes_back_without_our_marker(family, head, safe, tmp_path, workdir):
    source, expected = original(family, head, tmp_path)
    net = paddlenlp_class(family, head).from_pretrained(converted(family, source), dtype="float32")
    net.save_pretrained(str(tmp_path / "saved"), safe_serialization=safe)
    assert not (tmp_path / "saved/paddle_parity.json").exists()
    back(tmp_path / "saved")
    assert (workdir / "out/back/model.safetensors").read_bytes() == expected
    ours = getattr(transformers, head.architecture).from_pretrained(workdir / "out/back", torch_dtype="auto")
    theirs = getattr(transformers, head.architecture).from_pretrained(source, torch_dtype="auto")
    assert ours.dtype == torch.float32
    left, right = ours.config.to_dict(), theirs.config.to_dict()
    assert {key for key in right if left.get(key) != right[key]} <= {"_name_or_path", "architectures"}
