"""GPT-2: fused q, k, v cut in three, new names; what OpenAI's ``Conv1D`` keeps is [in, out] already, as in Paddle."""

import sys

from convert.heads import question_answering, sequence_classification, shared_head, token_classification
from convert.rules import (
    Config,
    Family,
    Head,
    Sizes,
    activation,
    activation_fault,
    causal_mask,
    conv1d,
    counted,
    drop,
    heads_fault,
    keep,
    labels_of,
    norm,
    rules,
    size_of,
    split,
)
from convert.traits import Traits, Wiring


def sizes(config: Config) -> Sizes:
    hidden = size_of(config, "n_embd", "hidden_size")
    return {
        "hidden": hidden,
        "inner": size_of(config, "n_inner", default=4 * hidden),
        "vocab": size_of(config, "vocab_size"),
        "positions": size_of(config, "n_positions", "max_position_embeddings"),
        "labels": labels_of(config),
    }


def unsupported(config: Config) -> str | None:
    if config.get("add_cross_attention"):
        return "add_cross_attention is set; PaddleNLP's GPT and models/ read one sequence only"
    if config.get("pruned_heads"):
        return "pruned_heads is set; PaddleNLP's GPT and models/ have as many heads in every layer"
    return (heads_fault(config, ("n_embd", "hidden_size"), ("n_head", "num_attention_heads"), default=12)
            or activation_fault(config, "activation_function"))


def additions(config: Config) -> Config:
    """PaddleNLP's GPTConfig takes ``n_inner`` null for 3072 and a dropout of 0 for 0.1, ignores labels that are 0
    instead of -100, and has a key of its own for the scale.
    """
    hidden = size_of(config, "n_embd", "hidden_size")
    heads = size_of(config, "n_head", "num_attention_heads", default=12)
    return {
        "pad_token_id": config.get("eos_token_id"),
        "n_inner": 4 * hidden,
        "ignore_index": -100,
        "hidden_dropout_prob": config.get("embd_pdrop", 0.1),
        "attention_probs_dropout_prob": config.get("attn_pdrop", 0.1),
        "scale_qk_coeff": None if config.get("scale_attn_weights", True) else float(hidden // heads),
    }


MASK = "the causal mask of old files; both sides make it themselves"
LAYER, TO = "transformer.h.{i}", "gpt.decoder.layers.{i}"
FAMILY = Family(
    name="gpt2", paddlenlp="gpt", prefix="transformer.", target_prefix="gpt.", sizes=sizes,
    layers=counted("n_layer", "num_hidden_layers"), unsupported=unsupported, additions=additions,
    paddle_keys={
        "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings", "n_inner": "intermediate_size", "activation_function": "hidden_act",
        "resid_pdrop": "hidden_dropout_prob", "embd_pdrop": "hidden_dropout_prob",
        "attn_pdrop": "attention_probs_dropout_prob",
    },
    rules=rules(
        keep("transformer.wte.weight", "vocab", "hidden", to="gpt.embeddings.word_embeddings.weight"),
        keep("transformer.wpe.weight", "positions", "hidden", to="gpt.embeddings.position_embeddings.weight"),
        norm(f"{LAYER}.ln_1", "hidden", to=f"{TO}.norm1"),
        drop(f"{LAYER}.attn.bias", 1, 1, "positions", "positions", why=MASK, holding=causal_mask()),
        drop(f"{LAYER}.attn.masked_bias", why=MASK),
        split(f"{LAYER}.attn.c_attn.weight", ("hidden", 3 * ("hidden",)),
              to=f"{TO}.self_attn.{{q,k,v}}_proj.weight"),
        split(f"{LAYER}.attn.c_attn.bias", (3 * ("hidden",),), to=f"{TO}.self_attn.{{q,k,v}}_proj.bias"),
        conv1d(f"{LAYER}.attn.c_proj", "hidden", "hidden", to=f"{TO}.self_attn.out_proj"),
        norm(f"{LAYER}.ln_2", "hidden", to=f"{TO}.norm2"),
        conv1d(f"{LAYER}.mlp.c_fc", "hidden", "inner", to=f"{TO}.linear1"),
        activation(f"{LAYER}.mlp.act", "activation_function", to=f"{TO}.activation"),
        conv1d(f"{LAYER}.mlp.c_proj", "inner", "hidden", to=f"{TO}.linear2"),
        norm("transformer.ln_f", "hidden", to="gpt.decoder.norm"),
    ),
    heads=(
        Head("GPT2LMHeadModel", "GPTLMHeadModel", "causal-lm", rules(
            shared_head(of="transformer.wte.weight"),
            drop("multiple_choice_head.summary.{weight,bias}",
                 why="the second head of GPT2DoubleHeadsModel, which PaddleNLP has no class for"))),
        sequence_classification("GPT2ForSequenceClassification", "GPTForSequenceClassification"),
        token_classification("GPT2ForTokenClassification", "GPTForTokenClassification"),
        question_answering("GPT2ForQuestionAnswering", None),
        Head("GPT2Model", "GPTModel", "encoder", base=True),
    ),
    modules=(
        ("transformer.drop", "gpt.embeddings.dropout"),
        (LAYER, TO),
        ("transformer.ln_f", "gpt.decoder.norm"),
    ),
    inside={TO: (
        ("ln_1", "norm1", "input"),
        ("attn.c_attn", "self_attn.q_proj", "wiring of the norm"),
        ("attn.c_attn", "self_attn.k_proj", "wiring of the norm"),
        ("attn.c_attn", "self_attn.v_proj", "wiring of the norm"),
        ("attn.c_proj", "self_attn.out_proj", "attention: scale, mask, softmax"),
        ("ln_2", "norm2", "residual"),
        ("mlp.c_fc", "linear1", "wiring of the norm"),
        ("mlp.c_proj", "linear2", "mlp activation"),
    )},
    tokenizer="byte-level", paddlenlp_tokenizer="gpt.tokenizer:GPTTokenizer",
    demo={
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 272, "n_positions": 128,
        "n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": None, "activation_function": "gelu_new",
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256,
        "scale_attn_weights": True, "tie_word_embeddings": True,
    },
    variants={
        "n_inner other than 4 n_embd": {"n_inner": 96},
        "epsilon 1e-3": {"layer_norm_epsilon": 1e-3},
        "gelu (erf)": {"activation_function": "gelu"},
        "relu": {"activation_function": "relu"},
        "scores not scaled": {"scale_attn_weights": False},
        "scores scaled by 1 / layer": {"scale_attn_by_inverse_layer_idx": True},
        "attention reordered and upcast": {"reorder_and_upcast_attn": True},
        "untied head": {"tie_word_embeddings": False},
    },
    settings={"dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
    traits=Traits(
        wiring={TO: Wiring("norms before", norms=("ln_1", "ln_2"), attention=("attn",), feed=("mlp",))},
        mask_value="masked_bias"),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
