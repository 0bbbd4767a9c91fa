"""BERT: new names throughout, linears transposed, tied copies and a pooler that PaddleNLP's classes want."""

import sys

from convert.heads import copied_head
from convert.rules import (
    Config,
    Family,
    Head,
    Sizes,
    activation,
    activation_fault,
    buffer,
    copy_of,
    counted,
    drop,
    heads_fault,
    keep,
    labels_of,
    linear,
    norm,
    rules,
    size_of,
    zeros,
)
from convert.traits import Traits, Wiring


def sizes(config: Config) -> Sizes:
    return {
        "hidden": size_of(config, "hidden_size"),
        "inner": size_of(config, "intermediate_size"),
        "vocab": size_of(config, "vocab_size"),
        "positions": size_of(config, "max_position_embeddings"),
        "types": size_of(config, "type_vocab_size", default=2),
        "labels": labels_of(config),
    }


def unsupported(config: Config) -> str | None:
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        return f"position_embedding_type is {kind!r}; PaddleNLP's BERT and models/ know absolute positions only"
    if config.get("is_decoder") or config.get("add_cross_attention"):
        return "is_decoder or add_cross_attention is set; PaddleNLP's BERT and models/ are encoders only"
    return (heads_fault(config, ("hidden_size",), ("num_attention_heads",), default=12)
            or activation_fault(config, "hidden_act"))


LAYER, TO = "bert.encoder.layer.{i}", "bert.encoder.layers.{i}"
HEAD = "cls.predictions"
POOLER = linear("bert.pooler.dense", "hidden", "hidden")
NO_POOLER = linear("bert.pooler.dense", "hidden", "hidden", otherwise=zeros())
MASKED_LM = rules(
    linear(f"{HEAD}.transform.dense", "hidden", "hidden", to=f"{HEAD}.transform"),
    activation(f"{HEAD}.transform.transform_act_fn", "hidden_act", to=f"{HEAD}.activation"),
    norm(f"{HEAD}.transform.LayerNorm", "hidden", to=f"{HEAD}.layer_norm"),
    copied_head(f"{HEAD}.decoder.weight", of="bert.embeddings.word_embeddings.weight"),
    keep(f"{HEAD}.bias", "vocab", to=f"{HEAD}.decoder_bias"),
    buffer(f"{HEAD}.decoder.bias", "vocab", filling=copy_of(f"{HEAD}.bias")),
)

FAMILY = Family(
    name="bert", prefix="bert.", layers=counted("num_hidden_layers"), sizes=sizes, unsupported=unsupported,
    rules=rules(
        drop("bert.embeddings.position_ids", why="the numbers 0, 1, 2, …: Paddle counts them itself"),
        keep("bert.embeddings.word_embeddings.weight", "vocab", "hidden"),
        keep("bert.embeddings.position_embeddings.weight", "positions", "hidden"),
        keep("bert.embeddings.token_type_embeddings.weight", "types", "hidden"),
        norm("bert.embeddings.LayerNorm", "hidden", to="bert.embeddings.layer_norm"),
        linear(f"{LAYER}.attention.self.{{query,key,value}}", "hidden", "hidden", to=f"{TO}.self_attn.{{q,k,v}}_proj"),
        linear(f"{LAYER}.attention.output.dense", "hidden", "hidden", to=f"{TO}.self_attn.out_proj"),
        norm(f"{LAYER}.attention.output.LayerNorm", "hidden", to=f"{TO}.norm1"),
        linear(f"{LAYER}.intermediate.dense", "inner", "hidden", to=f"{TO}.linear1"),
        activation(f"{LAYER}.intermediate.intermediate_act_fn", "hidden_act", to=f"{TO}.activation"),
        linear(f"{LAYER}.output.dense", "hidden", "inner", to=f"{TO}.linear2"),
        norm(f"{LAYER}.output.LayerNorm", "hidden", to=f"{TO}.norm2"),
    ),
    heads=(
        Head("BertForPreTraining", "BertForPretraining", "pre-training", rules(
            POOLER, MASKED_LM, linear("cls.seq_relationship", 2, "hidden"))),
        Head("BertForMaskedLM", "BertForMaskedLM", "masked-lm", rules(NO_POOLER, MASKED_LM)),
        Head("BertForSequenceClassification", "BertForSequenceClassification", "sequence-classification", rules(
            POOLER, linear("classifier", "labels", "hidden"))),
        Head("BertForTokenClassification", "BertForTokenClassification", "token-classification", rules(
            NO_POOLER, linear("classifier", "labels", "hidden"))),
        Head("BertForQuestionAnswering", "BertForQuestionAnswering", "question-answering", rules(
            NO_POOLER, linear("qa_outputs", 2, "hidden", to="classifier"))),
        Head("BertModel", "BertModel", "encoder", rules(POOLER), base=True),
    ),
    modules=(
        ("bert.embeddings", "bert.embeddings"),
        (LAYER, TO),
        ("bert.pooler", "bert.pooler"),
        ("cls.predictions", "cls.predictions"),
    ),
    inside={
        "bert.embeddings": (
            ("word_embeddings", "word_embeddings", "ids"),
            ("token_type_embeddings", "token_type_embeddings", "token types"),
            ("LayerNorm", "layer_norm", "sum of the embeddings"),
        ),
        TO: (
            ("attention.self.query", "self_attn.q_proj", "input"),
            ("attention.self.key", "self_attn.k_proj", "input"),
            ("attention.self.value", "self_attn.v_proj", "input"),
            ("attention.output.dense", "self_attn.out_proj", "attention: scale, mask, softmax"),
            ("attention.output.LayerNorm", "norm1", "residual"),
            ("intermediate.dense", "linear1", "wiring of the norm"),
            ("output.dense", "linear2", "activation"),
            ("output.LayerNorm", "norm2", "residual"),
        ),
        "bert.pooler": (("dense", "dense", "first token"),),
        "cls.predictions": (
            ("transform.dense", "transform", "input"),
            ("transform.LayerNorm", "layer_norm", "activation"),
            ("decoder", "decoder", "wiring of the norm"),
        ),
    },
    tokenizer="wordpiece", paddlenlp_tokenizer="bert.tokenizer:BertTokenizer",
    demo={
        "model_type": "bert", "architectures": ["BertForPreTraining"], "vocab_size": 512, "hidden_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 128,
        "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "position_embedding_type": "absolute", "tie_word_embeddings": True,
    },
    variants={
        "relu": {"hidden_act": "relu"}, "silu": {"hidden_act": "silu"}, "gelu_new": {"hidden_act": "gelu_new"},
        "one token type": {"type_vocab_size": 1}, "epsilon 1e-3": {"layer_norm_eps": 1e-3},
        "untied": {"tie_word_embeddings": False},
    },
    settings={"dropout": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")},
    traits=Traits(wiring={TO: Wiring(
        "norms behind", norms=("attention.output.LayerNorm", "output.LayerNorm"),
        attention=("attention.self", "attention.output.dense"), feed=("intermediate", "output.dense"))}),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
