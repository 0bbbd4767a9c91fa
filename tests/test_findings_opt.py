"""Where PaddleNLP's OPT computes something else than the checkpoint says, each proved in a few lines."""

import json

import numpy as np
import paddle
import pytest
import torch
from decoder_fixtures import distance, ids, pair, run
from test_models_opt import TINY, layout
from transformers import OPTConfig, OPTForCausalLM

import models.opt


def built(head="OPTForCausalLM", **config):
    """PaddleNLP's class as it reads a config.json of transformers, which always has ``word_embed_proj_dim``."""
    from paddlenlp.transformers.opt import configuration, modeling
    return getattr(modeling, head)(configuration.OPTConfig.from_dict(
        OPTConfig(**TINY | config).to_dict() | {"return_dict": True} | config)).eval()


def both(**config):
    """(transformers', PaddleNLP's) causal LM with the same weights."""
    theirs, ours = pair(OPTForCausalLM, models.opt.OPTForCausalLM,
                        OPTConfig(**TINY | config, attn_implementation="eager"), layout)
    net = built(**config)
    weights = {name: weight.numpy() for name, weight in ours.state_dict().items()}
    for name, parameter in net.state_dict().items():
        if name in weights:
            parameter.set_value(weights[name])
    return theirs, net


def test_its_forward_is_right_for_the_ordinary_shape():
    theirs, net = both()
    assert distance(run(net, input_ids=ids())["logits"], run(theirs, input_ids=ids())["logits"]) < 1e-5


def test_its_labels_are_not_shifted():
    """Its docstring says that they are. The loss is that of predicting the token itself, not the next one."""
    theirs, net = both()
    tokens = ids()
    outputs = run(net, input_ids=tokens, labels=tokens)
    logits = torch.from_numpy(outputs["logits"])
    unshifted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens).flatten())
    assert outputs["loss"].item() == pytest.approx(unshifted.item(), rel=1e-5)
    shifted = run(theirs, input_ids=tokens, labels=tokens)["loss"].item()
    assert outputs["loss"].item() != pytest.approx(shifted, rel=1e-2)


def test_its_gelu_is_the_tanh_approximation():
    theirs, net = both(activation_function="gelu")
    expected = run(theirs, input_ids=ids())["logits"]
    approximate, _ = pair(OPTForCausalLM, models.opt.OPTForCausalLM, OPTConfig(
        **TINY, activation_function="gelu_new", attn_implementation="eager"), layout)
    found = run(net, input_ids=ids())["logits"]
    assert distance(found, expected) > 1e-5
    assert distance(found, run(approximate, input_ids=ids())["logits"]) < 2e-6


def test_it_does_not_know_do_layer_norm_before():
    """A 350m-like config makes a pre-norm net with a final norm. ``normalize_before`` is PaddleNLP's word for it."""
    assert built(do_layer_norm_before=False).opt.decoder.final_layer_norm is not None
    assert built(do_layer_norm_before=False, normalize_before=False).opt.decoder.final_layer_norm is None


def test_it_cannot_leave_the_final_norm_out_of_a_pre_norm_net():
    assert models.opt.OPTModel.from_config(TINY | {"_remove_final_layer_norm": True}).decoder.final_layer_norm is None
    assert built(_remove_final_layer_norm=True).opt.decoder.final_layer_norm is not None


def test_its_head_has_the_wrong_width_where_words_are_projected():
    net = built(word_embed_proj_dim=16)
    assert list(net.lm_head.decoder_weight.shape) == [TINY["vocab_size"], TINY["hidden_size"]]
    with pytest.raises(ValueError):
        net(paddle.to_tensor(ids()))


def test_its_head_is_not_tied():
    net = built(tie_word_embeddings=True)
    assert net.lm_head.decoder_weight is not net.opt.embeddings.word_embeddings.weight


def test_it_owns_biases_and_norm_weights_that_the_config_leaves_out():
    """Harmless as long as nobody trains: they start as zeros and ones."""
    names = built(enable_bias=False, layer_norm_elementwise_affine=False).state_dict()
    assert "opt.decoder.layers.0.linear1.bias" in names and "opt.decoder.layers.0.norm1.weight" in names
    assert float(names["opt.decoder.layers.0.linear1.bias"].abs().sum()) == 0
    assert float((names["opt.decoder.layers.0.norm1.weight"] - 1).abs().sum()) == 0


def test_its_last_hidden_state_precedes_the_final_norm():
    theirs, net = both()
    found = net(paddle.to_tensor(ids()), output_hidden_states=True).hidden_states[-1].numpy()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids()), output_hidden_states=True).hidden_states[-1].numpy()
    assert distance(found, expected) > 0.1
    normed = net.opt.decoder.final_layer_norm(paddle.to_tensor(found)).numpy()
    assert distance(normed, expected) < 1e-5


def test_its_own_name_map_has_no_head_and_no_projections():
    from paddlenlp.transformers.opt import configuration, modeling
    config = configuration.OPTConfig.from_dict(OPTConfig(**TINY, word_embed_proj_dim=16).to_dict())
    mapped = {mapping.target_name for mapping in modeling.OPTForCausalLM._get_name_mappings(config)}
    missing = set(built(word_embed_proj_dim=16).state_dict()) - mapped
    assert missing == {"lm_head.decoder_weight", "opt.embeddings.project_in.weight", "opt.decoder.project_out.weight"}


def test_transformers_itself_cannot_make_norms_without_weights_but_loads_them(tmp_path):
    """``OPTPreTrainedModel._init_weights`` fills weights that are not there; ``from_pretrained`` asks it not."""
    config = OPTConfig(**TINY, layer_norm_elementwise_affine=False)
    with pytest.raises(AttributeError, match="NoneType"):
        OPTForCausalLM(config)
    theirs, _ = pair(OPTForCausalLM, models.opt.OPTForCausalLM, config, layout)
    theirs.save_pretrained(tmp_path)
    loaded, told = OPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and json.loads((tmp_path / "config.json").read_text())["model_type"] == "opt"
    assert np.array_equal(run(loaded, input_ids=ids())["logits"], run(theirs, input_ids=ids())["logits"])
