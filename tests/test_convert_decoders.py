"""OPT's and BLOOM's files: names as on the hub, tied heads, what a bias-free model may carry, PaddleNLP's config."""

import json

import numpy as np
import pytest
import torch
from align_fixtures import save_checkpoint
from safetensors.numpy import load_file, save_file

GALACTICA = dict(enable_bias=False, layer_norm_elementwise_affine=False)


@pytest.fixture
def source(tmp_path):
    """``source(head, edit, **config)``: a tiny checkpoint whose tensors ``edit`` has changed."""
    def make(head, edit=lambda tensors: tensors, **options):
        directory = save_checkpoint(tmp_path / "source", head, **options)
        file = directory / "model.safetensors"
        if file.is_file():
            save_file({name: np.array(array) for name, array in edit(load_file(file)).items()}, file, {"format": "pt"})
        return directory
    return make


def without_prefix(prefix):
    return lambda tensors: {name.removeprefix(prefix): array for name, array in tensors.items()}


@pytest.mark.parametrize("family,head,prefix", [("opt", "OPTForCausalLM", "model."),
                                                ("bloom", "BloomForCausalLM", "transformer.")])
def test_keys_of_the_base_model_are_those_of_the_causal_lm(convert, source, family, head, prefix):
    """As on the hub: bigscience/bloom has ``h.0.…``, older OPT files have ``decoder.…``."""
    whole = convert(source(head), family=family)
    bare = convert(source(head, without_prefix(prefix)), family=family, output="out/bare")
    assert (whole.code, bare.code) == (0, 0), bare.stderr
    assert whole.weights == bare.weights


def test_a_tied_head_is_written_twice_for_opt_and_once_for_bloom(convert, source):
    """PaddleNLP's OPT owns its head's weight; its BLOOM does not."""
    opt = convert(source("OPTForCausalLM"), family="opt")
    held = load_file(opt.output / "model.safetensors")
    assert np.array_equal(held["lm_head.decoder_weight"], held["opt.embeddings.word_embeddings.weight"])
    bloom = convert(source("BloomForCausalLM"), family="bloom", output="out/bloom")
    assert "lm_head.decoder_weight" not in load_file(bloom.output / "model.safetensors")
    untied = convert(source("BloomForCausalLM", tie_word_embeddings=False), family="bloom", output="out/untied")
    held = load_file(untied.output / "model.safetensors")
    assert not np.array_equal(held["lm_head.decoder_weight"], held["bloom.word_embeddings.weight"])


@pytest.mark.parametrize("family,head", [("opt", "OPTForCausalLM"), ("bloom", "BloomForCausalLM")])
def test_a_file_that_holds_the_tied_head_too_is_checked(convert, source, refused, family, head):
    directory = source(head, binary=True)  # torch.save writes tied weights under both names
    file = directory / "pytorch_model.bin"
    tensors = torch.load(file)
    assert "lm_head.weight" in tensors
    assert convert(directory, family=family).code == 0
    torch.save({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, file)
    refused(directory, family=family, output="out/other", says=("lm_head.weight",))


def test_biases_of_zero_may_lie_in_a_file_without_biases_and_others_may_not(convert, source, refused):
    name = "model.decoder.layers.0.fc1.bias"

    def with_bias(value):
        return lambda tensors: {**tensors, name: np.full(48, value, "float32")}
    assert convert(source("OPTForCausalLM", with_bias(0.0), **GALACTICA), family="opt").code == 0
    refused(source("OPTForCausalLM", with_bias(0.1), **GALACTICA), family="opt", output="out/other", says=(name,))


def test_what_paddlenlps_opt_reads_is_added_to_the_config_and_told(convert, source):
    run = convert(source("OPTForCausalLM", do_layer_norm_before=False, word_embed_proj_dim=16, dropout=0.2,
                         attention_dropout=0.3, init_std=0.5), family="opt")
    expected = {"normalize_before": False, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3,
                "initializer_range": 0.5}
    assert {key: run.config[key] for key in expected} == expected
    assert any("normalize_before = False is added" in note for note in run.report["notes"])


def test_an_old_config_without_word_embed_proj_dim_and_pad_token_means_transformers_defaults(convert, source):
    directory = source("OPTForCausalLM")
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items()
                                if key not in ("word_embed_proj_dim", "pad_token_id")}))
    run = convert(directory, family="opt")
    assert (run.config["word_embed_proj_dim"], run.config["pad_token_id"]) == (32, 1)


@pytest.mark.parametrize("name", ["hidden_size", "n_embed"])
def test_blooms_width_goes_by_two_names(convert, source, name):
    directory = source("BloomForCausalLM")
    file = directory / "config.json"
    file.write_text(file.read_text().replace('"hidden_size"', f'"{name}"'))
    assert convert(directory, family="bloom").code == 0


def test_a_table_of_positions_without_the_two_rows_is_refused_in_words(source, refused):
    name = "model.decoder.embed_positions.weight"
    refused(source("OPTForCausalLM", lambda tensors: {**tensors, name: tensors[name][2:]}), family="opt",
            says=(f"{name} has shape [96, 32]", "[98, 32]", "positions and two 98"))


def test_a_final_norm_that_the_config_leaves_out_is_refused(source, refused):
    norm = {f"model.decoder.final_layer_norm.{word}": np.ones(32, "float32") for word in ("weight", "bias")}
    refused(source("OPTForCausalLM", lambda tensors: tensors | norm, do_layer_norm_before=False), family="opt",
            says=("no rule claims", "model.decoder.final_layer_norm"))


@pytest.mark.parametrize("family,head", [("opt", "OPTForCausalLM"), ("bloom", "BloomForCausalLM")])
def test_rules_and_demo(convert, workdir, family, head):
    told = convert(None, "--rules", family=family, output=None)
    assert told.code == 0 and "lm_head" in told.stdout
    demo = convert(None, family=family, output=None)
    assert demo.code == 0 and (workdir / "out" / f"demo-{family}" / "model.safetensors").is_file()
    assert json.loads((workdir / "reports" / f"demo-{family}" / "convert.json").read_text())["head"] == head
