"""ChatGLM from the papers' equations, in torch: the code that the demo and the tests' checkpoints bring along.

GLM (Du et al. 2022, arXiv 2103.10360), section 2.1: a context that sees itself and a blank that is filled from left to
right, places of two dimensions. GLM-130B (Zeng et al. 2023, arXiv 2210.02414): rotary places, DeepNorm residuals around
the norms, softmax in float32. It has the module paths, argument names, layouts (time first) and habits of the
public code, which align has to live with: weights made as float16 by ``skip_init``, frequencies kept as float16, and a
table of angles that is made once and kept. Nothing of ``models/`` is used, nor of the public code.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_chatglm import ChatGLMConfig


class Places(nn.Module):
    """The rotation matrices of whole places, [places, 2, 2, pairs]: Su et al. 2021, equation 15."""

    def __init__(self, width):
        super().__init__()
        thetas = torch.tensor([10000.0 ** (-2 * pair / width) for pair in range(width // 2)], dtype=torch.float32)
        self.register_buffer("inv_freq", thetas.half())
        self.kept = None

    def forward(self, places):
        """places [batch, time] -> [time, batch, 1, 2, 2, pairs]"""
        if self.kept is None or len(self.kept) <= int(places.max()):
            angle = torch.outer(torch.arange(int(places.max()) + 1, dtype=self.inv_freq.dtype), self.inv_freq)
            rows = [torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)]
            self.kept = torch.stack(rows, 1)
        return self.kept[places.T][:, :, None]


def turned(x, matrices):
    """x [time, batch, heads, width]; the first half of the channels are the first components of the pairs."""
    pairs = x.unflatten(-1, (2, -1)).unsqueeze(-3)
    return (matrices * pairs).sum(-2).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.layer, self.both = config.num_attention_heads, layer, config.position_encoding_2d
        self.width = config.hidden_size // self.heads
        self.rotary_emb = Places(self.width // 2 if self.both else self.width)
        self.query_key_value = half_linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = half_linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, position_ids, attention_mask, past=None):
        time, batch, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(time, batch, self.heads, 3, self.width)
        query, key, value = fused.unbind(3)
        if self.both:
            halves = [self.rotary_emb(position_ids[:, which]) for which in (0, 1)]
            query, key = (torch.cat([turned(part, matrices) for part, matrices in zip(x.chunk(2, -1), halves,
                                                                                      strict=True)], -1)
                          for x in (query, key))
        else:
            matrices = self.rotary_emb(position_ids)
            query, key = turned(query, matrices), turned(key, matrices)
        if past is not None:
            key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
        context = self.attended(query, key, value, attention_mask)
        return self.dense(context), (key, value)

    def attended(self, query, key, value, attention_mask):
        """Scores are kept small by the layer's number until the softmax takes them in float32 (GLM-130B, 3.3)."""
        (queries, batch, heads, width), keys = query.shape, len(key)
        query = query / (math.sqrt(width) * (self.layer + 1))
        flat = [x.permute(1, 2, 0, 3).flatten(0, 1) for x in (query, key, value)]
        scores = torch.baddbmm(flat[0].new_zeros(1, 1, 1), flat[0], flat[1].mT, beta=0)
        scores = scores.view(batch, heads, queries, keys)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask, -10000.0)
        weights = F.softmax(scores.float() * (self.layer + 1), dim=-1).type(scores.dtype)
        context = torch.bmm(weights.flatten(0, 1), flat[2])
        return context.view(batch, heads, queries, width).permute(2, 0, 1, 3).flatten(2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = half_linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = half_linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        x = self.dense_h_to_4h(hidden_states)
        return self.dense_4h_to_h(0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.alpha = (2 * config.num_layers) ** 0.5
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states, position_ids, attention_mask, past=None):
        x = self.input_layernorm(hidden_states)
        attended, present = self.attention(x, position_ids, attention_mask=attention_mask, past=past)
        y = self.post_attention_layernorm(self.alpha * x + attended)
        return self.alpha * y + self.mlp(y), present


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        pass


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = skip_init(nn.Embedding, config.vocab_size, config.hidden_size, dtype=torch.half)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, table):
        self.word_embeddings = table

    def masks(self, input_ids):
        """True where query q may not look at key k: k lies behind q, and not in the context."""
        masks = []
        for row in input_ids.tolist():
            context = row.index(self.config.bos_token_id)
            masks.append([[k > q and k >= context for k in range(len(row))] for q in range(len(row))])
        return torch.tensor(masks).unsqueeze(1)

    def places(self, input_ids):
        found = []
        for row in input_ids.tolist():
            context, goes_on = row.index(self.config.bos_token_id), self.config.gmask_token_id in row
            mask = row.index(self.config.gmask_token_id if goes_on else self.config.mask_token_id)
            answer = len(row) - context
            if self.config.position_encoding_2d:
                found.append([[*range(context), *[mask] * answer], [*[0] * context, *range(1, answer + 1)]])
            else:
                found.append([*range(len(row))] if goes_on else [*range(context), *[mask] * answer])
        return torch.tensor(found)

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None, use_cache=None,
                return_dict=None):
        if past_key_values is None:
            past_key_values = [None] * len(self.layers)
            attention_mask = self.masks(input_ids) if attention_mask is None else attention_mask
            position_ids = self.places(input_ids) if position_ids is None else position_ids
        hidden, presents = self.word_embeddings(input_ids).transpose(0, 1), ()
        for layer, past in zip(self.layers, past_key_values, strict=True):
            hidden, present = layer(hidden, position_ids, attention_mask=attention_mask, past=past)
            presents += (present,)
        return BaseModelOutputWithPast(self.final_layernorm(hidden), presents if use_cache else None)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = half_linear(config.hidden_size, config.vocab_size, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None, labels=None,
                use_cache=None, return_dict=None):
        found = self.transformer(input_ids, position_ids, attention_mask, past_key_values, use_cache)
        logits = self.lm_head(found.last_hidden_state).transpose(0, 1).contiguous()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss, logits, found.past_key_values)


def half_linear(inputs, outputs, bias=True):
    return skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.half)
