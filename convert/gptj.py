"""GPT-J: both sides use the same names, so only the layout of the linears and two buffers change."""

import sys

from convert.heads import question_answering, sequence_classification
from convert.rules import (
    Config,
    Family,
    Head,
    Sizes,
    activation,
    activation_fault,
    buffer,
    causal_mask,
    constant,
    counted,
    heads_fault,
    keep,
    labels_of,
    linear,
    norm,
    rules,
    size_of,
)
from convert.traits import Rotary, Traits, Wiring


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
    if config.get("tie_word_embeddings"):
        return "tie_word_embeddings is true; Paddle's lm_head holds [in, out] and cannot share the embedding's storage"
    return (heads_fault(config, ("n_embd", "hidden_size"), ("n_head", "num_attention_heads"), default=16)
            or activation_fault(config, "activation_function"))


FAMILY = Family(
    name="gptj", prefix="transformer.", layers=counted("n_layer", "num_hidden_layers"), sizes=sizes,
    unsupported=unsupported,
    rules=rules(
        keep("transformer.wte.weight", "vocab", "hidden"),
        norm("transformer.h.{i}.ln_1", "hidden"),
        linear("transformer.h.{i}.attn.{q,k,v,out}_proj", "hidden", "hidden", bias=False),
        buffer("transformer.h.{i}.attn.bias", 1, 1, "positions", "positions", filling=causal_mask()),
        buffer("transformer.h.{i}.attn.masked_bias", filling=constant(-1e9)),
        linear("transformer.h.{i}.mlp.fc_in", "inner", "hidden"),
        activation("transformer.h.{i}.mlp.act", "activation_function"),
        linear("transformer.h.{i}.mlp.fc_out", "hidden", "inner"),
        norm("transformer.ln_f", "hidden"),
    ),
    heads=(
        Head("GPTJForCausalLM", "GPTJForCausalLM", "causal-lm", rules(linear("lm_head", "vocab", "hidden"))),
        sequence_classification("GPTJForSequenceClassification", "GPTJForSequenceClassification"),
        question_answering("GPTJForQuestionAnswering", "GPTJForQuestionAnswering", scores="labels"),
        Head("GPTJModel", "GPTJModel", "encoder", base=True),
    ),
    modules=(
        ("transformer.drop", "transformer.drop"),
        ("transformer.h.{i}", "transformer.h.{i}"),
        ("transformer.ln_f", "transformer.ln_f"),
    ),
    inside={"transformer.h.{i}": (
        ("ln_1", "ln_1", "input"),
        ("attn.q_proj", "attn.q_proj", "wiring of the norm"),
        ("attn.k_proj", "attn.k_proj", "wiring of the norm"),
        ("attn.v_proj", "attn.v_proj", "wiring of the norm"),
        ("attn.out_proj", "attn.out_proj", "attention: rotary, scale, mask, softmax"),
        ("mlp.fc_in", "mlp.fc_in", "wiring of the norm"),
        ("mlp.fc_out", "mlp.fc_out", "mlp activation"),
    )},
    tokenizer="byte-level", paddlenlp_tokenizer="gptj.tokenizer:GPTJTokenizer",
    demo={
        "model_type": "gptj", "architectures": ["GPTJForCausalLM"], "vocab_size": 272, "n_positions": 128,
        "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_inner": None, "activation_function": "gelu_new",
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256,
        "tie_word_embeddings": False,
    },
    variants={
        "every channel turned": {"rotary_dim": 16}, "gelu": {"activation_function": "gelu"},
        "relu": {"activation_function": "relu"}, "epsilon 1e-3": {"layer_norm_epsilon": 1e-3},
        "inner 96": {"n_inner": 96},
    },
    additions=lambda config: {"pad_token_id": config.get("eos_token_id")},
    settings={"rotary dimension": ("rotary_dim",), "dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
    traits=Traits(
        wiring={"transformer.h.{i}": Wiring("side by side", norms=("ln_1",), attention=("attn",), feed=("mlp",))},
        rotary=Rotary(turn="apply_rotary_pos_emb", width="rotary_dim", table="embed_positions"),
        mask_value="masked_bias"),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
