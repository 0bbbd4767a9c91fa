"""What PaddleNLP 3.0.0b4's T5 computes otherwise than torch, each in a few lines."""

import numpy as np
import paddle
import pytest
import torch
import transformers
from paddlenlp.transformers.t5 import configuration, modeling
from transformers.models.t5.modeling_t5 import T5Attention

TINY = dict(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
IDS = np.random.default_rng(0).integers(2, 40, (2, 9))


def paddlenlp(cls="T5ForConditionalGeneration", **changes):
    return getattr(modeling, cls)(configuration.T5Config(**TINY | changes)).eval()


def test_the_farthest_distance_of_the_config_is_ignored():
    distances = torch.arange(-60, 60)
    near, far = (T5Attention._relative_position_bucket(distances, True, 32, farthest) for farthest in (20, 128))
    assert not torch.equal(near, far)
    attention = paddlenlp("T5EncoderModel", relative_attention_max_distance=20).encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(60, 60).numpy()[0, 0]
    assert np.array_equal(bias, attention.relative_attention_bias.weight.numpy()[:, 0][
        T5Attention._relative_position_bucket(torch.arange(60) - torch.arange(60)[:, None], True, 32, 128).numpy()])


def test_labels_alone_fail_with_the_config_of_transformers_and_not_with_ours():
    """transformers has ``decoder_start_token_id``, PaddleNLP asks for ``bos_token_id``: conversion sets it."""
    ids = paddle.to_tensor(IDS)
    with pytest.raises(AssertionError, match="bos_token_id has to be defined"):
        paddlenlp()(ids, labels=ids)
    assert len(paddlenlp(bos_token_id=0)(ids, labels=ids)) >= 2


@pytest.mark.parametrize("projection", ["gelu", "silu", "gated-relu", "gated-gelu_new"])
def test_only_three_activations_are_known(projection):
    transformers.T5EncoderModel(transformers.T5Config(**TINY, feed_forward_proj=projection))
    with pytest.raises(ValueError, match="is not supported"):
        paddlenlp("T5EncoderModel", feed_forward_proj=projection)


def test_masked_keys_get_minus_10000_which_large_scores_outdo():
    """T5's scores are not scaled, and its activations are known to be large: keys behind a mask of -1e4 are seen."""
    net = paddlenlp("T5EncoderModel")
    mask = np.ones_like(IDS)
    mask[1, 5:] = 0
    added = net.encoder.get_extended_attention_mask(paddle.to_tensor(mask), list(mask.shape))
    assert added.min().item() == -10000.0
    attention = net.encoder.block[0].layer[0].SelfAttention
    moved = []
    for factor in (1.0, 1e5):
        attention.q.weight.set_value(attention.q.weight * factor)
        pads = np.where(mask == 1, IDS, IDS[:, ::-1])
        one, other = (net(paddle.to_tensor(ids), attention_mask=paddle.to_tensor(mask))[0].numpy()[1, :5]
                      for ids in (IDS, pads))
        moved.append(np.abs(one - other).max())
    assert moved[0] == 0 and moved[1] > 0.1


@pytest.mark.parametrize("changes,lost", [
    (dict(feed_forward_proj="gated-silu"), "t5.encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
    (dict(num_decoder_layers=2), "t5.decoder.block.1.layer.0.SelfAttention.q.weight"),
])
def test_its_own_conversion_from_torch_knows_no_gated_silu_and_no_decoder_deeper_than_the_encoder(changes, lost):
    config = configuration.T5Config(**TINY | changes)
    mapped = {mapping.target_name for mapping in modeling.T5ForConditionalGeneration._get_name_mappings(config)}
    assert lost in modeling.T5ForConditionalGeneration(config).state_dict()
    assert lost not in mapped
