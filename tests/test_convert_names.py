"""Known answers: the name maps written by hand, the values torch's, the keys PaddleNLP's, for every head."""

import importlib

import numpy as np
import paddle
import paddlenlp.transformers
import pytest
from safetensors.numpy import load_file

import models

KEEP, TRANSPOSE = False, True
GPTJ = {
    "wte.weight": ("wte.weight", KEEP),
    "h.0.ln_1.weight": ("h.0.ln_1.weight", KEEP),
    "h.0.ln_1.bias": ("h.0.ln_1.bias", KEEP),
    "h.0.attn.q_proj.weight": ("h.0.attn.q_proj.weight", TRANSPOSE),
    "h.0.attn.k_proj.weight": ("h.0.attn.k_proj.weight", TRANSPOSE),
    "h.0.attn.v_proj.weight": ("h.0.attn.v_proj.weight", TRANSPOSE),
    "h.0.attn.out_proj.weight": ("h.0.attn.out_proj.weight", TRANSPOSE),
    "h.0.mlp.fc_in.weight": ("h.0.mlp.fc_in.weight", TRANSPOSE),
    "h.0.mlp.fc_in.bias": ("h.0.mlp.fc_in.bias", KEEP),
    "h.0.mlp.fc_out.weight": ("h.0.mlp.fc_out.weight", TRANSPOSE),
    "h.0.mlp.fc_out.bias": ("h.0.mlp.fc_out.bias", KEEP),
    "ln_f.weight": ("ln_f.weight", KEEP),
    "ln_f.bias": ("ln_f.bias", KEEP),
}
BERT = {
    "embeddings.word_embeddings.weight": ("embeddings.word_embeddings.weight", KEEP),
    "embeddings.position_embeddings.weight": ("embeddings.position_embeddings.weight", KEEP),
    "embeddings.token_type_embeddings.weight": ("embeddings.token_type_embeddings.weight", KEEP),
    "embeddings.LayerNorm.weight": ("embeddings.layer_norm.weight", KEEP),
    "embeddings.LayerNorm.bias": ("embeddings.layer_norm.bias", KEEP),
    "encoder.layer.0.attention.self.query.weight": ("encoder.layers.0.self_attn.q_proj.weight", TRANSPOSE),
    "encoder.layer.0.attention.self.query.bias": ("encoder.layers.0.self_attn.q_proj.bias", KEEP),
    "encoder.layer.0.attention.self.key.weight": ("encoder.layers.0.self_attn.k_proj.weight", TRANSPOSE),
    "encoder.layer.0.attention.self.key.bias": ("encoder.layers.0.self_attn.k_proj.bias", KEEP),
    "encoder.layer.0.attention.self.value.weight": ("encoder.layers.0.self_attn.v_proj.weight", TRANSPOSE),
    "encoder.layer.0.attention.self.value.bias": ("encoder.layers.0.self_attn.v_proj.bias", KEEP),
    "encoder.layer.0.attention.output.dense.weight": ("encoder.layers.0.self_attn.out_proj.weight", TRANSPOSE),
    "encoder.layer.0.attention.output.dense.bias": ("encoder.layers.0.self_attn.out_proj.bias", KEEP),
    "encoder.layer.0.attention.output.LayerNorm.weight": ("encoder.layers.0.norm1.weight", KEEP),
    "encoder.layer.0.attention.output.LayerNorm.bias": ("encoder.layers.0.norm1.bias", KEEP),
    "encoder.layer.0.intermediate.dense.weight": ("encoder.layers.0.linear1.weight", TRANSPOSE),
    "encoder.layer.0.intermediate.dense.bias": ("encoder.layers.0.linear1.bias", KEEP),
    "encoder.layer.0.output.dense.weight": ("encoder.layers.0.linear2.weight", TRANSPOSE),
    "encoder.layer.0.output.dense.bias": ("encoder.layers.0.linear2.bias", KEEP),
    "encoder.layer.0.output.LayerNorm.weight": ("encoder.layers.0.norm2.weight", KEEP),
    "encoder.layer.0.output.LayerNorm.bias": ("encoder.layers.0.norm2.bias", KEEP),
}
POOLER = {"pooler.dense.weight": ("pooler.dense.weight", TRANSPOSE), "pooler.dense.bias": ("pooler.dense.bias", KEEP)}
MASKED_LM = {
    "cls.predictions.transform.dense.weight": ("cls.predictions.transform.weight", TRANSPOSE),
    "cls.predictions.transform.dense.bias": ("cls.predictions.transform.bias", KEEP),
    "cls.predictions.transform.LayerNorm.weight": ("cls.predictions.layer_norm.weight", KEEP),
    "cls.predictions.transform.LayerNorm.bias": ("cls.predictions.layer_norm.bias", KEEP),
    "cls.predictions.bias": ("cls.predictions.decoder_bias", KEEP),
}
NEXT_SENTENCE = {
    "cls.seq_relationship.weight": ("cls.seq_relationship.weight", TRANSPOSE),
    "cls.seq_relationship.bias": ("cls.seq_relationship.bias", KEEP),
}


def dense(source, target):
    return {f"{source}.weight": (f"{target}.weight", TRANSPOSE), f"{source}.bias": (f"{target}.bias", KEEP)}


def under(prefix, names):
    return {prefix + source: (prefix + target, transposed) for source, (target, transposed) in names.items()}


GPTJ_BODY, BERT_BODY, BERT_POOLED = under("transformer.", GPTJ), under("bert.", BERT), under("bert.", BERT | POOLER)
NAMES = {
    "GPTJForCausalLM": GPTJ_BODY | dense("lm_head", "lm_head"),
    "GPTJForSequenceClassification": GPTJ_BODY | {"score.weight": ("score.weight", TRANSPOSE)},
    "GPTJForQuestionAnswering": GPTJ_BODY | dense("qa_outputs", "qa_outputs"),
    "GPTJModel": GPTJ,
    "BertForPreTraining": BERT_POOLED | MASKED_LM | NEXT_SENTENCE,
    "BertForMaskedLM": BERT_BODY | MASKED_LM,
    "BertForSequenceClassification": BERT_POOLED | dense("classifier", "classifier"),
    "BertForTokenClassification": BERT_BODY | dense("classifier", "classifier"),
    "BertForQuestionAnswering": BERT_BODY | dense("qa_outputs", "classifier"),
    "BertModel": BERT | POOLER,
}
PADDLENLP = {head: "BertForPretraining" if head == "BertForPreTraining" else head for head in NAMES}
ONE_LAYER = {"G": {"n_layer": 1}, "B": {"num_hidden_layers": 1}}
LABELS = {head: {"num_labels": 3} for head in NAMES if "Classification" in head}

every_head = pytest.mark.parametrize("head", NAMES)
both_formats = pytest.mark.parametrize("file_format", ["safetensors", "pdparams"])


@pytest.fixture
def pair(head, file_format, torch_model, tmp_path, convert):
    """The torch model of ``head`` with one layer, and its conversion."""
    model = torch_model(head, **ONE_LAYER[head[0]], **LABELS.get(head, {}))
    model.save_pretrained(tmp_path / "source")
    run = convert(tmp_path / "source", "--format", file_format)
    assert run.code == 0, run.stderr
    return model, run


def held_in(run):
    """The tensors of a result, read by the safetensors library or by Paddle."""
    if (run.output / "model.safetensors").exists():
        return load_file(run.output / "model.safetensors")
    return paddle.load(str(run.output / "model_state.pdparams"), return_numpy=True)


def made_for(head, state):
    """What Paddle's class wants and torch's does not save."""
    prefix = "" if head == "GPTJModel" else "transformer."
    if head.startswith("GPTJ"):
        return {f"{prefix}h.0.attn.bias": np.tril(np.ones((8, 8), "float32"))[None, None],
                f"{prefix}h.0.attn.masked_bias": np.float32(-1e9)}
    made = {}
    if head in ("BertForPreTraining", "BertForMaskedLM"):
        made["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].numpy()
        made["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].numpy()
    if head in ("BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"):
        made |= {"bert.pooler.dense.weight": np.zeros((16, 16)), "bert.pooler.dense.bias": np.zeros(16)}
    return made


@every_head
@both_formats
def test_every_tensor_is_torchs_under_its_new_name(head, pair):
    model, run = pair
    state = model.state_dict()
    expected = {target: state[source].numpy().T if transposed else state[source].numpy()
                for source, (target, transposed) in NAMES[head].items()} | made_for(head, state)
    held = held_in(run)
    assert held.keys() == expected.keys()
    for name, array in expected.items():
        assert held[name].dtype == np.float32
        assert np.array_equal(held[name].reshape(array.shape), array), name
        assert held[name].shape == (array.shape or held[name].shape)


@every_head
@pytest.mark.parametrize("file_format", ["safetensors"])
def test_the_report_tells_the_same_map(head, pair):
    model, run = pair
    told = {row["source"]: (row["target"], row["transposed"]) for row in run.report["tensors"]
            if row["rule"] != "buffer"}
    made = {row["target"] for row in run.report["tensors"] if row["rule"] == "buffer"}
    assert told == NAMES[head]
    assert made == made_for(head, model.state_dict()).keys()


@every_head
@both_formats
def test_paddlenlp_loads_it_without_missing_or_unexpected_keys(head, pair, monkeypatch):
    _, run = pair
    cls = getattr(paddlenlp.transformers, PADDLENLP[head])
    load, told = cls._load_pretrained_model, []

    def listening(*arguments, **options):
        told.append(load(*arguments, **options))
        return told[0]

    monkeypatch.setattr(cls, "_load_pretrained_model", listening)
    net = cls.from_pretrained(str(run.output))
    _, missing, unexpected, mismatched = told[0]
    assert (missing, unexpected, mismatched) == ([], [], [])
    held, wanted = held_in(run), net.state_dict()
    assert held.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(held[name].reshape(value.shape), value.numpy()), name


@every_head
@both_formats
def test_our_own_net_loads_it(head, pair):
    _, run = pair
    net, held = models.from_pretrained(run.output), held_in(run)
    assert type(net).__name__ == head
    for name, value in net.state_dict().items():
        assert np.array_equal(held[name].reshape(value.shape), value.numpy()), name


@pytest.mark.parametrize("family", ["gptj", "bert"])
def test_every_head_of_the_family_is_in_this_file(family):
    heads = importlib.import_module(f"convert.{family}").FAMILY.heads
    assert {head.architecture: head.paddlenlp for head in heads} == {
        head: name for head, name in PADDLENLP.items() if head.lower().startswith(family)}


def test_a_question_answering_head_has_two_outputs_as_paddles_class(checkpoint, refused):
    refused(checkpoint("BertForQuestionAnswering", num_labels=3), says=("qa_outputs.weight", "[3, 16]", "[2, 16]"))
