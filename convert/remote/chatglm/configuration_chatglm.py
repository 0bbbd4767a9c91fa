"""ChatGLM's config class, as a checkpoint brings it along: transformers runs it only with trust_remote_code."""

from transformers import PretrainedConfig


class ChatGLMConfig(PretrainedConfig):
    model_type = "chatglm"

    def __init__(self, vocab_size=150528, hidden_size=4096, num_layers=28, num_attention_heads=32,
                 inner_hidden_size=16384, layernorm_epsilon=1e-5, position_encoding_2d=True, use_cache=False,
                 max_sequence_length=2048, bos_token_id=150004, eos_token_id=150005, mask_token_id=150000,
                 gmask_token_id=150001, pad_token_id=0, **others):
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **others)
        self.vocab_size, self.hidden_size, self.inner_hidden_size = vocab_size, hidden_size, inner_hidden_size
        self.num_layers, self.num_attention_heads = num_layers, num_attention_heads
        self.layernorm_epsilon, self.position_encoding_2d = layernorm_epsilon, position_encoding_2d
        self.use_cache, self.max_sequence_length = use_cache, max_sequence_length
        self.mask_token_id, self.gmask_token_id = mask_token_id, gmask_token_id
