"""OPT: new names throughout, linears transposed, and a head that PaddleNLP's class does not tie to the words."""

import sys

from convert.heads import copied_head, question_answering, sequence_classification
from convert.rules import (
    Config,
    Family,
    Head,
    Inside,
    Rule,
    Sizes,
    activation,
    activation_fault,
    buffer,
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
from convert.traits import Traits


def sizes(config: Config) -> Sizes:
    hidden, positions = size_of(config, "hidden_size"), size_of(config, "max_position_embeddings")
    return {
        "hidden": hidden,
        "words": size_of(config, "word_embed_proj_dim", default=hidden),
        "inner": size_of(config, "ffn_dim"),
        "vocab": size_of(config, "vocab_size"),
        "positions": positions,
        "positions and two": positions + 2,
        "labels": labels_of(config),
    }


def unsupported(config: Config) -> str | None:
    return (heads_fault(config, ("hidden_size",), ("num_attention_heads",), default=12)
            or activation_fault(config, "activation_function"))


def projects(config: Config) -> bool:
    return config.get("word_embed_proj_dim") not in (None, config.get("hidden_size"))


def norms_before(config: Config) -> bool:
    return config.get("do_layer_norm_before", True)


def ends_in_norm(config: Config) -> bool:
    return norms_before(config) and not config.get("_remove_final_layer_norm")


def biased(config: Config) -> bool:
    return config.get("enable_bias", True)


def affine(config: Config) -> bool:
    return config.get("layer_norm_elementwise_affine", True)


def linear_or_unbiased(name: str, rows: str, columns: str, to: str) -> list[Rule]:
    """A linear; without ``enable_bias`` PaddleNLP's class has a bias all the same, of zeros."""
    names = dict(to=f"{to}.bias")
    return [*linear(name, rows, columns, to=to, bias=False), *keep(f"{name}.bias", rows, when=biased, **names),
            *buffer(f"{name}.bias", rows, filling=constant(0.0, checked=True), **names,
                    when=lambda config: not biased(config))]


def norm_or_plain(name: str, to: str, there=lambda config: True) -> list[Rule]:
    """A layer norm; without ``layer_norm_elementwise_affine`` PaddleNLP's class multiplies by ones and adds zeros."""
    made = (buffer(f"{name}.{word}", "hidden", to=f"{to}.{word}", filling=constant(value, checked=True),
                   when=lambda config: there(config) and not affine(config))
            for word, value in (("weight", 1.0), ("bias", 0.0)))
    return [*norm(name, "hidden", to=to, when=lambda config: there(config) and affine(config)),
            *(rule for group in made for rule in group)]


LAYER, TO = "model.decoder.layers.{i}", "opt.decoder.layers.{i}"
WORDS = "model.decoder.embed_tokens.weight"


def inside(config: Config) -> Inside:
    """The norms come before attention and MLP, or (350m) after them."""
    first, second = ("self_attn_layer_norm", "norm1"), ("final_layer_norm", "norm2")
    q, k, v, out = ((f"self_attn.{letter}_proj",) * 2 for letter in ("q", "k", "v", "out"))
    up, down = ("fc1", "linear1"), ("fc2", "linear2")
    attention = "attention: scale, mask, softmax"
    if norms_before(config):
        normed = "wiring of the norm"
        order = ((*first, "input"), (*q, normed), (*k, normed), (*v, normed), (*out, attention),
                 (*second, "residual"), (*up, normed), (*down, "activation"))
    else:
        order = ((*q, "input"), (*k, "input"), (*v, "input"), (*out, attention), (*first, "residual"),
                 (*up, "wiring of the norm"), (*down, "activation"), (*second, "residual"))
    return {TO: order}


FAMILY = Family(
    name="opt", prefix="model.", target_prefix="opt.", layers=counted("num_hidden_layers"), sizes=sizes,
    unsupported=unsupported,
    rules=rules(
        keep(WORDS, "vocab", "words", to="opt.embeddings.word_embeddings.weight"),
        keep("model.decoder.embed_positions.weight", "positions and two", "hidden",
             to="opt.embeddings.position_embeddings.weight"),
        linear("model.decoder.project_in", "hidden", "words", to="opt.embeddings.project_in", bias=False,
               when=projects),
        *(linear_or_unbiased(f"{LAYER}.self_attn.{letter}_proj", "hidden", "hidden", f"{TO}.self_attn.{letter}_proj")
          for letter in ("q", "k", "v", "out")),
        norm_or_plain(f"{LAYER}.self_attn_layer_norm", f"{TO}.norm1"),
        linear_or_unbiased(f"{LAYER}.fc1", "inner", "hidden", f"{TO}.linear1"),
        activation(f"{LAYER}.activation_fn", "activation_function", to=f"{TO}.activation"),
        linear_or_unbiased(f"{LAYER}.fc2", "hidden", "inner", f"{TO}.linear2"),
        norm_or_plain(f"{LAYER}.final_layer_norm", f"{TO}.norm2"),
        norm_or_plain("model.decoder.final_layer_norm", "opt.decoder.final_layer_norm", ends_in_norm),
        linear("model.decoder.project_out", "words", "hidden", to="opt.decoder.project_out", bias=False,
               when=projects),
    ),
    heads=(
        Head("OPTForCausalLM", "OPTForCausalLM", "causal-lm",
             copied_head("lm_head.weight", of=WORDS, to="lm_head.decoder_weight", width="words")),
        sequence_classification("OPTForSequenceClassification", None, width="words"),
        question_answering("OPTForQuestionAnswering", None, width="words"),
        Head("OPTModel", "OPTModel", "encoder", base=True),
    ),
    modules=(
        ("model.decoder.embed_tokens", "opt.embeddings.word_embeddings"),
        ("model.decoder.embed_positions", "opt.embeddings.position_embeddings"),
        ("model.decoder.project_in", "opt.embeddings.project_in"),
        (LAYER, TO),
        ("model.decoder.final_layer_norm", "opt.decoder.final_layer_norm"),
        ("model.decoder.project_out", "opt.decoder.project_out"),
    ),
    inside=inside,
    tokenizer="byte-level", paddlenlp_tokenizer="gpt.tokenizer:GPTTokenizer",
    demo={
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 272, "hidden_size": 64,
        "num_hidden_layers": 3, "ffn_dim": 256, "num_attention_heads": 4, "max_position_embeddings": 128,
        "do_layer_norm_before": True, "_remove_final_layer_norm": False, "word_embed_proj_dim": 64,
        "enable_bias": True, "layer_norm_elementwise_affine": True, "activation_function": "relu", "dropout": 0.1,
        "attention_dropout": 0.0, "layerdrop": 0.0, "init_std": 0.02, "bos_token_id": 256, "eos_token_id": 256,
        "pad_token_id": 256, "tie_word_embeddings": True,
    },
    variants={
        "350m-like": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        "post-norm": {"do_layer_norm_before": False},
        "Galactica-like": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
        "no biases, norms that learn nothing": {"enable_bias": False, "layer_norm_elementwise_affine": False},
        "no final norm": {"_remove_final_layer_norm": True},
        "untied": {"tie_word_embeddings": False},
    },
    additions=lambda config: {
        "normalize_before": norms_before(config), "word_embed_proj_dim": sizes(config)["words"],
        "hidden_dropout_prob": config.get("dropout"), "initializer_range": config.get("init_std"),
        "attention_probs_dropout_prob": config.get("attention_dropout"), "pad_token_id": 1,
    },
    paddle_keys={
        "ffn_dim": "intermediate_size", "activation_function": "hidden_act", "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob", "do_layer_norm_before": "normalize_before",
        "init_std": "initializer_range",
    },
    settings={"norms before": ("do_layer_norm_before",)},
    traits=Traits(switches={"do_layer_norm_before": (
        "has its layer norms before attention and MLP instead of behind them",
        "has its layer norms behind attention and MLP instead of before them")}),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
