"""models/bert.py against the unmodified classes of transformers, eager attention, eval mode."""

import re

import numpy as np
import paddle
import pytest
import torch
from transformers import BertConfig
from transformers.activations import ACT2FN
from transformers.models.bert import modeling_bert as reference

from models import bert

TINY = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
    num_labels=2,
    architectures=["BertForPreTraining"],
)
HEADS = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]
OWN_POOLER = ["BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"]
NAMES = [
    ("encoder.layer.", "encoder.layers."),
    ("attention.self.query", "self_attn.q_proj"),
    ("attention.self.key", "self_attn.k_proj"),
    ("attention.self.value", "self_attn.v_proj"),
    ("attention.output.dense", "self_attn.out_proj"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "linear1"),
    ("intermediate.intermediate_act_fn", "activation"),
    ("embeddings.LayerNorm", "embeddings.layer_norm"),
    ("predictions.transform.dense", "predictions.transform"),
    ("predictions.transform.transform_act_fn", "predictions.activation"),
    ("predictions.transform.LayerNorm", "predictions.layer_norm"),
    ("predictions.bias", "predictions.decoder_bias"),
    ("qa_outputs", "classifier"),
]
LINEAR = re.compile(r".*(_proj|linear[12]|transform|dense|seq_relationship|classifier)\.weight")
LENGTH = 12
MASKS = {
    "none": None,
    "right": [[1] * 12, [1] * 9 + [0] * 3, [1] * 5 + [0] * 7],
    "left": [[1] * 12, [0] * 3 + [1] * 9, [0] * 7 + [1] * 5],
    "both": [[1] * 12, [0] * 2 + [1] * 7 + [0] * 3, [0] * 5 + [1] * 5 + [0] * 2],
}


def pair(head, seed=0, **overrides):
    """The class of transformers with random weights of trained scale, and ours with the same weights."""
    config = BertConfig(**TINY | overrides, attn_implementation="eager")
    torch.manual_seed(seed)
    theirs = getattr(reference, head)(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(std=0.2 if weight.dim() == 2 else 0.1)
            if name.endswith("LayerNorm.weight"):
                weight += 1.0
    ours = getattr(bert, head).from_config(config.to_dict())
    ours.load(in_paddle_layout(theirs, head))
    ours.eval()
    return theirs, ours


def paddle_name(name):
    for torch_part, paddle_part in NAMES:
        name = name.replace(torch_part, paddle_part)
    return re.sub(
        r"(layers\.\d+)\.output\.dense",
        r"\1.linear2",
        re.sub(r"(layers\.\d+)\.output\.LayerNorm", r"\1.norm2", name),
    )


def in_paddle_layout(net, head):
    state = {paddle_name(name): weight.detach().numpy() for name, weight in net.named_parameters()}
    state = {name: array.T if LINEAR.fullmatch(name) else array for name, array in state.items()}
    if head in OWN_POOLER:
        width = TINY["hidden_size"]
        state |= {
            "bert.pooler.dense.weight": np.ones([width, width], "float32"),
            "bert.pooler.dense.bias": np.ones([width], "float32"),
        }
    return state


def inputs_of(padding="none", seed=0):
    random = np.random.default_rng(seed)
    tokens = random.integers(3, TINY["vocab_size"], (3, LENGTH))
    types = random.integers(0, 2, (3, LENGTH))
    if MASKS[padding] is None:
        return {"input_ids": tokens, "token_type_ids": types}, np.ones((3, LENGTH), bool)
    mask = np.array(MASKS[padding])
    return {"input_ids": tokens * mask, "token_type_ids": types, "attention_mask": mask}, mask == 1


def run(net, **inputs):
    """The net's outputs by name as numpy arrays, whichever framework it belongs to."""
    module, convert = (
        (torch, torch.tensor) if isinstance(net, torch.nn.Module) else (paddle, paddle.to_tensor)
    )
    with module.no_grad():
        outputs = net(**{name: convert(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in outputs.items() if hasattr(value, "numpy")}


def recorded(net, **inputs):
    """Outputs of the embeddings and every block."""
    base = getattr(net, "bert", net)
    blocks = base.encoder.layer if isinstance(net, torch.nn.Module) else base.encoder.layers
    layers = {"embeddings": base.embeddings} | {f"layers.{i}": block for i, block in enumerate(blocks)}
    seen = {}

    def hook(name):
        def record(_, __, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

        return record

    for name, layer in layers.items():
        register = getattr(layer, "register_forward_post_hook", None) or layer.register_forward_hook
        register(hook(name))
    run(net, **inputs)
    assert len(seen) == len(layers)
    return seen


def distance(actual, expected):
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all() and np.linalg.norm(expected) > 0
    return np.linalg.norm(actual.astype("float64") - expected) / np.linalg.norm(expected.astype("float64"))


def assert_agree(theirs, ours, inputs, valid):
    """Every block, and every output that both sides give: rows of valid positions, or examples."""
    expected, actual = recorded(theirs, **inputs), recorded(ours, **inputs)
    for name, value in expected.items():
        assert distance(actual[name][valid], value[valid]) <= 1e-5, name
    expected, actual = run(theirs, **inputs), run(ours, **inputs)
    compared = expected.keys() & actual.keys()
    assert compared
    for name in compared:
        per_position = expected[name].shape[:2] == valid.shape
        rows = valid if per_position else slice(None)
        assert distance(actual[name][rows], expected[name][rows]) <= 1e-5, name


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("head", HEADS)
def test_every_block_and_output_agrees(head, padding):
    assert_agree(*pair(head), *inputs_of(padding))


@pytest.mark.parametrize("activation", sorted(ACT2FN))
def test_activations(activation):
    assert_agree(*pair("BertForPreTraining", hidden_act=activation), *inputs_of("right"))


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1e-3, 1e-2, 0.3])
def test_epsilons(epsilon):
    """Small embeddings, so that the epsilon weighs in."""
    theirs, ours = pair("BertForMaskedLM", layer_norm_eps=epsilon)
    with torch.no_grad():
        for table in ("word", "position", "token_type"):
            getattr(theirs.bert.embeddings, f"{table}_embeddings").weight *= 0.1
    ours.load(in_paddle_layout(theirs, "BertForMaskedLM"))
    assert_agree(theirs, ours, *inputs_of())


@pytest.mark.parametrize(
    "changes",
    [
        {"type_vocab_size": 1},
        {"type_vocab_size": 5},
        {"num_attention_heads": 1},
        {"num_hidden_layers": 1},
        {"tie_word_embeddings": False},
        {"max_position_embeddings": LENGTH},
    ],
    ids=str,
)
def test_shapes_of_the_net(changes):
    inputs, valid = inputs_of("left")
    inputs["token_type_ids"] %= changes.get("type_vocab_size", 2)
    assert_agree(*pair("BertForPreTraining", **changes), inputs, valid)


def test_untied_decoder_is_its_own():
    _, ours = pair("BertForMaskedLM", tie_word_embeddings=False)
    assert ours.cls.predictions.decoder.weight is not ours.bert.embeddings.word_embeddings.weight
    _, ours = pair("BertForMaskedLM")
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight


def test_position_ids():
    theirs, ours = pair("BertModel")
    inputs, valid = inputs_of("both")
    positions = np.random.default_rng(1).integers(0, TINY["max_position_embeddings"], (3, LENGTH))
    assert_agree(theirs, ours, inputs | {"position_ids": positions}, valid)


def test_pad_tokens_without_a_mask_are_read():
    theirs, ours = pair("BertModel")
    inputs, valid = inputs_of("both")
    del inputs["attention_mask"]
    assert (inputs["input_ids"] == 0).any()
    assert_agree(theirs, ours, inputs, np.ones_like(valid))


def test_token_types_default_to_zero():
    theirs, ours = pair("BertModel")
    inputs, valid = inputs_of()
    del inputs["token_type_ids"]
    assert_agree(theirs, ours, inputs, valid)


def test_pretraining_loss():
    theirs, ours = pair("BertForPreTraining")
    inputs, valid = inputs_of("right")
    labels = np.where(valid & (inputs["input_ids"] % 3 == 0), inputs["input_ids"], -100)
    inputs |= {"labels": labels, "next_sentence_label": np.array([0, 1, 1])}
    assert run(ours, **inputs)["loss"] == pytest.approx(run(theirs, **inputs)["loss"], rel=1e-6)
    del inputs["next_sentence_label"]
    assert "loss" not in run(ours, **inputs)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForTokenClassification"])
def test_loss_per_token(head):
    theirs, ours = pair(head, num_labels=5)
    inputs, valid = inputs_of("left")
    classes = TINY["vocab_size"] if head == "BertForMaskedLM" else 5
    inputs["labels"] = np.where(valid, inputs["input_ids"] % classes, -100)
    assert run(ours, **inputs)["loss"] == pytest.approx(run(theirs, **inputs)["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "num_labels,problem,labels",
    [
        (3, None, [0, 2, 1]),
        (1, None, [0.3, -1.0, 2.5]),
        (3, "regression", [[0.1, 0.2, 0.3], [1.0, -1.0, 0.0], [0.5, 0.5, 0.5]]),
        (3, None, [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        (2, "multi_label_classification", [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_sequence_classification_loss(num_labels, problem, labels):
    theirs, ours = pair("BertForSequenceClassification", num_labels=num_labels, problem_type=problem)
    inputs, _ = inputs_of("right")
    inputs["labels"] = np.array(labels, "int64" if np.array(labels).dtype == int else "float32")
    assert run(ours, **inputs)["loss"] == pytest.approx(run(theirs, **inputs)["loss"], rel=2e-6)


@pytest.mark.parametrize("start,end", [([0, 3, 11], [2, 5, 11]), ([0, 40, -3], [12, 5, 1])])
def test_question_answering_loss(start, end):
    theirs, ours = pair("BertForQuestionAnswering")
    inputs, _ = inputs_of("right")
    inputs |= {"start_positions": np.array(start), "end_positions": np.array(end)}
    assert run(ours, **inputs)["loss"] == pytest.approx(run(theirs, **inputs)["loss"], rel=2e-6)


def test_gradients_of_every_parameter():
    theirs, ours = pair("BertForPreTraining", hidden_act="prelu")
    inputs, valid = inputs_of("both")
    inputs |= {
        "labels": np.where(valid, inputs["input_ids"], -100),
        "next_sentence_label": np.array([0, 1, 1]),
    }
    theirs(**{k: torch.tensor(v) for k, v in inputs.items()}).loss.backward()
    ours(**{k: paddle.to_tensor(v) for k, v in inputs.items()})["loss"].backward()
    gradients = {name: weight.grad.numpy() for name, weight in ours.named_parameters()}
    expected = {paddle_name(name): weight.grad.numpy() for name, weight in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        # zero by mathematics, and a sum that nearly cancels
        if name.endswith(("k_proj.bias", "activation.weight")):
            assert np.abs(gradients[name] - value).max() <= 1e-6
        else:
            assert distance(gradients[name], value.T if LINEAR.fullmatch(name) else value) <= 1e-5, name


def test_dropout_is_where_torch_has_it():
    config = {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.12, "classifier_dropout": 0.13}
    theirs, ours = pair("BertForSequenceClassification", **config)
    expected = sorted(layer.p for layer in theirs.modules() if isinstance(layer, torch.nn.Dropout))
    assert sorted(layer.p for layer in ours.sublayers() if isinstance(layer, paddle.nn.Dropout)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 30},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(changes):
    from convert.errors import BadInput

    with pytest.raises(BadInput, match="bert: "):
        bert.BertModel.from_config(TINY | changes)


@pytest.mark.parametrize("head", HEADS)
def test_keys_and_shapes_are_those_of_paddlenlp(head):
    from paddlenlp.transformers.bert import configuration, modeling

    config = TINY | {"type_vocab_size": 2, "num_labels": 3}
    spelled = head.replace("PreTraining", "Pretraining")
    theirs = getattr(modeling, spelled)(configuration.BertConfig(**config)).state_dict()
    ours = getattr(bert, head).from_config(config).state_dict()
    assert {name: tuple(value.shape) for name, value in ours.items()} == {
        name: tuple(value.shape) for name, value in theirs.items()
    }
    assert tied(ours) == tied(theirs)


def tied(state):
    """Names that share one tensor."""
    names = {}
    for name, value in state.items():
        names.setdefault(id(value), []).append(name)
    return sorted(shared for shared in names.values() if len(shared) > 1)
