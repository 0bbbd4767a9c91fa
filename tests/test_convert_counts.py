"""Checkpoints of every age: the counts people know, and the same target bytes from all of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

GAMMA_BETA = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def with_mask(state, dtype, layers=28, positions=8):
    """As transformers before 4.30 saved GPT-J."""
    state = dict(state)
    for layer in range(layers):
        mask = torch.tril(torch.ones(positions, positions)).view(1, 1, positions, positions)
        state[f"transformer.h.{layer}.attn.bias"] = mask.to(dtype)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    return state


def tied_once(state):
    """bert-base-uncased of 2018: names from TensorFlow, and one tied copy."""
    state = {name: value for name, value in state.items() if not name.endswith("decoder.bias")}
    for new, old in GAMMA_BETA.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    return state


@pytest.fixture
def gptj28(checkpoint):
    return checkpoint("GPTJForCausalLM", n_layer=28)


def save(directory, like, state, name="pytorch_model.bin"):
    directory.mkdir()
    (directory / "config.json").write_bytes((like / "config.json").read_bytes())
    if name.endswith(".safetensors"):
        save_file({key: value.clone() for key, value in state.items()}, directory / name)
    else:
        torch.save(state, directory / name)
    return directory


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_gptj_of_both_ages(gptj28, dtype, name, tmp_path, convert):
    state = load_file(gptj28 / "model.safetensors")
    old = with_mask(state, dtype)
    assert (len(state), len(old)) == (285, 341)
    new_run = convert(gptj28, output="out/new")
    old_run = convert(save(tmp_path / "old", gptj28, old, name), output="out/old")
    assert old_run.code == 0, old_run.stderr
    assert old_run.weights == new_run.weights
    assert old_run.report["target_digest"] == new_run.report["target_digest"]
    assert len(old_run.report["tensors"]) == len(load_file(old_run.output / "model.safetensors")) == 341


def test_bert_of_all_ages(torch_model, tmp_path, convert):
    model = torch_model("BertForPreTraining", num_hidden_layers=12)
    model.save_pretrained(tmp_path / "new")
    new, copies = load_file(tmp_path / "new" / "model.safetensors"), model.state_dict()
    old = tied_once(copies)
    assert (len(new), len(old), len(copies)) == (206, 207, 208)
    sources = [tmp_path / "new", save(tmp_path / "old", tmp_path / "new", old),
               save(tmp_path / "copies", tmp_path / "new", copies)]
    runs = [convert(source, output=f"out/{source.name}") for source in sources]
    assert [run.code for run in runs] == [0, 0, 0]
    assert runs[0].weights == runs[1].weights == runs[2].weights
    assert len(load_file(runs[0].output / "model.safetensors")) == 208


def test_masks_of_half_precision_are_masks_too(checkpoint, tmp_path, convert):
    """EleutherAI/gpt-j-6b at revision float16 went through .half(), masked_bias = -inf included."""
    new = checkpoint()
    old = with_mask(load_file(new / "model.safetensors"), torch.bool, layers=2)
    old = {name: value.half() if value.dtype == torch.float32 else value for name, value in old.items()}
    assert torch.isinf(old["transformer.h.0.attn.masked_bias"])
    run = convert(save(tmp_path / "old", new, old))
    assert run.code == 0, run.stderr
    held = load_file(run.output / "model.safetensors")
    assert held["transformer.h.0.attn.masked_bias"].item() == -1e9


@pytest.mark.parametrize("name", ["bert.embeddings.position_ids", "embeddings.position_ids"])
def test_position_ids_are_dropped_with_their_reason(name, checkpoint, tmp_path, convert):
    new = checkpoint("BertModel" if name.startswith("embeddings") else "BertForPreTraining")
    old = load_file(new / "model.safetensors") | {name: torch.arange(20)[None]}
    runs = [convert(new, output="out/new"), convert(save(tmp_path / "old", new, old), output="out/old")]
    assert runs[0].weights == runs[1].weights
    assert {"source": name, "why": "the numbers 0, 1, 2, …: Paddle counts them itself"} in runs[1].report["dropped"]


def test_a_dropped_mask_is_in_the_report(checkpoint, tmp_path, convert):
    new = checkpoint()
    old = with_mask(load_file(new / "model.safetensors"), torch.bool, layers=2)
    report = convert(save(tmp_path / "old", new, old)).report
    assert {item["source"] for item in report["dropped"]} == old.keys() - load_file(new / "model.safetensors").keys()
