"""Back to torch: to the byte what ``save_pretrained`` of the loaded original writes, for every family that is here."""

import importlib
import json
import shutil
import subprocess
import sys

import chatglm_fixtures
import numpy as np
import paddle
import pytest
import torch
import transformers
from conftest import call, files_under
from safetensors.numpy import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import no_init_weights

import convert.demo
import models
from align.report import SCHEMA
from convert.__main__ import families, family_named
from convert.back import main as back_main
from convert.cli import main as convert_main
from convert.report import latest_run
from convert.writer import Staging

FAMILIES = [family_named(name) for name in families()]
HEADS = [(family, head) for family in FAMILIES for head in family.heads]
PADDLENLP = [(family, head) for family, head in HEADS if head.paddlenlp]
VARIANTS = [(family, changes) for family in FAMILIES for changes in family.variants.values()] + [
    (family_named(name), changes) for name, changes in (
        ("bert", dict(tie_word_embeddings=False)), ("bert", dict(hidden_act="prelu")),
        ("bloom", dict(tie_word_embeddings=False)), ("gpt2", dict(tie_word_embeddings=False, n_inner=96)),
        ("opt", dict(word_embed_proj_dim=32, do_layer_norm_before=False)), ("opt", dict(tie_word_embeddings=False)),
        ("opt", dict(enable_bias=False)),
        ("t5", dict(feed_forward_proj="relu", tie_word_embeddings=True)), ("t5", dict(num_layers=1)))]
FREE = {"_name_or_path", "architectures", "transformers_version"}
PADDLENLP_SAYS = {"n_inner": "null, which a conversion spells out", "bos_token_id": "set by PaddleNLP's T5Config"}


def named(pairs):
    return [pytest.param(*pair, id="-".join(getattr(part, "architecture", getattr(part, "name", str(part)))
                                            for part in pair)) for pair in pairs]


def torch_class(family, head, directory):
    """The reference: transformers' class, or that of the code which the checkpoint brings along."""
    if not family.remote_code:
        return getattr(transformers, head.architecture)
    for file in sorted((convert.demo.REMOTE / family.name).glob("*.py")):
        shutil.copy(file, directory)
    return get_class_from_dynamic_module(f"modeling_{family.name}.{head.architecture}", str(directory))


def random_model(cls, config, dtype):
    torch.manual_seed(7)
    with no_init_weights():  # which fails where OPT's norms have no weights
        model = cls(cls.config_class(**config)).to(dtype)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.fill_(1000 + len(name))
    return model


def original(family, head, directory, dtype=torch.float32, **overrides):
    """A random model in ``family``'s demo sizes, saved, and the bytes that its class writes once it is loaded again."""
    (directory / "source").mkdir()
    cls = torch_class(family, head, directory / "source")
    model = random_model(cls, {**family.demo, **overrides, "architectures": None},
                         torch.float16 if family.remote_code else dtype)
    saved(model, directory / "source")
    saved(cls.from_pretrained(directory / "source", torch_dtype="auto"), directory / "expected")
    return directory / "source", (directory / "expected/model.safetensors").read_bytes()


def saved(model, directory):
    """``save_pretrained``, also of a class that does not say which of its tensors are one, so that it refuses."""
    model._tied_weights_keys = model._tied_weights_keys or (
        ["lm_head.weight"] if model.config.tie_word_embeddings and hasattr(model, "lm_head") else None)
    model.save_pretrained(directory)


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


@pytest.fixture
def there(checkpoint, workdir):
    """``there(head, *flags)``: the source and the conversion of a tiny model of the shared fixtures."""
    def make(head="GPTJForCausalLM", *flags, **overrides):
        source = checkpoint(head, **overrides)
        return source, workdir / converted(family_named("bert" if head.startswith("Bert") else "gptj"), source, *flags)
    return make


@pytest.fixture
def refused(workdir):
    """One sentence, exit code 2, and every file as it was."""
    def check(*arguments, says):
        before = files_under(workdir)
        code, _, said = call(back_main, [str(argument) for argument in arguments])
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        assert says in said
        assert files_under(workdir) == before
    return check


# --- what comes back


@pytest.mark.parametrize("family,head", named(HEADS))
@pytest.mark.parametrize("form", ["safetensors", "pdparams"])
def test_every_head_comes_back_to_the_byte(family, head, form, tmp_path, workdir):
    source, expected = original(family, head, tmp_path)
    told = back(converted(family, source, "--format", form))
    assert (workdir / "out/back/model.safetensors").read_bytes() == expected
    assert config(workdir / "out/back") == config(source)
    assert f"it has the digest of {source}" in told


@pytest.mark.parametrize("family,changes", named(VARIANTS))
def test_every_variant_comes_back_to_the_byte(family, changes, tmp_path, workdir):
    source, expected = original(family, family.heads[0], tmp_path, torch.bfloat16, **changes)
    back(converted(family, source))
    assert (workdir / "out/back/model.safetensors").read_bytes() == expected
    assert config(workdir / "out/back") == config(source)


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in FAMILIES])
def test_shards_hold_the_same_tensors_and_load(family, tmp_path, workdir):
    source, _ = original(family, family.heads[0], tmp_path)
    back(converted(family, source, "--shard-size", "60KB"), "--shard-size", "50KB")
    index = json.loads((workdir / "out/back/model.safetensors.index.json").read_text())
    shards = sorted((workdir / "out/back").glob("model-*.safetensors"))
    assert len(shards) > 2 and {file.name for file in shards} == set(index["weight_map"].values())
    found = {name: (tensor, file.name) for file in shards for name, tensor in load_file(file).items()}
    expected = load_file(tmp_path / "expected/model.safetensors")
    assert {name: place for name, (_, place) in found.items()} == index["weight_map"]
    assert found.keys() == expected.keys()
    assert all(found[name][0].tobytes() == expected[name].tobytes() and found[name][0].shape == expected[name].shape
               for name in expected)
    _, info = torch_class(family, family.heads[0], workdir / "out/back").from_pretrained(
        workdir / "out/back", output_loading_info=True)
    assert not any(info.values())


def test_old_names_and_what_old_files_carry_come_back_as_todays(torch_model, workdir, tmp_path):
    model = torch_model("BertForPreTraining")
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
             for name, tensor in model.state_dict().items()}
    state["bert.embeddings.position_ids"] = torch.arange(20)[None]
    assert {"cls.predictions.decoder.weight", "bert.embeddings.LayerNorm.gamma"} <= state.keys()
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old/pytorch_model.bin")
    model.config.architectures = ["BertForMaskedLM"]
    model.config.save_pretrained(tmp_path / "old")
    transformers.BertForPreTraining.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "today")
    told = back(converted(family_named("bert"), tmp_path / "old"))
    assert (workdir / "out/back/model.safetensors").read_bytes() == (tmp_path / "today/model.safetensors").read_bytes()
    assert config(workdir / "out/back") == config(tmp_path / "old")
    assert "digest of" not in told


def test_a_cast_on_the_way_is_torchs(there, workdir):
    source, out = there("BertForSequenceClassification", "--dtype", "float16")
    back(out, "--dtype", "float32")
    model = transformers.BertForSequenceClassification.from_pretrained(source)
    expected = model.half().float().state_dict()
    found = load_file(workdir / "out/back/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name].numpy()) for name in found)
    assert config(workdir / "out/back") == config(source)
    back(out, output="out/half")
    assert config(workdir / "out/half") == {**config(source), "torch_dtype": "float16"}


def test_the_config_of_a_half_checkpoint_is_the_originals(tmp_path, workdir):
    family = family_named("gptj")
    source, _ = original(family, family.heads[0], tmp_path, torch.float16, pad_token_id=None)
    out = converted(family, source)
    changed = config(workdir / out)
    assert (changed["dtype"], changed["pad_token_id"]) == ("float32", 256) and "torch_dtype" not in changed
    back(out)
    assert config(workdir / "out/back") == config(source)
    assert config(source)["torch_dtype"] == "float16" and config(source).get("pad_token_id") is None
    changed |= {"pad_token_id": 7, "id2label": {"0": "no", "1": "yes"}}
    (workdir / out / "config.json").write_text(json.dumps(changed))
    told = back(out, output="out/edited")
    assert config(workdir / "out/edited") == {**config(source), "pad_token_id": 7, "id2label": changed["id2label"]}
    assert "note: config.json: pad_token_id = 7 is kept" in told


def test_what_batch_norms_counted_comes_back(tmp_path, workdir):
    family = family_named("resnet")
    source, expected = original(family, family.heads[0], tmp_path)
    tracked = [value for name, value in load_file(source / "model.safetensors").items()
               if name.endswith("num_batches_tracked")]
    assert len({int(value) for value in tracked}) > 1 and all(value.dtype == np.int64 for value in tracked)
    out = converted(family, source)
    back(out)
    assert (workdir / "out/back/model.safetensors").read_bytes() == expected
    (workdir / out / "paddle_parity.json").unlink()
    back(out, output="out/zeros")
    zeros = load_file(workdir / "out/zeros/model.safetensors")
    assert {int(value) for name, value in zeros.items() if name.endswith("num_batches_tracked")} == {0}
    ours = transformers.ResNetForImageClassification.from_pretrained(workdir / "out/zeros").eval()
    theirs = transformers.ResNetForImageClassification.from_pretrained(source).eval()
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(pixels).logits, theirs(pixels).logits)


def test_norms_without_weights_come_back_to_nothing(tmp_path, workdir):
    """transformers saves such an OPT and fails to load it, so what it saved first is what is expected."""
    family = family_named("opt")
    model = random_model(transformers.OPTForCausalLM, {**family.demo, "layer_norm_elementwise_affine": False},
                         torch.float32)
    saved(model, tmp_path / "source")
    back(converted(family, tmp_path / "source"))
    found = (workdir / "out/back/model.safetensors").read_bytes()
    assert found == (tmp_path / "source/model.safetensors").read_bytes() and b"layer_norm" not in found


def test_tokenizer_files_come_along_and_code_does_not(tmp_path, workdir):
    source = chatglm_fixtures.save_checkpoint(tmp_path / "glm")
    (source / "vocab.txt").write_text("a\nb\n")
    told = back(converted(family_named("chatglm"), source))
    assert (workdir / "out/back/vocab.txt").read_bytes() == (source / "vocab.txt").read_bytes()
    assert list(source.glob("*.py")) and not list((workdir / "out").rglob("*.py"))
    assert "auto_map, is not in a Paddle checkpoint: copy it from the original" in told


# --- checkpoints that others saved


def paddlenlp_class(family, head):
    return getattr(importlib.import_module(f"paddlenlp.transformers.{family.paddlenlp or family.name}.modeling"),
                   head.paddlenlp)


@pytest.mark.parametrize("family,head", named(PADDLENLP))
def test_what_paddlenlp_saves_comes_back_without_our_marker(family, head, tmp_path, workdir):
    source, expected = original(family, head, tmp_path)
    dtype = "float16" if family.remote_code else "float32"
    net = paddlenlp_class(family, head).from_pretrained(converted(family, source), dtype=dtype)
    safe = head is family.heads[0]
    net.save_pretrained(str(tmp_path / "saved"), safe_serialization=safe)
    assert not (tmp_path / "saved/paddle_parity.json").exists()
    assert (tmp_path / "saved/model.safetensors").exists() == safe
    back(tmp_path / "saved")
    assert (workdir / "out/back/model.safetensors").read_bytes() == expected
    ours, theirs = (torch_class(family, head, directory).from_pretrained(directory, torch_dtype="auto").config.to_dict()
                    for directory in (workdir / "out/back", source))
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= FREE | PADDLENLP_SAYS.keys()


@pytest.mark.parametrize("name,form", [("gptj", "safetensors"), ("bert", "pdparams"), ("gpt2", "safetensors")])
def test_trained_in_paddle_computes_the_same_in_torch(name, form, tmp_path, workdir):
    """Two steps of Adam in models/, saved as Paddle's users do, back, and loaded by transformers."""
    family = family_named(name)
    source, before = original(family, family.heads[0], tmp_path)
    out = converted(family, source, "--format", form)
    net = models.from_pretrained(workdir / out)
    ids = paddle.randint(5, 200, [2, 12])
    optimizer = paddle.optimizer.Adam(1e-2, parameters=net.parameters())
    for _ in range(2):
        first = next(iter(net(input_ids=ids).values()))
        (first.square().mean()).backward()
        optimizer.step()
        optimizer.clear_grad()
    (tmp_path / "trained").mkdir()
    shutil.copy(workdir / out / "config.json", tmp_path / "trained")
    shutil.copy(workdir / out / "paddle_parity.json", tmp_path / "trained")
    paddle.save(net.state_dict(), str(tmp_path / "trained/model_state.pdparams"))
    told = back(tmp_path / "trained")
    assert "trained or changed since" in told
    assert (workdir / "out/back/model.safetensors").read_bytes() != before
    cls = getattr(transformers, family.heads[0].architecture)
    theirs, info = cls.from_pretrained(workdir / "out/back", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values())
    net.eval()
    ours = next(iter(net(input_ids=ids).values())).numpy().astype(np.float64)
    with torch.no_grad():
        single = theirs.eval()(input_ids=torch.tensor(ids.numpy()))[0].double().numpy()
        exact = theirs.double()(input_ids=torch.tensor(ids.numpy()))[0].numpy()
    noise = np.linalg.norm(single - exact) / np.linalg.norm(exact)
    assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) <= 6 * noise


# --- what is refused


def test_tied_copies_that_were_trained_apart_are_refused(there, refused):
    _, out = there("BertForMaskedLM")
    tensors = load_file(out / "model.safetensors")
    tensors["cls.predictions.decoder.weight"][3, 5] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "np"})
    refused("--source", out, "--output", "out/back", says="cls.predictions.decoder.weight in the source is not the "
            "same as bert.embeddings.word_embeddings.weight, although the two are tied")


def test_what_is_trained_apart_comes_back_where_the_config_says_untied(tmp_path, workdir):
    family = family_named("opt")
    source, _ = original(family, family.heads[0], tmp_path)
    out = workdir / converted(family, source)
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.decoder_weight"] = tensors["lm_head.decoder_weight"] + np.float32(1)
    save_file(tensors, out / "model.safetensors", metadata={"format": "np"})
    (out / "config.json").write_text(json.dumps({**config(out), "tie_word_embeddings": False}))
    back(out)
    model, info = transformers.OPTForCausalLM.from_pretrained(workdir / "out/back", output_loading_info=True)
    assert not any(info.values()) and not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight + 1)


def test_zeros_that_training_has_moved_are_refused(tmp_path, refused, workdir):
    family = family_named("opt")
    source, _ = original(family, family.heads[0], tmp_path, enable_bias=False)
    out = workdir / converted(family, source)
    tensors = load_file(out / "model.safetensors")
    tensors["opt.decoder.layers.1.linear1.bias"][0] = 1e-3
    save_file(tensors, out / "model.safetensors", metadata={"format": "np"})
    refused("--source", out, "--output", "out/back",
            says="opt.decoder.layers.1.linear1.bias in the source is not the 0 that this family has")


def test_a_torch_checkpoint_is_refused(there, refused, workdir):
    source, out = there()
    refused("--source", source, "--output", "out/back", says="model.safetensors was written for torch")
    torch.save(transformers.GPTJForCausalLM.from_pretrained(source).state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    refused("--source", source, "--output", "out/back", says="pytorch_model.bin was written for torch")
    back(out)
    refused("--source", "out/back", "--output", "out/again", says="model.safetensors was written for torch")
    torch.save({"tokens.weight": torch.ones(2, 3)}, "my.pt")  # without a config.json, which is not what is wrong
    refused("--source", "my.pt", "--output", "out/again", says="my.pt was written for torch. Give a Paddle checkpoint")


def test_old_weights_beside_trained_ones_are_not_taken_for_them(there, refused, workdir):
    _, out = there()
    paddle.save({name: paddle.to_tensor(array) + (1 if "lm_head" in name else 0)
                 for name, array in load_file(out / "model.safetensors").items()}, str(out / "model_state.pdparams"))
    refused("--source", out, "--output", "out/back", says=f"{out} holds model.safetensors and model_state.pdparams. "
            f"Say which is meant: --source {out}/model_state.pdparams")
    back(out / "model_state.pdparams")
    found = load_file(workdir / "out/back/model.safetensors")
    assert np.array_equal(found["lm_head.bias"], load_file(out / "model.safetensors")["lm_head.bias"] + 1)


def test_what_is_no_paddle_checkpoint_of_a_known_family_is_refused(there, refused, tmp_path):
    _, out = there()
    refused("--source", tmp_path / "nowhere", says="nowhere does not exist")
    refused(says="give --source")
    (tmp_path / "empty").mkdir()
    refused("--source", tmp_path / "empty", says="there is no config.json")
    for kind, told in (("mamba", "model_type is 'mamba'"), (None, "there is no model_type"), (["gptj"], "['gptj']")):
        (out / "config.json").write_text(json.dumps({"model_type": kind}))
        refused("--source", out, "--output", "out/back", says=told)
    (out / "config.json").write_text("{")
    refused("--source", out, "--output", "out/back", says="config.json cannot be read as JSON")


def test_names_shapes_and_values_are_held_to_the_plan(there, refused):
    _, out = there()
    tensors = load_file(out / "model.safetensors")

    def with_change(change, *flags, says):
        changed = {name: array.copy() for name, array in tensors.items()}
        change(changed)
        save_file(changed, out / "model.safetensors", metadata={"format": "np"})
        refused("--source", out, "--output", "out/back", *flags, says=says)

    with_change(lambda held: held.update(extra=np.zeros(3, np.float32)),
                says="1 source tensor that no rule claims: extra")
    with_change(lambda held: held.pop("transformer.ln_f.bias"), says="1 target tensor that no source tensor fills")
    with_change(lambda held: held.update({"lm_head.weight": held["lm_head.weight"].T.copy()}),
                says="lm_head.weight has shape [40, 16], the config asks for [16, 40] (hidden 16 x vocab 40)")
    with_change(lambda held: held["lm_head.bias"].fill(np.nan), says="lm_head.bias holds NaN or inf")
    with_change(lambda held: held["lm_head.bias"].fill(1e9), "--dtype", "float16", says="overflows float16")
    with_change(lambda held: held["transformer.h.1.attn.bias"].fill(1), says="is not the causal mask")


def test_outputs_are_replaced_only_where_they_are_ours(there, refused, workdir):
    source, out = there()
    back(out)
    refused("--source", out, "--output", "out/back", says="out/back exists. Give --overwrite")
    back(out, "--overwrite")
    refused("--source", out, "--output", source, "--overwrite", says="is not a conversion of ours; it is not touched")
    refused("--source", out, "--output", out, "--overwrite", says="would replace the source")
    refused("--source", out, "--output", "..", says="no last component")
    refused("--source", out, "--output", "out/x", "--shard-size", "many", says="--shard-size many is not a size")


def test_a_marker_that_says_nonsense_is_as_good_as_none(there, workdir):
    source, out = there()
    for text in ("{", "[]", '{"config": 3, "numbers": [1]}', '{"config": {"n_embd": 4}, "target_digest": 5}'):
        (out / "paddle_parity.json").write_text(text)
        back(out, "--overwrite") if (workdir / "out/back").exists() else back(out)
        assert (workdir / "out/back/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


# --- the command


def test_the_report_is_one_of_its_own(there, workdir):
    source, out = there()
    shutil.move(workdir / "reports/there", workdir / "reports/first")
    back(out, output="backs/there")
    report = json.loads((workdir / "reports/there/back.json").read_text())
    forth = json.loads((workdir / "reports/first/convert.json").read_text())
    assert report.keys() == forth.keys()
    assert (report["schema"], report["stage"], report["verified"]) == (SCHEMA, "back", True)
    assert (report["source_digest"], report["target_digest"]) == (forth["target_digest"], forth["source_digest"])
    assert {row["target"]: row["shape"] for row in report["tensors"]} == {
        name: list(array.shape) for name, array in load_file(source / "model.safetensors").items()}
    assert "converted from Paddle to torch" in (workdir / "reports/there/back.md").read_text()
    (workdir / "reports/first").rename(workdir / "reports/kept")
    assert latest_run(workdir / "reports") == "there"


def test_a_report_of_a_conversion_of_that_name_stays(there, workdir):
    _, out = there()
    back(out, output="elsewhere/there")
    assert {path.name for path in (workdir / "reports/there").iterdir()} == {
        "convert.json", "convert.md", "back.json", "back.md"}


def test_flags(there, workdir):
    _, out = there()
    before = files_under(workdir)
    told = back(out, "--dry-run")
    assert "shape in torch" in told and "Nothing was written (--dry-run)" in told
    assert "name map, Paddle to torch" in back(out, "--rules")
    assert files_under(workdir) == before
    assert "NOT verified" in back(out, "--no-verify")
    told = call(back_main, ["--source", str(out)])[1]
    assert (workdir / "out/there-torch/model.safetensors").is_file() and "out/there-torch:" in told
    told = call(back_main, ["--source", str(out / "model.safetensors"), "--overwrite", "--reports", "elsewhere"])[1]
    assert "out/there-torch:" in told and (workdir / "elsewhere/there-torch/back.json").is_file()


def test_a_family_file_of_ones_own(there, workdir, tmp_path):
    source, out = there()
    mine = (convert.demo.REMOTE.parent / "gptj.py").read_text().replace('name="gptj"', 'name="mine"')
    (tmp_path / "mine.py").write_text(mine)
    for directory in (source, out):
        (directory / "config.json").write_text(json.dumps({**config(directory), "model_type": "mine"}))
    assert "is of no family that is known here" in call(back_main, ["--source", str(out)])[2]
    back(out, "--family", str(tmp_path / "mine.py"))
    assert (workdir / "out/back/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert "name map" in call(back_main, ["--rules", "--family", str(tmp_path / "mine.py")])[1]


def test_what_came_back_converts_again(there, workdir):
    _, out = there()
    back(out)
    code, _, said = call(convert_main, family_named("gptj"), ["--source", "out/back", "--output", "out/again"])
    assert code == 0, said
    assert (workdir / "out/again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    code, _, said = call(convert_main, family_named("gptj"), ["--source", str(out), "--output", "out/never"])
    assert code == 2 and "python -m convert.back --source" in said


def test_a_result_that_is_not_the_source_is_never_published(there, workdir, monkeypatch):
    """A disk that loses one bit, once."""
    _, out = there()
    honest, lost = Staging.write, []

    def write(self, file, data, offset):
        if not lost:
            lost.append(offset)
            data = memoryview(bytes([data[0] ^ 1, *data[1:]]))
        honest(self, file, data, offset)

    monkeypatch.setattr(Staging, "write", write)
    code, _, said = call(back_main, ["--source", str(out), "--output", "out/back"])
    assert code == 4 and "bit for bit" in said
    assert not (workdir / "out/back").exists() and not (workdir / "reports/back").exists()


def test_help_and_usage(workdir):
    slow = "import sys; sys.argv = ['back', '--help']\nimport runpy\ntry: runpy.run_module('convert.back')\n" \
           "except SystemExit: pass\nassert 'numpy' not in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", slow], check=False).returncode == 0
    assert call(back_main, ["--dtype", "int8"])[0] == 2
