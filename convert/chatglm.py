"""ChatGLM-6B, first version: fused q/k/v stay fused, the linears turn, the frequencies of the rotation are left out.

Its torch side is code that the checkpoint brings along. No conversion runs it: names and shapes are here.
"""

import sys
from typing import Any

from convert.heads import shared_head
from convert.rules import (
    Config,
    Family,
    Filling,
    Head,
    Sizes,
    counted,
    drop,
    keep,
    linear,
    norm,
    rules,
    size_of,
)
from convert.traits import Prompts, Traits

MARKS = {"bos_token_id": 150004, "eos_token_id": 150005, "mask_token_id": 150000, "gmask_token_id": 150001,
         "pad_token_id": 0}
"""What the config class that the checkpoint brings along has where config.json says nothing."""


def sizes(config: Config) -> Sizes:
    hidden, heads = size_of(config, "hidden_size"), size_of(config, "num_attention_heads")
    return {
        "hidden": hidden,
        "fused": 3 * hidden,
        "inner": size_of(config, "inner_hidden_size", default=4 * hidden),
        "vocab": size_of(config, "vocab_size"),
        "positions": size_of(config, "max_sequence_length", default=2048),
        "pairs": hidden // (heads * (4 if in_two_dimensions(config) else 2)),
    }


def in_two_dimensions(config: Config) -> bool:
    return config.get("position_encoding_2d", True)


def unsupported(config: Config) -> str | None:
    if "num_layers" not in config and "num_hidden_layers" not in config:
        return "config.json has no num_layers: ChatGLM2 and later are other architectures under the same model_type"
    if "multi_query_attention" in config or "kv_channels" in config:
        return "this is ChatGLM2 or later, another architecture under the same model_type"
    if config.get("quantization_bit"):
        return (f"quantization_bit is {config['quantization_bit']}: the tensors are packed integers, and their floats "
                "are gone. Give the float16 checkpoint")
    if config.get("pre_seq_len") is not None:
        return (f"pre_seq_len is {config['pre_seq_len']}: PaddleNLP's class cannot be made with learned prefixes "
                "(P-tuning)")
    hidden, heads = size_of(config, "hidden_size"), size_of(config, "num_attention_heads")
    parts = (4 if in_two_dimensions(config) else 2) * heads
    if not parts or hidden % parts:
        return f"hidden_size {hidden} is not a multiple of {parts}: {heads} heads, each of whole pairs that are turned"
    return None


def frequencies() -> Filling:
    """10000^(-i / pairs), i = 0, 1, … (Su et al. 2021), rounded to float16 as the checkpoint's own code does it."""
    def rows(shape: tuple[int, ...], some: range) -> Any:
        import numpy as np
        exponents = np.arange(0, 2 * shape[-1], 2, dtype=np.float32) / np.float32(2 * shape[-1])
        exact = (1 / np.power(np.float32(10000), exponents)).astype(np.float16).astype(np.float32)
        return np.broadcast_to(exact, (len(some), shape[-1]))
    return Filling("rotary frequencies, rounded to float16,", rows, checked=True)


def without_polarity(arguments: Config) -> Config:
    """PaddleNLP's mask is True where a query may look."""
    return {**arguments, "attention_mask": ~arguments["attention_mask"]}


def time_first(name: str) -> bool:
    return ".layers." in f".{name}" or name.endswith("final_layernorm") or name == "last_hidden_state"


PROMPTS = Prompts(MARKS, in_two_dimensions, words="ice_text.model", spelled={"\n": "<n>", "\t": "<|tab|>"},
                  blanks=("<|blank_{}|>", 80), images=("num_image_tokens", 20000))
LAYER, TO = "transformer.layers.{i}", "chatglm.transformer.layers.{i}"
FAMILY = Family(
    name="chatglm", prefix="transformer.", target_prefix="chatglm.", layers=counted("num_layers", "num_hidden_layers"),
    sizes=sizes, unsupported=unsupported, remote_code=True, time_first=time_first, paddlenlp_inputs=without_polarity,
    tokenizer="prompts", paddlenlp_tokenizer="chatglm.tokenizer:ChatGLMTokenizer",
    rules=rules(
        keep("transformer.word_embeddings.weight", "vocab", "hidden", to="chatglm.transformer.word_embeddings.weight"),
        norm(f"{LAYER}.input_layernorm", "hidden", to=f"{TO}.input_layernorm"),
        drop(f"{LAYER}.attention.rotary_emb.inv_freq", "pairs", holding=frequencies(), returns="float16",
             why="the rotary frequencies, which Paddle's side computes itself"),
        linear(f"{LAYER}.attention.query_key_value", "fused", "hidden", to=f"{TO}.attention.query_key_value"),
        linear(f"{LAYER}.attention.dense", "hidden", "hidden", to=f"{TO}.attention.dense"),
        norm(f"{LAYER}.post_attention_layernorm", "hidden", to=f"{TO}.post_attention_layernorm"),
        linear(f"{LAYER}.mlp.dense_h_to_4h", "inner", "hidden", to=f"{TO}.mlp.dense_h_to_4h"),
        linear(f"{LAYER}.mlp.dense_4h_to_h", "hidden", "inner", to=f"{TO}.mlp.dense_4h_to_h"),
        norm("transformer.final_layernorm", "hidden", to="chatglm.transformer.final_layernorm"),
    ),
    heads=(
        Head("ChatGLMForConditionalGeneration", "ChatGLMForCausalLM", "prefix-lm",
             shared_head("transformer.word_embeddings.weight", to="lm_head.decoder_weight"), inputs=PROMPTS),
        Head("ChatGLMModel", "ChatGLMModel", "encoder", base=True, inputs=PROMPTS),
    ),
    modules=(
        ("transformer.word_embeddings", "chatglm.transformer.word_embeddings"),
        (LAYER, TO),
        ("transformer.final_layernorm", "chatglm.transformer.final_layernorm"),
    ),
    inside={TO: (
        ("input_layernorm", "input_layernorm", "input"),
        ("attention.query_key_value", "attention.query_key_value", "wiring of the norm"),
        ("attention.dense", "attention.dense", "attention: heads, rotary, scale, mask, softmax"),
        ("post_attention_layernorm", "post_attention_layernorm", "residual"),
        ("mlp.dense_h_to_4h", "mlp.dense_h_to_4h", "wiring of the norm"),
        ("mlp.dense_4h_to_h", "mlp.dense_4h_to_h", "activation"),
    )},
    demo={
        "model_type": "chatglm", "architectures": ["ChatGLMForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig",
                     "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "vocab_size": 272, "hidden_size": 64, "num_layers": 3, "num_attention_heads": 2, "inner_hidden_size": 256,
        "layernorm_epsilon": 1e-05, "max_sequence_length": 128, "position_encoding_2d": True, "use_cache": True,
        "bos_token_id": 258, "eos_token_id": 259, "mask_token_id": 256, "gmask_token_id": 257, "pad_token_id": 3,
    },
    variants={"positions of one dimension": {"position_encoding_2d": False}, "untied": {"tie_word_embeddings": False}},
    additions=lambda config: {key: value for key, value in MARKS.items() if config.get(key) is None},
    paddle_keys={"num_layers": "num_hidden_layers"},
    settings={"epsilon": ("layernorm_epsilon",)},
    traits=Traits(fused="query_key_value", residual_scale="alpha", residual_depth="num_layers"),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
