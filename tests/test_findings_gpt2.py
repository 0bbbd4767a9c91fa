"""What PaddleNLP 3.0.0b4's GPT computes otherwise than transformers' GPT-2, each in a few lines."""

import json

import numpy as np
import paddle
import pytest
import torch
from paddlenlp.transformers.gpt.configuration import GPTConfig
from paddlenlp.transformers.gpt.modeling import GPTForSequenceClassification, GPTLMHeadModel, GPTModel
from transformers import GPT2Config, GPT2ForSequenceClassification

HUGGING_FACE = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 61, "n_positions": 40,
                "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
PADDLE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
              max_position_embeddings=40, eos_token_id=2)
IDS = np.random.default_rng(0).integers(3, 61, (2, 12))


def read(directory, **changes):
    """A Hugging Face config as PaddleNLP reads it."""
    (directory / "config.json").write_text(json.dumps({**HUGGING_FACE, **changes}))
    return GPTConfig.from_pretrained(str(directory))


def test_n_inner_null_is_3072_whatever_the_width(tmp_path):
    assert GPT2Config(**HUGGING_FACE).n_inner is None  # which is 4 n_embd = 128 in GPT2Block
    assert read(tmp_path, n_inner=None).intermediate_size == 3072


def test_a_dropout_of_0_is_read_as_a_tenth(tmp_path):
    config = read(tmp_path, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert (config.attention_probs_dropout_prob, config.hidden_dropout_prob) == (0.1, 0.1)


def test_the_epsilon_of_the_config_is_ignored(tmp_path):
    norms = [layer for layer in GPTModel(read(tmp_path, layer_norm_epsilon=1e-3)).sublayers()
             if isinstance(layer, paddle.nn.LayerNorm)]
    assert len(norms) == 5 and {norm._epsilon for norm in norms} == {1e-5}


def test_the_activation_of_the_config_is_ignored_and_another_crashes(tmp_path):
    assert read(tmp_path, activation_function="relu").hidden_activation == "gelu"
    with pytest.raises(TypeError, match="approximate"):
        GPTModel(GPTConfig(**PADDLE, hidden_activation="relu")).eval()(paddle.to_tensor(IDS))


def test_the_scale_by_layer_and_the_untied_head_are_ignored(tmp_path):
    plain, changed = (GPTLMHeadModel(read(tmp_path, **changes)).eval() for changes in (
        {}, {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}))
    changed.set_state_dict(plain.state_dict())
    ids = paddle.to_tensor(IDS)
    assert bool((plain(ids) == changed(ids)).all())
    assert changed.lm_head.weight is changed.gpt.embeddings.word_embeddings.weight


def test_the_loss_is_not_shifted_and_leaves_out_token_0():
    net = GPTLMHeadModel(GPTConfig(**PADDLE)).eval()
    ids = IDS.copy()
    ids[0, 5:] = 0
    loss, logits = net(paddle.to_tensor(ids), labels=paddle.to_tensor(ids))
    log_p = torch.log_softmax(torch.tensor(logits.numpy()), -1)
    here = -torch.gather(log_p, 2, torch.tensor(ids)[..., None])[..., 0]
    assert loss.item() == pytest.approx(here[torch.tensor(ids) != 0].mean().item(), rel=1e-5)
    shifted = torch.nn.functional.cross_entropy(log_p[:, :-1].flatten(0, 1), torch.tensor(ids)[:, 1:].flatten())
    assert abs(loss.item() / shifted.item() - 1) > 1e-3


def test_sequence_classification_counts_tokens_that_are_not_the_end_and_so_misses_left_padding():
    """transformers takes the last token that is no padding; PaddleNLP the one at place (how many are not eos) - 1."""
    config = dict(HUGGING_FACE, pad_token_id=2)
    assert GPT2ForSequenceClassification(GPT2Config(**config)).config.pad_token_id == 2
    net = GPTForSequenceClassification(GPTConfig(**PADDLE)).eval()
    padded = np.concatenate([np.full((2, 5), 2), IDS[:, :7]], axis=1)
    pooled = net(paddle.to_tensor(padded)).numpy()
    hidden = net.gpt(paddle.to_tensor(padded))
    scores = net.score(hidden if isinstance(hidden, paddle.Tensor) else hidden[0]).numpy()
    np.testing.assert_allclose(pooled, scores[:, 6], rtol=1e-5, atol=1e-6)
    assert not np.allclose(pooled, scores[:, -1], atol=1e-4)


def test_generation_drops_the_mask_and_so_reads_padding():
    """The class itself is right with its cache, padding or not, where it is given the mask."""
    net = GPTLMHeadModel(GPTConfig(**PADDLE)).eval()
    text, last = paddle.to_tensor(IDS), paddle.to_tensor(IDS[:, -1:])
    padded = paddle.concat([paddle.full([2, 4], 2, "int64"), text], axis=1)
    mask = paddle.concat([paddle.zeros([2, 4], "int64"), paddle.ones([2, 12], "int64")], axis=1)
    places = paddle.concat([paddle.zeros([2, 4], "int64"), paddle.arange(12).expand([2, 12])], axis=1)
    expected = net(paddle.concat([text, last], axis=1))[:, -1].numpy()

    def behind(first, later):
        """What comes behind one token more, by what the class keeps of the first pass."""
        outputs = net(**first, use_cache=True)
        return net(**later(outputs), use_cache=True)[0][:, -1].numpy()

    def generating(outputs):
        kept = net.update_model_kwargs_for_generation(outputs, {"attention_mask": mask, "position_ids": places})
        found = net.prepare_inputs_for_generation(paddle.concat([padded, last], axis=1), **kept)
        assert found["attention_mask"] is None
        return {name: value for name, value in found.items() if name != "use_cache"}
    right = behind({"input_ids": padded, "attention_mask": mask, "position_ids": places}, lambda outputs: {
        "input_ids": last, "past_key_values": outputs[1], "position_ids": places[:, -1:] + 1,
        "attention_mask": paddle.concat([mask, mask[:, -1:]], axis=1)})
    wrong = behind({"input_ids": padded, "position_ids": places}, generating)
    np.testing.assert_allclose(right, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(wrong - expected).max() > 1e-3
