"""BLOOM: both sides use the same names behind the prefix; linears are transposed, the fused q, k and v as one."""

import sys

from convert.heads import question_answering, sequence_classification, shared_head, token_classification
from convert.rules import (
    Config,
    Family,
    Head,
    Sizes,
    counted,
    heads_fault,
    keep,
    labels_of,
    linear,
    norm,
    rules,
    size_of,
)
from convert.traits import Traits


def sizes(config: Config) -> Sizes:
    hidden = size_of(config, "n_embed", "hidden_size")
    return {
        "hidden": hidden,
        "fused": 3 * hidden,
        "inner": 4 * hidden,
        "vocab": size_of(config, "vocab_size"),
        "positions": size_of(config, "seq_length", default=2048),
        "labels": labels_of(config),
    }


def unsupported(config: Config) -> str | None:
    return heads_fault(config, ("n_embed", "hidden_size"), ("n_head", "num_attention_heads"), default=8)


LAYER, TO = "transformer.h.{i}", "bloom.h.{i}"
WORDS = "transformer.word_embeddings.weight"

FAMILY = Family(
    name="bloom", prefix="transformer.", target_prefix="bloom.", layers=counted("n_layer", "num_hidden_layers"),
    sizes=sizes, unsupported=unsupported,
    rules=rules(
        keep(WORDS, "vocab", "hidden", to="bloom.word_embeddings.weight"),
        norm("transformer.word_embeddings_layernorm", "hidden", to="bloom.word_embeddings_layernorm"),
        norm(f"{LAYER}.input_layernorm", "hidden", to=f"{TO}.input_layernorm"),
        linear(f"{LAYER}.self_attention.query_key_value", "fused", "hidden",
               to=f"{TO}.self_attention.query_key_value"),
        linear(f"{LAYER}.self_attention.dense", "hidden", "hidden", to=f"{TO}.self_attention.dense"),
        norm(f"{LAYER}.post_attention_layernorm", "hidden", to=f"{TO}.post_attention_layernorm"),
        linear(f"{LAYER}.mlp.dense_h_to_4h", "inner", "hidden", to=f"{TO}.mlp.dense_h_to_4h"),
        linear(f"{LAYER}.mlp.dense_4h_to_h", "hidden", "inner", to=f"{TO}.mlp.dense_4h_to_h"),
        norm("transformer.ln_f", "hidden", to="bloom.ln_f"),
    ),
    heads=(
        Head("BloomForCausalLM", "BloomForCausalLM", "causal-lm", shared_head(WORDS, to="lm_head.decoder_weight")),
        sequence_classification("BloomForSequenceClassification", "BloomForSequenceClassification"),
        token_classification("BloomForTokenClassification", "BloomForTokenClassification"),
        question_answering("BloomForQuestionAnswering", None),
        Head("BloomModel", "BloomModel", "encoder", base=True),
    ),
    modules=(
        ("transformer.word_embeddings", "bloom.word_embeddings"),
        ("transformer.word_embeddings_layernorm", "bloom.word_embeddings_layernorm"),
        (LAYER, TO),
        ("transformer.ln_f", "bloom.ln_f"),
    ),
    inside={TO: (
        ("input_layernorm", "input_layernorm", "input"),
        ("self_attention.query_key_value", "self_attention.query_key_value", "wiring of the norm"),
        ("self_attention.dense", "self_attention.dense", "attention: alibi, scale, mask, softmax"),
        ("post_attention_layernorm", "post_attention_layernorm", "residual"),
        ("mlp.dense_h_to_4h", "mlp.dense_h_to_4h", "wiring of the norm"),
        ("mlp.dense_4h_to_h", "mlp.dense_4h_to_h", "mlp activation"),
    )},
    tokenizer="byte-level fast", paddlenlp_tokenizer="bloom.tokenizer_fast:BloomTokenizerFast",
    demo={
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 272, "hidden_size": 64,
        "n_layer": 3, "n_head": 4, "layer_norm_epsilon": 1e-05, "initializer_range": 0.02,
        "apply_residual_connection_post_layernorm": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "pretraining_tp": 1, "slow_but_exact": False, "seq_length": 2048, "bos_token_id": 256, "eos_token_id": 256,
        "pad_token_id": 256, "tie_word_embeddings": True,
    },
    variants={
        "residual after the norm": {"apply_residual_connection_post_layernorm": True},
        "three heads": {"n_head": 3, "hidden_size": 48},
        "sliced": {"pretraining_tp": 4, "slow_but_exact": True},
        "untied": {"tie_word_embeddings": False},
    },
    settings={"normed residual": ("apply_residual_connection_post_layernorm",)},
    traits=Traits(
        fused="query_key_value", alibi="build_alibi_tensor", activations={"BloomGelu": "gelu_new"},
        switches={"apply_residual_connection_post_layernorm": (
            "adds the layer norm's output as residual, not its input",
            "adds the layer norm's input as residual, not its output")}),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
