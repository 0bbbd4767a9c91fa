"""What PaddleNLP's ChatGLM computes otherwise than the published code, and what transformers 4.55 does to such code."""

import numpy as np
import paddle
import pytest
import torch
from chatglm_fixtures import TINY, config_of, prompts, save_checkpoint
from paddlenlp.transformers.chatglm.configuration import ChatGLMConfig
from paddlenlp.transformers.chatglm.modeling import ChatGLMForCausalLM, RotaryEmbeddings
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.generation import GenerationMixin


@pytest.fixture(scope="module")
def net():
    paddle.seed(0)
    return ChatGLMForCausalLM(ChatGLMConfig.from_dict(config_of())).eval()


IDS = paddle.to_tensor(prompts([(6, 3)]))
ALL = paddle.ones([1, 1, 9, 9], dtype="int64")


def test_paddlenlps_frequencies_are_not_those_of_the_published_code():
    """There they are ``1. / (base ** (arange(0, dim, 2).float() / dim))`` and then ``.half()``, kept in float16.

    At position 1000 of a head as wide as ChatGLM-6B's that is an angle of up to 0.16.
    """
    published = (1.0 / 10000 ** (torch.arange(0, 64, 2).float() / 64)).half().float().numpy()
    paddles = RotaryEmbeddings(64).inv_freq.numpy()
    assert np.array_equal(paddles.astype("float16"), published.astype("float16"))
    assert 0.15 < np.abs(paddles - published).max() * 1000 < 0.17


def test_paddlenlps_mask_is_true_where_a_query_may_look(net):
    """The published code fills -10000 in where it is True."""
    ids = IDS.clone()
    ids[0, 0] = 40
    seen = ALL.clone()
    seen[:, :, :, 0] = 0
    with paddle.no_grad():
        hidden = [net(one, attention_mask=seen)[0][:, 1:].numpy() for one in (IDS, ids)]
        shown = [net(one, attention_mask=ALL)[0][:, 1:].numpy() for one in (IDS, ids)]
    assert np.array_equal(*hidden) and not np.array_equal(*shown)


def test_paddlenlps_loss_is_not_shifted(net):
    with paddle.no_grad():
        loss, logits, *_ = net(IDS, attention_mask=ALL, labels=IDS)
    scores, words = torch.from_numpy(logits.numpy())[0], torch.from_numpy(IDS.numpy())[0]
    same, following = (torch.nn.functional.cross_entropy(*pair).item() for pair in ((scores, words),
                                                                                    (scores[:-1], words[1:])))
    assert loss.item() == pytest.approx(same, rel=1e-5) and abs(following - same) > 1e-2


def test_paddlenlps_generate_fails_without_positions(net):
    with pytest.raises(ValueError, match="axis"):
        net.generate(IDS, attention_mask=ALL, max_length=2, decode_strategy="greedy_search")


def test_paddlenlps_positions_of_one_dimension_fail():
    with pytest.raises(ValueError, match="Too many indices"):
        ChatGLMForCausalLM(ChatGLMConfig.from_dict(config_of(position_encoding_2d=False)))(IDS, attention_mask=ALL)


def test_paddlenlps_class_cannot_be_made_with_learned_prefixes():
    with pytest.raises(AttributeError, match="pre_seq_len"):
        ChatGLMForCausalLM(ChatGLMConfig.from_dict(config_of(pre_seq_len=4)))


def test_paddlenlp_ties_whatever_the_config_says():
    net = ChatGLMForCausalLM(ChatGLMConfig.from_dict(config_of(tie_word_embeddings=False)))
    assert net.lm_head.decoder_weight is net.chatglm.transformer.word_embeddings.weight


def test_paddlenlps_config_made_by_hand_has_28_layers_whatever_num_layers_says():
    assert ChatGLMConfig(num_layers=3).num_hidden_layers == 28
    given = {"num_layers": 3}
    assert ChatGLMConfig.from_dict(given).num_hidden_layers == 3 and given == {"num_hidden_layers": 3}


# transformers 4.55.4 and code of early 2023 ---------------------------------------------------------------------------

def test_from_pretrained_rounds_to_the_dtype_that_the_class_asks_for(tmp_path):
    """``torch_dtype=torch.float32`` or not: a fine-tuned float32 checkpoint loses its last bits in silence."""
    source = save_checkpoint(tmp_path / "chatglm", dtype="float32")
    name = "transformer.layers.0.attention.dense.weight"
    model = AutoModel.from_pretrained(source, trust_remote_code=True, torch_dtype=torch.float32)
    held, stored = model.get_parameter(name), load_file(source / "model.safetensors")[name]
    assert held.dtype == torch.float16 and torch.equal(held, stored.half()) and not torch.equal(held.float(), stored)


def test_a_dot_in_the_directorys_name_is_taken_for_a_package(tmp_path):
    """Where the model's class is asked for before the config's has been."""
    with pytest.raises(ModuleNotFoundError):
        get_class_from_dynamic_module("modeling_chatglm.ChatGLMModel", save_checkpoint(tmp_path / "chatglm-6b-v1.1"))


def test_a_tokenizer_whose_words_are_there_only_after_super_init_cannot_be_made():
    """As ``tokenization_chatglm.py`` has them; and its ``_pad`` does not know ``padding_side``."""
    class Late(PreTrainedTokenizer):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.words = ["<pad>", "a"]

        @property
        def vocab_size(self):
            return len(self.words)

        def get_vocab(self):
            return {self.words[number]: number for number in range(self.vocab_size)}
    with pytest.raises(AttributeError):
        Late(pad_token="<pad>")


def test_what_its_generation_calls_is_gone():
    assert not hasattr(GenerationMixin, "_extract_past_from_model_output")
    assert not hasattr(GenerationMixin, "_get_logits_warper")


def test_frequencies_that_are_not_in_the_file_survive(tmp_path):
    """The class makes them while its weights are on no device; transformers tells them as newly initialised."""
    source = save_checkpoint(tmp_path / "chatglm", without="inv_freq")
    model, told = AutoModel.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
    assert len(told["missing_keys"]) == TINY["num_layers"]
    assert torch.equal(model.transformer.layers[0].attention.rotary_emb.inv_freq, torch.tensor([1.0, 0.01]).half())
