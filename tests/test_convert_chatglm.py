"""ChatGLM-6B's conversion: names, layouts, what is checked and left out, what is refused; and that it runs no code."""

import json
import shutil

import numpy as np
import pytest
import torch
from chatglm_fixtures import TINY, as_published, config_of, save_checkpoint, state_of
from conftest import call
from safetensors.torch import load_file
from sparse_fixtures import room_taken, sparse_checkpoint

from convert.back import main as back
from convert.chatglm import FAMILY, frequencies
from convert.checkpoint import open_checkpoint
from convert.cli import main
from convert.plan import make_plan

TRANSPOSED = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
DTYPES = {"keep": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def chatglm(convert):
    """``chatglm(source, *flags)``: its conversion."""
    return lambda source, *flags: convert(source, *flags, family="chatglm")


@pytest.fixture
def no(refused):
    return lambda source, says, *flags: refused(source, *flags, says=says, family="chatglm")


def expected_of(state, bare=False):
    """Paddle's names and layouts, written once more."""
    return {("transformer." if bare else "chatglm.") + name: tensor.T if name.endswith(TRANSPOSED) else tensor
            for name, tensor in state.items() if not name.endswith(("inv_freq", "lm_head.weight"))}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.contiguous()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binary", [False, True])
def test_every_bit_arrives_under_its_name_in_its_layout(chatglm, tmp_path, dtype, binary):
    run = chatglm(save_checkpoint(tmp_path / "source", binary=binary), "--dtype", dtype)
    assert run.code == 0, run.stderr
    wanted = {name: tensor if DTYPES[dtype] is None else tensor.to(DTYPES[dtype])
              for name, tensor in expected_of(as_published(state_of(TINY))).items()}
    assert_same_bits(load_file(run.output / "model.safetensors"), wanted)
    assert run.report["verified"] and run.report["head"] == "ChatGLMForConditionalGeneration"


def test_pdparams_hold_the_same(chatglm, tmp_path):
    import paddle
    run = chatglm(save_checkpoint(tmp_path / "source"), "--format", "pdparams")
    held = paddle.load(str(run.output / "model_state.pdparams"), return_numpy=True)
    for name, tensor in expected_of(as_published(state_of(TINY))).items():
        assert np.array_equal(held[name], tensor.numpy()), name


def test_the_report_says_what_became_of_head_and_frequencies(chatglm, tmp_path):
    run = chatglm(save_checkpoint(tmp_path / "source"))
    told = {entry["source"]: entry["why"] for entry in run.report["dropped"]}
    assert len(told) == TINY["num_layers"] + 1
    assert "frequencies" in told["transformer.layers.2.attention.rotary_emb.inv_freq"]
    assert "copy of transformer.word_embeddings.weight, with the same values" in told["lm_head.weight"]
    assert any("the tensors are those of ChatGLMForConditionalGeneration" in note for note in run.report["notes"])


@pytest.mark.parametrize("head", ["ChatGLMForCausalLM", "ChatGLMModel"])
def test_paddlenlps_class_loads_all_of_it(chatglm, tmp_path, head):
    from paddlenlp.transformers.chatglm import modeling
    bare = head == "ChatGLMModel"
    run = chatglm(save_checkpoint(tmp_path / "source", bare=bare))
    net = getattr(modeling, head).from_pretrained(str(run.output), dtype="float32")
    assert net.config.num_hidden_layers == TINY["num_layers"]
    held = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    wanted = expected_of(as_published(state_of(TINY, bare=bare)), bare)
    assert held.keys() - wanted.keys() == (set() if bare else {"lm_head.decoder_weight"})
    for name, tensor in wanted.items():
        assert np.array_equal(held[name], tensor.float().numpy()), name


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_bare_model_goes_with_and_without_prefix(chatglm, tmp_path, prefix):
    source = save_checkpoint(tmp_path / "source", bare=True)
    state = {prefix + name: tensor for name, tensor in load_file(source / "model.safetensors").items()}
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    run = chatglm(source)
    assert run.report["head"] == "ChatGLMModel"
    assert_same_bits(load_file(run.output / "model.safetensors"), expected_of(as_published(state_of(TINY, bare=True)),
                                                                              bare=True))


def test_an_untied_head_is_a_tensor_of_its_own(chatglm, tmp_path):
    run = chatglm(save_checkpoint(tmp_path / "source", tie_word_embeddings=False))
    held = load_file(run.output / "model.safetensors")
    state = as_published(state_of(config_of(tie_word_embeddings=False)))
    assert torch.equal(held["lm_head.decoder_weight"], state["lm_head.weight"])
    assert not torch.equal(held["lm_head.decoder_weight"], held["chatglm.transformer.word_embeddings.weight"])


def test_a_tied_head_may_be_absent_and_must_not_differ(chatglm, no, tmp_path):
    assert chatglm(save_checkpoint(tmp_path / "without", without="lm_head", architectures=[
        "ChatGLMForConditionalGeneration"])).report["head"] == "ChatGLMForConditionalGeneration"
    source = save_checkpoint(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"][7, 3] += 1
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    shutil.rmtree("out"), shutil.rmtree("reports")
    no(source, ("lm_head.weight in the source is not the same as transformer.word_embeddings.weight", "tied"))


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("changed", [lambda held: held.float(), lambda held: None])
def test_frequencies_may_be_widened_or_absent(chatglm, tmp_path, positions, changed):
    source = save_checkpoint(tmp_path / "source", position_encoding_2d=positions, hidden_size=64)
    state = {name: changed(tensor) if name.endswith("inv_freq") else tensor
             for name, tensor in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, source / "pytorch_model.bin")
    assert chatglm(source).code == 0


@pytest.mark.parametrize("changed", [
    lambda held: (1 / 10000 ** (torch.arange(0, 2 * len(held), 2).float() / (2 * len(held)))), torch.flip,
    lambda held: held.bfloat16(), lambda held: held[:-1]], ids=["unrounded", "reversed", "bfloat16", "short"])
def test_other_frequencies_are_refused(no, tmp_path, changed):
    """A net with other frequencies turns otherwise than Paddle's, which computes its own."""
    source = save_checkpoint(tmp_path / "source", hidden_size=64)
    state = load_file(source / "model.safetensors")
    name = "transformer.layers.1.attention.rotary_emb.inv_freq"
    state[name] = torch.flip(state[name], [0]) if changed is torch.flip else changed(state[name])
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    no(source, (name, "frequencies"))


@pytest.mark.parametrize("pairs", [1, 2, 3, 8, 16, 32, 64, 128])
def test_frequencies_are_those_of_the_public_formula(pairs):
    expected = (1.0 / (10000 ** (torch.arange(0, 2 * pairs, 2).float() / (2 * pairs)))).half().float()
    assert np.array_equal(frequencies().make((pairs,)), expected.numpy())


def test_a_config_of_the_first_release_gets_the_marks_that_its_code_had(chatglm, tmp_path):
    """In March 2023 config.json had neither masks nor padding; PaddleNLP's class would take those of April."""
    from paddlenlp.transformers.chatglm.configuration import ChatGLMConfig
    source = save_checkpoint(tmp_path / "source")
    config = {key: value for key, value in TINY.items() if key not in ("mask_token_id", "gmask_token_id",
                                                                       "pad_token_id")}
    (source / "config.json").write_text(json.dumps(config))
    run = chatglm(source)
    assert [run.config[name] for name in ("mask_token_id", "gmask_token_id", "pad_token_id")] == [150000, 150001, 0]
    assert ChatGLMConfig.from_pretrained(str(source)).gmask_token_id == 130001
    assert ChatGLMConfig.from_pretrained(str(run.output)).gmask_token_id == 150001


@pytest.mark.parametrize("changes,says", [
    ({"quantization_bit": 4}, "packed integers"), ({"pre_seq_len": 128}, "P-tuning"),
    ({"multi_query_attention": True}, "ChatGLM2"), ({"num_attention_heads": 5}, "not a multiple of 20"),
    ({"num_layers": 4}, "(num_layers) says 4 layers"), ({"num_layers": 2}, "(num_layers) says 2 layers"),
    ({"hidden_size": 64}, "the config asks for"), ({"inner_hidden_size": 47}, "the config asks for [47, 32]"),
    ({"num_attention_heads": 0}, "0 heads"), ({"num_attention_heads": "4"}, "num_attention_heads"),
    ({"position_encoding_2d": False}, "inv_freq")], ids=str)
def test_a_config_that_does_not_fit_is_refused(no, tmp_path, changes, says):
    source = save_checkpoint(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({**TINY, **changes}))
    no(source, says)


def test_chatglm2_is_not_taken_for_this(no, tmp_path):
    source = save_checkpoint(tmp_path / "source")
    config = {key: value for key, value in TINY.items() if key != "num_layers"}
    (source / "config.json").write_text(json.dumps(config))
    no(source, "ChatGLM2 and later")


def test_a_missing_and_a_surplus_tensor_are_named(no, tmp_path):
    no(save_checkpoint(tmp_path / "missing", without="layers.1.mlp.dense_4h_to_h.bias"),
       ("no source tensor fills", "chatglm.transformer.layers.1.mlp.dense_4h_to_h.bias"))
    source = save_checkpoint(tmp_path / "prefix", binary=True)
    state = torch.load(source / "pytorch_model.bin")
    torch.save(state | {"transformer.prefix_encoder.embedding.weight": torch.ones(2, 2)}, source / "pytorch_model.bin")
    no(source, ("no rule claims", "transformer.prefix_encoder.embedding.weight"))


def test_no_code_of_a_checkpoint_is_run(chatglm, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    source, marker = save_checkpoint(tmp_path / "source"), tmp_path / "ran"
    for name in ("modeling_chatglm.py", "configuration_chatglm.py", "tokenization_chatglm.py"):
        (source / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    run = chatglm(source)
    assert run.code == 0 and not marker.exists()
    assert not list(run.output.glob("*.py"))


def test_every_tensor_comes_back_to_the_bit(chatglm, tmp_path):
    """Paddle to torch: the frequencies too; of the tied table one, as ``save_pretrained`` writes it."""
    run = chatglm(save_checkpoint(tmp_path / "source"))
    code, _, said = call(back, ["--source", str(run.output), "--output", str(tmp_path / "back")])
    assert code == 0, said
    wanted = as_published(state_of(TINY))
    del wanted["lm_head.weight"]
    assert_same_bits(load_file(tmp_path / "back" / "model.safetensors"), wanted)


# THUDM/chatglm-6b -----------------------------------------------------------------------------------------------------

PUBLISHED = {  # vocabulary, metadata.total_size of its pytorch_model.bin.index.json
    "March 2023": (150528, 13_744_473_856),
}


def shapes_of(vocabulary):
    """Names, shapes and bytes of a number of every tensor of ChatGLM-6B."""
    hidden, inner, found = 4096, 16384, {}
    for layer in (f"transformer.layers.{number}" for number in range(28)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found |= {f"{layer}.{norm}.{kind}": ((hidden,), 4) for kind in ("weight", "bias")}
        for name, rows, columns in (("attention.query_key_value", 3 * hidden, hidden),
                                    ("attention.dense", hidden, hidden), ("mlp.dense_h_to_4h", inner, hidden),
                                    ("mlp.dense_4h_to_h", hidden, inner)):
            found |= {f"{layer}.{name}.weight": ((rows, columns), 2), f"{layer}.{name}.bias": ((rows,), 2)}
        found[f"{layer}.attention.rotary_emb.inv_freq"] = ((32,), 2)
    table = {name: ((vocabulary, hidden), 2) for name in ("transformer.word_embeddings.weight", "lm_head.weight")}
    return found | table | {f"transformer.final_layernorm.{kind}": ((hidden,), 4) for kind in ("weight", "bias")}


class Written:
    """Stands for a config object where one is to be saved."""

    def __init__(self, **values):
        self.values = values

    def save_pretrained(self, directory):
        (directory / "config.json").write_text(json.dumps(self.values))


FULL = {"hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32, "inner_hidden_size": 16384}


@pytest.mark.parametrize("release", PUBLISHED)
def test_the_plan_of_the_real_checkpoint_by_its_header(tmp_path, release):
    """The tensors' bytes add up to what the published index says: its norms are float32, all else is float16."""
    vocabulary, published = PUBLISHED[release]
    tensors = shapes_of(vocabulary)
    assert sum(int(np.prod(shape)) * size for shape, size in tensors.values()) == published
    directory = sparse_checkpoint(tmp_path / "chatglm-6b", Written(**{**TINY, **FULL, "vocab_size": vocabulary}),
                                  {name: shape for name, (shape, _) in tensors.items()}, "float16", 2 << 30)
    assert room_taken(directory) < 1 << 20
    code, said, _ = call(main, FAMILY, ["--source", str(directory), "--output", str(tmp_path / "out"), "--dry-run"])
    assert code == 0 and not (tmp_path / "out").exists()
    moved = 28 * 12 + 3
    assert f"{moved} tensors" in said
    with open_checkpoint(directory) as held:
        moves = {move.target: move for move in make_plan(FAMILY, {**TINY, **FULL, "vocab_size": vocabulary},
                                                         held.tensors).moves}
    fused = moves["chatglm.transformer.layers.27.attention.query_key_value.weight"]
    assert (fused.source_shape, fused.shape, fused.transposed) == ((12288, 4096), (4096, 12288), True)
    norms = sum(int(np.prod(shape)) for name, (shape, _) in tensors.items() if "layernorm" in name)
    left_out = 28 * 32 + vocabulary * 4096
    assert f"{published - 2 * norms - 2 * left_out:,}" in said  # all of this header is float16
