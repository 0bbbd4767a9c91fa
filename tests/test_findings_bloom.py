"""Where PaddleNLP's BLOOM, and once transformers', computes something else than it should, each in a few lines."""

import numpy as np
import paddle
import pytest
import torch
from decoder_fixtures import distance, ids, padded, pair, run
from test_models_bloom import TINY, layout
from transformers import BloomConfig, BloomForCausalLM, BloomForSequenceClassification

import models.bloom


def built(head="BloomForCausalLM", **config):
    from paddlenlp.transformers.bloom import configuration, modeling
    return getattr(modeling, head)(configuration.BloomConfig.from_dict(
        BloomConfig(**TINY | config).to_dict() | {"return_dict": True})).eval()


def both(cls=BloomForCausalLM, **config):
    """(transformers', PaddleNLP's) net with the same weights."""
    theirs, ours = pair(cls, getattr(models.bloom, cls.__name__),
                        BloomConfig(**TINY | config, attn_implementation="eager"), layout)
    net = built(cls.__name__, **config)
    weights = {name: weight.numpy() for name, weight in ours.state_dict().items()}
    for name, parameter in net.state_dict().items():
        parameter.set_value(weights[name])
    return theirs, net


@pytest.mark.parametrize("heads", [4, 3, 1])
def test_its_forward_is_right(heads):
    theirs, net = both(n_head=heads, hidden_size=8 * heads)
    inputs, valid = padded("both", pad=0)
    assert distance(run(net, **inputs)["logits"][valid], run(theirs, **inputs)["logits"][valid]) < 1e-5


def test_its_labels_are_not_shifted():
    """Its docstring says that they are. The loss is that of predicting the token itself, not the next one."""
    theirs, net = both()
    tokens = ids()
    outputs = run(net, input_ids=tokens, labels=tokens)
    unshifted = torch.nn.functional.cross_entropy(torch.from_numpy(outputs["logits"]).flatten(0, 1),
                                                  torch.from_numpy(tokens).flatten())
    assert outputs["loss"].item() == pytest.approx(unshifted.item(), rel=1e-5)
    shifted = run(theirs, input_ids=tokens, labels=tokens)["loss"].item()
    assert outputs["loss"].item() != pytest.approx(shifted, rel=1e-2)


def test_its_classifier_reads_the_wrong_token_of_rows_padded_on_the_left():
    """It reads the token whose number is the count of real tokens; of right-padded rows that is the last one."""
    theirs, net = both(BloomForSequenceClassification)
    for padding, agrees in (("right", True), ("left", False)):
        inputs, _ = padded(padding, pad=0)
        found, expected = run(net, **inputs)["logits"], run(theirs, **inputs)["logits"]
        assert bool(distance(found[1:], expected[1:]) < 1e-5) is agrees
        assert distance(found[:1], expected[:1]) < 1e-5


def test_its_initialisation_zeroes_weights_that_have_a_bias():
    block = built().bloom.h[0]
    for layer in (block.self_attention.query_key_value, block.mlp.dense_h_to_4h):
        weight = layer.weight.clone()
        built()._init_weights(layer)
        assert float(layer.weight.abs().sum()) == 0 and weight.shape == layer.weight.shape


def test_its_slices_are_cut_along_the_wrong_axis():
    """Paddle's weight is [in, out], torch's [out, in]; the code cuts the second axis of both."""
    _, net = both(pretraining_tp=4, slow_but_exact=True)
    with pytest.raises(ValueError):
        net(paddle.to_tensor(ids()))


def test_its_head_is_always_tied():
    net = built(tie_word_embeddings=False)
    assert net.lm_head.decoder_weight is net.bloom.word_embeddings.weight


def test_transformers_leaves_two_biases_out_where_it_adds_up_slices():
    """``slow_but_exact`` with ``pretraining_tp`` above 1 is to give exacter sums; it gives those without a bias."""
    config = dict(pretraining_tp=4)
    fast, _ = both(**config)
    slow, _ = pair(BloomForCausalLM, models.bloom.BloomForCausalLM, BloomConfig(
        **TINY, **config, slow_but_exact=True, attn_implementation="eager"), layout)
    expected, found = (run(net, input_ids=ids())["logits"] for net in (fast, slow))
    assert distance(found, expected) > 1e-2
    with torch.no_grad():
        for name, weight in fast.named_parameters():
            if name.endswith(("self_attention.dense.bias", "dense_4h_to_h.bias")):
                assert np.abs(weight.numpy()).max() > 0
                weight.zero_()
    assert distance(found, run(fast, input_ids=ids())["logits"]) < 1e-5
