"""T5: the same names below ``t5.``, linears transposed, one table for what torch calls by up to four names."""

import re
import sys

from convert.heads import is_tied, is_untied
from convert.rules import (
    Config,
    Family,
    Head,
    Inside,
    Layers,
    Rule,
    Sizes,
    activation_fault,
    depth_of,
    drop,
    keep,
    linear,
    norm,
    rules,
    size_of,
    tied,
)
from convert.traits import RelativePositions, Traits

UNLIMITED = 1 << 20
Parts = tuple[tuple[str, str, str], ...]


def sizes(config: Config) -> Sizes:
    return {
        "hidden": size_of(config, "d_model", "hidden_size"),
        "inner": size_of(config, "d_ff"),
        "attention": size_of(config, "num_heads", "num_attention_heads") * size_of(config, "d_kv", "head_dim"),
        "heads": size_of(config, "num_heads", "num_attention_heads"),
        "buckets": size_of(config, "relative_attention_num_buckets", default=32),
        "vocab": size_of(config, "vocab_size"),
        "positions": UNLIMITED,
    }


def layers(config: Config) -> Layers:
    encoder = ("num_layers", "num_hidden_layers")
    return {"i": depth_of(config, *encoder), "j": depth_of(config, "num_decoder_layers", *encoder)}


def unsupported(config: Config) -> str | None:
    projection = config.get("feed_forward_proj", "relu")
    if not isinstance(projection, str) or not re.fullmatch(r"(gated-)?[^-]+", projection):
        return f"feed_forward_proj is {projection!r}; an activation, or gated- and one, is needed"
    for key in ("tie_encoder_decoder", "is_decoder"):
        if config.get(key):
            return f"{key} is set; PaddleNLP's T5 and models/ have an encoder and a decoder with weights of their own"
    if config.get("dense_act_fn") is not None and activation_fault(config, "dense_act_fn"):
        return activation_fault(config, "dense_act_fn")
    if not sizes(config)["attention"]:
        return "num_heads or d_kv is 0; heads of some width are needed"
    return None


def gated(config: Config) -> bool:
    """As transformers: what the file says of the gate overrides what the projection's name implies."""
    said = config.get("is_gated_act")
    return str(config.get("feed_forward_proj", "relu")).startswith("gated-") if said is None else bool(said)


def plain(config: Config) -> bool:
    return not gated(config)


def learned(config: Config) -> bool:
    return (config.get("dense_act_fn") or str(config.get("feed_forward_proj")).split("-")[-1]) == "prelu"


def attention(name: str) -> list[Rule]:
    return [*linear(f"{name}.{{q,k,v}}", "attention", "hidden", to=f"t5.{name}.{{q,k,v}}", bias=False),
            *linear(f"{name}.o", "hidden", "attention", to=f"t5.{name}.o", bias=False)]


def feed_forward(name: str) -> list[Rule]:
    dense = f"{name}.DenseReluDense"
    return [
        *linear(f"{dense}.wi", "inner", "hidden", to=f"t5.{dense}.wi", bias=False, when=plain),
        *linear(f"{dense}.wi_{{0,1}}", "inner", "hidden", to=f"t5.{dense}.wi_{{0,1}}", bias=False, when=gated),
        *keep(f"{dense}.act.weight", 1, to=f"t5.{dense}.act.weight", when=learned),
        *linear(f"{dense}.wo", "hidden", "inner", to=f"t5.{dense}.wo", bias=False),
    ]


def scale(name: str) -> list[Rule]:
    return norm(f"{name}layer_norm", "hidden", to=f"t5.{name}layer_norm", bias=False)


def positions(name: str) -> list[Rule]:
    table = f"{name}.SelfAttention.relative_attention_bias.weight"
    return keep(table, "buckets", "heads", to=f"t5.{table}")


ENCODER, DECODER = "encoder.block.{i}.layer", "decoder.block.{j}.layer"
DECODER_RULES = rules(
    tied("decoder.embed_tokens.weight", "vocab", "hidden", of="shared.weight", again="t5.decoder.embed_tokens.weight"),
    positions("decoder.block.0.layer.0"),
    drop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
         why="early files carry it; attention to the encoder has no positions, and transformers ignores it too"),
    scale(f"{DECODER}.0."),
    attention(f"{DECODER}.0.SelfAttention"),
    scale(f"{DECODER}.1."),
    attention(f"{DECODER}.1.EncDecAttention"),
    scale(f"{DECODER}.2."),
    feed_forward(f"{DECODER}.2"),
    scale("decoder.final_"),
)


def attention_inside(layer: str, kind: str, states: str, told: str) -> Parts:
    parts = (
        (f"{layer}.layer_norm", "input" if kind == "SelfAttention" else "residual"),
        (f"{layer}.{kind}.q", "wiring of the norm"),
        (f"{layer}.{kind}.k", states),
        (f"{layer}.{kind}.v", states),
        (f"{layer}.{kind}.o", f"attention: {told}"),
    )
    return tuple((name, name, before) for name, before in parts)


def feed_forward_inside(layer: str, config: Config) -> Parts:
    parts = (
        (f"{layer}.layer_norm", "residual"),
        *((f"{layer}.DenseReluDense.{name}", "wiring of the norm")
          for name in (("wi_0", "wi_1") if gated(config) else ("wi",))),
        (f"{layer}.DenseReluDense.wo", "activation"),
    )
    return tuple((name, name, before) for name, before in parts)


def inside(config: Config) -> Inside:
    """Only the first block of a stack has the table of positions; what it looks up there is used by all."""
    table = "layer.0.SelfAttention.relative_attention_bias"
    own = attention_inside("layer.0", "SelfAttention", "wiring of the norm", "relative positions, mask, softmax")
    own = (*own[:-1], (table, table, "distances"), own[-1])
    return {
        "t5.encoder.block.{i}": (*own, *feed_forward_inside("layer.1", config)),
        "t5.decoder.block.{j}": (
            *own,
            *attention_inside("layer.1", "EncDecAttention", "the encoder's states", "mask, softmax"),
            *feed_forward_inside("layer.2", config),
        ),
    }


FAMILY = Family(
    name="t5", prefix="", target_prefix="t5.", layers=layers, sizes=sizes, unsupported=unsupported,
    rules=rules(
        keep("shared.weight", "vocab", "hidden", to="t5.shared.weight"),
        tied("encoder.embed_tokens.weight", "vocab", "hidden", of="shared.weight",
             again="t5.encoder.embed_tokens.weight"),
        positions("encoder.block.0.layer.0"),
        scale(f"{ENCODER}.0."),
        attention(f"{ENCODER}.0.SelfAttention"),
        scale(f"{ENCODER}.1."),
        feed_forward(f"{ENCODER}.1"),
        scale("encoder.final_"),
    ),
    heads=(
        Head("T5ForConditionalGeneration", "T5ForConditionalGeneration", "translation", rules(
            DECODER_RULES,
            tied("lm_head.weight", "vocab", "hidden", of="shared.weight", when=is_tied),
            linear("lm_head", "vocab", "hidden", bias=False, when=is_untied),
        ), inputs="tokens to tokens", prefix="translate English to German: "),
        Head("T5Model", "T5Model", "encoder-decoder", DECODER_RULES, base=True, inputs="tokens to tokens"),
        Head("T5EncoderModel", "T5EncoderModel", "encoder", base=True),
    ),
    modules=(
        ("shared", "t5.shared"),
        ("encoder.block.{i}", "t5.encoder.block.{i}"),
        ("encoder.final_layer_norm", "t5.encoder.final_layer_norm"),
        ("decoder.block.{j}", "t5.decoder.block.{j}"),
        ("decoder.final_layer_norm", "t5.decoder.final_layer_norm"),
    ),
    inside=inside,
    tokenizer="sentencepiece", paddlenlp_tokenizer="t5.tokenizer:T5Tokenizer",
    demo={
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 256, "d_model": 64,
        "d_kv": 4, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 8,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-06, "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    },
    variants={
        "v1.0: relu, one table": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
        "gated-silu": {"feed_forward_proj": "gated-silu"},
        "gelu": {"feed_forward_proj": "gelu"},
        "max_distance 40": {"relative_attention_max_distance": 40},
        "epsilon 0.1": {"layer_norm_epsilon": 0.1},
        "as deep as the encoder": {"num_decoder_layers": None},
    },
    additions=lambda config: {"bos_token_id": config.get("decoder_start_token_id")},
    settings={
        "activation": ("dense_act_fn",), "heads": ("num_heads",), "head width": ("d_kv",), "dropout": ("dropout_rate",),
        "relative positions": ("relative_attention_num_buckets", "relative_attention_max_distance"),
    },
    traits=Traits(
        branches=("DenseReluDense", "SelfAttention", "EncDecAttention"), scaled=False,
        relative=RelativePositions(
            held="has_relative_attention_bias", table="relative_attention_bias",
            buckets="relative_attention_num_buckets", farthest="relative_attention_max_distance",
            one_way="is_decoder")),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
