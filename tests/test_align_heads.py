"""Every head of both families through all four stages, and the kinds of checkpoint there are: all must be aligned."""

import numpy as np
import pytest
import torch
import transformers
from align_fixtures import BERT_HEADS, GPTJ_HEADS, Workshop, all_aligned, family_of, rel_l2, torch_model
from conftest import fast

from align.inputs import Inputs, seeded
from align.reference import Reference
from align.runs import load_run

BLOCKS = {"bert": ["bert.embeddings", *(f"bert.encoder.layers.{i}" for i in range(3))],
          "gptj": ["transformer.drop", *(f"transformer.h.{i}" for i in range(3)), "transformer.ln_f"]}
OUTPUTS = {
    "GPTJForCausalLM": ["logits"], "GPTJForSequenceClassification": ["logits"],
    "GPTJForQuestionAnswering": ["start_logits", "end_logits"], "GPTJModel": ["last_hidden_state"],
    "BertForPreTraining": ["bert.pooler", "cls.predictions", "prediction_logits", "seq_relationship_logits"],
    "BertForMaskedLM": ["cls.predictions", "logits"], "BertForSequenceClassification": ["bert.pooler", "logits"],
    "BertForTokenClassification": ["logits"], "BertForQuestionAnswering": ["start_logits", "end_logits"],
    "BertModel": ["pooler", "last_hidden_state", "pooler_output"],
}
VALUES = {
    "GPTJForCausalLM": {"perplexity", "next_token_accuracy"}, "BertForMaskedLM": {"masked_token_accuracy"},
    "BertForPreTraining": {"masked_token_accuracy", "next_sentence_accuracy"},
    "BertForTokenClassification": {"accuracy", "f1"}, "BertForSequenceClassification": {"accuracy", "f1"},
    "GPTJForSequenceClassification": {"accuracy", "f1"}, "BertForQuestionAnswering": {"exact_match", "f1"},
    "GPTJForQuestionAnswering": {"exact_match", "f1"},
    "BertModel": {"nearest_neighbour_accuracy", "nearest_neighbour_f1"},
    "GPTJModel": {"nearest_neighbour_accuracy", "nearest_neighbour_f1"},
}
LOSSES = {"loss.plain", "loss.padded", "loss.ignored"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module", params=[*GPTJ_HEADS, *BERT_HEADS])
def stages(workshop, request):
    """(head, outcome by stage), with a tokenizer."""
    return request.param, workshop.align_all(workshop.make(request.param, tokenizer=True))


def test_every_head_is_aligned_at_every_stage(stages):
    assert all_aligned(stages[1])


def test_forward_records_embeddings_every_block_and_all_outputs_in_order(stages):
    head, outcomes = stages
    bare = head.endswith("Model")
    blocks = [name.split(".", 1)[1] if bare else name for name in BLOCKS[family_of(head)]]
    assert [tensor["name"] for tensor in outcomes["forward"].modules] == [*blocks, *OUTPUTS[head]]


def test_every_block_is_within_1e_5_propagated_and_isolated(stages):
    _, outcomes = stages
    tensors = outcomes["forward"].modules
    assert all(tensor["rel_l2"] <= 1e-5 for tensor in tensors)
    blocks = [tensor for tensor in tensors if (".h." in f".{tensor['name']}" or "layers." in tensor["name"])]
    assert len(blocks) == 3
    assert all(tensor["isolated"]["rel_l2"] <= 1e-5 for tensor in blocks)


def test_losses_are_within_1e_6_with_and_without_ignored_labels(stages):
    head, outcomes = stages
    values = outcomes["loss"].report["values"]
    assert set(values) == ({"loss.contrastive"} if head.endswith("Model") else LOSSES)
    for value in values.values():
        assert value["candidate"] == pytest.approx(value["reference"], rel=1e-6)
    assert len({value["reference"] for value in values.values()}) == len(values)


def test_metric_reports_the_values_of_its_task(stages):
    head, outcomes = stages
    values = outcomes["metric"].report["values"]
    assert set(values) == VALUES[head]
    assert all(value["candidate"] == pytest.approx(value["reference"], rel=1e-6) for value in values.values())
    assert any("64 rows of the passages that ship with paddle-parity, tokenized as the source does" in note
               for note in outcomes["metric"].report["notes"])


VARIANTS = {
    "float16 kept": ("BertForMaskedLM", (), dict(dtype="float16")),
    "bfloat16 kept": ("GPTJForCausalLM", (), dict(dtype="bfloat16")),
    "float16 to float32": ("GPTJForCausalLM", ("--dtype", "float32"), dict(dtype="float16")),
    "cast to float16": ("GPTJForSequenceClassification", ("--dtype", "float16"), {}),
    "cast to bfloat16": ("BertForPreTraining", ("--dtype", "bfloat16"), {}),
    "bfloat16 to float16": ("BertForPreTraining", ("--dtype", "float16"), dict(dtype="bfloat16")),
    "pdparams": ("GPTJForCausalLM", ("--format", "pdparams"), {}),
    "bfloat16 pdparams": ("BertForTokenClassification", ("--format", "pdparams", "--dtype", "bfloat16"), {}),
    "bin": ("BertForPreTraining", (), dict(binary=True)),
    "sharded on both sides": ("GPTJForCausalLM", ("--shard-size", "20KB"), dict(shard="20KB")),
    "sharded bin": ("BertForQuestionAnswering", (), dict(shard="20KB", binary=True)),
    "epsilon 1e-12": ("GPTJForCausalLM", (), dict(layer_norm_epsilon=1e-12)),
    "epsilon 1e-3": ("BertForMaskedLM", (), dict(layer_norm_eps=1e-3)),
    "epsilon 0.1": ("GPTJModel", (), dict(layer_norm_epsilon=0.1)),
    "relu": ("BertForMaskedLM", (), dict(hidden_act="relu")),
    "gelu_new": ("BertForPreTraining", (), dict(hidden_act="gelu_new")),
    "silu": ("GPTJForCausalLM", (), dict(activation_function="silu")),
    "gelu": ("GPTJForQuestionAnswering", (), dict(activation_function="gelu")),
    "prelu": ("BertModel", (), dict(hidden_act="prelu")),
    "one label": ("BertForSequenceClassification", (), dict(num_labels=1)),
    "one label, GPT-J": ("GPTJForSequenceClassification", (), dict(num_labels=1)),
    "three labels": ("GPTJForSequenceClassification", (), dict(num_labels=3)),
    "three token labels": ("BertForTokenClassification", (), dict(num_labels=3)),
    "three numbers": ("BertForSequenceClassification", (), dict(num_labels=3, problem_type="regression")),
    "several of three": ("BertForSequenceClassification", (),
                         dict(num_labels=3, problem_type="multi_label_classification")),
    "untied": ("BertForMaskedLM", (), dict(tie_word_embeddings=False)),
    "one token type": ("BertModel", (), dict(type_vocab_size=1)),
}


@pytest.mark.parametrize("variant", fast(
    VARIANTS, "bfloat16 kept", "cast to float16", "bfloat16 pdparams", "sharded bin", "prelu", "one label",
    "several of three", "untied"))
def test_every_kind_of_checkpoint_is_aligned(workshop, variant):
    head, flags, options = VARIANTS[variant]
    outcomes = workshop.align_all(workshop.make(head, variant.replace(" ", "-"), flags, **options))
    assert all_aligned(outcomes)
    assert all(tensor["rel_l2"] <= 1e-5 for tensor in outcomes["forward"].report["tensors"])
    assert any("seeded ids below vocab_size, because the checkpoint has no tokenizer" in note
               for note in outcomes["metric"].report["notes"])


@pytest.mark.parametrize("head", fast(["BertForQuestionAnswering", "BertForPreTraining", "GPTJForCausalLM"],
                                      "BertForPreTraining"))
def test_a_model_of_few_positions_says_that_its_inputs_are_short(workshop, head):
    positions = {"bert": "max_position_embeddings", "gptj": "n_positions"}[family_of(head)]
    outcomes = workshop.align_all(workshop.make(head, f"{head}-40", tokenizer=True, **{positions: 40}))
    assert all_aligned(outcomes)
    assert any("has 40 positions, so the inputs are 40 tokens long instead of 64" in note
               for note in outcomes["forward"].report["notes"])


def test_labels_that_are_numbers_have_no_ignored_case_and_say_so(workshop):
    outcome = workshop.align("loss", workshop.make("BertForSequenceClassification", "numbers", num_labels=1))
    assert set(outcome.report["values"]) == {"loss.plain", "loss.padded"}
    assert any("none to ignore" in note for note in outcome.report["notes"])


@pytest.mark.parametrize("head", ["GPTJForCausalLM", "BertForPreTraining"])
def test_the_reference_trace_is_what_transformers_computes(workshop, head):
    """The torch side's logits of real tokens, computed here once more from the model itself."""
    run = workshop.make(head, f"{head}-trace")
    workshop.align("forward", run)
    traces = workshop.reports / run / "traces"
    with np.load(traces / "forward_inputs.npz") as stored:
        inputs = Inputs({name: stored[name] for name in stored})
    model = torch_model(head)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**{name: torch.tensor(array) for name, array in inputs.arrays.items()})
    name = "logits" if "logits" in outputs else "prediction_logits"
    for framework in ("torch", "paddle"):
        recorded = np.load(traces / f"forward_{framework}.npy", allow_pickle=True).item()
        assert rel_l2(outputs[name].numpy()[inputs.mask], recorded[name]) <= 1e-5


@pytest.mark.parametrize("head", ["GPTJForCausalLM", "BertModel"])
def test_the_reference_is_transformers_class_in_float32_with_eager_attention(workshop, head):
    run = workshop.make(head, f"{head}-eager", dtype="bfloat16")
    model = Reference(load_run(run, workshop.reports)).model
    assert type(model) is getattr(transformers, head)
    assert (model.config._attn_implementation, model.dtype, model.training) == ("eager", torch.float32, False)


def test_inputs_are_long_batched_and_padded_on_both_sides():
    inputs = seeded({"pad_token_id": 3}, {"positions": 512, "vocab": 50, "types": 2})
    assert inputs.mask.shape[1] >= 64
    first, last = inputs.mask[:, 0], inputs.mask[:, -1]
    assert sorted(zip(first.tolist(), last.tolist(), strict=True)) == [(False, False), (False, True), (True, False),
                                                                        (True, True)]
    assert not (inputs.arrays["input_ids"][inputs.mask] == 3).any()
    assert (inputs.arrays["input_ids"][~inputs.mask] == 3).all()
    assert set(np.unique(inputs.arrays["token_type_ids"])) == {0, 1}


