"""``align.data`` for ChatGLM: GLM's marks behind a text, folded blanks, padding on the left, a mask of blocks."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from align_fixtures import Workshop
from chatglm_fixtures import SPECIAL, as_the_tokenizer_pads
from tokenizer_fixtures import texts_file

from align.trace import load_trace
from convert.chatglm import FAMILY
from convert.demo import build_demo

TEXTS = [{"text": "the island"}, {"text": "a  b\tc\nd"}, {"text": "in the sea", "next": "and the wind"},
         {"text": "his"}, {"text": "a <sop> b"}]
MARKS = {"[gMASK]": 257, "<sop>": 258, "<eop>": 259, "<pad>": 3}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("prompts"))
    workshop.convert("chatglm", build_demo(FAMILY, workshop.root / "source"), "glm")
    return workshop


@pytest.fixture(scope="module")
def texts(workshop):
    return texts_file(workshop.root / "texts.jsonl", TEXTS)


def test_the_demo_is_a_sentencepiece_model_of_which_the_library_says_the_same(workshop):
    model = sentencepiece.SentencePieceProcessor(model_file=str(workshop.output("glm") / "ice_text.model"))
    assert model.get_piece_size() == 272
    assert {piece: model.piece_to_id(piece) for piece in MARKS} == MARKS
    assert model.encode("the <n>a", out_type=str) == ["▁the", "▁", "<n>", "a"]


def test_rows_by_hand_and_batches_as_the_checkpoints_tokenizer_pads(workshop, texts):
    """Du et al. 2022: a text, [gMASK], <sop>, and behind a second text <eop>."""
    outcome = workshop.align("data", "glm", "--data", texts, "--batch-size", "4")
    assert outcome.code == 0, outcome.report.get("failures")
    model = sentencepiece.SentencePieceProcessor(model_file=str(workshop.output("glm") / "ice_text.model"))
    words = [model.encode(text) for text in ("the island", "a<|blank_2|>b<|tab|>c<n>d", "in the sea", "his")]
    end = [MARKS["[gMASK]"], MARKS["<sop>"]]
    rows = [[*row, *end] for row in words]
    rows[2] += [*model.encode("and the wind"), MARKS["<eop>"]]
    order = [number for number in np.random.default_rng(20260602).permutation(4).tolist()]
    width = max(map(len, rows))
    padded = np.array([[MARKS["<pad>"]] * (width - len(rows[number])) + rows[number] for number in order])
    renamed = padded.copy()
    for mark, number in (("gmask_token_id", 257), ("bos_token_id", 258), ("eos_token_id", 259)):
        renamed[padded == number] = SPECIAL[mark]
    expected = as_the_tokenizer_pads(renamed)
    for side in ("torch", "paddle"):
        arrays = load_trace(workshop.reports / "glm" / "traces", "data", side, "").arrays
        assert arrays["data.input_ids"][: sum(map(len, rows))].tolist() == [word for row in rows for word in row]
        assert arrays["batches.order"].tolist() == order  # the text in which somebody wrote <sop> makes no batch
        assert arrays["batch.0.input_ids"].tolist() == padded.tolist()
        assert np.array_equal(arrays["batch.0.attention_mask"] == 0, expected["attention_mask"])
        assert np.array_equal(arrays["batch.0.position_ids"], expected["position_ids"])


def test_what_ships_is_equal_and_none_of_the_checkpoints_code_was_asked_for(workshop):
    outcome = workshop.align("data", "glm")
    assert outcome.code == 0, outcome.report.get("failures")
    assert any("none of that code is run" in note for note in outcome.report["notes"])


OWN = """
import numpy as np
from paddlenlp.transformers.chatglm.tokenizer import ChatGLMTokenizer
from paddlenlp.data import DataCollatorWithPadding


class Bare(ChatGLMTokenizer):
    def build_inputs_with_special_tokens(self, first, second=None):
        first = first + [self.bos_token_id]
        return first if second is None else first + second + [self.eos_token_id]


class Spread(ChatGLMTokenizer):
    def prepare_for_tokenization(self, text, is_split_into_words=False, **given):
        return text, given


class Right(ChatGLMTokenizer):
    def collate(self, rows):
        batch = {name: np.array(array) for name, array in DataCollatorWithPadding(self)(rows).items()}
        for number, row in enumerate(rows):
            shift = len(row["input_ids"]) - batch["input_ids"].shape[1]
            batch["input_ids"][number] = np.roll(batch["input_ids"][number], shift)
            batch["position_ids"][number] = np.roll(batch["position_ids"][number], shift, -1)
            batch["attention_mask"][number] = np.roll(batch["attention_mask"][number], (shift, shift), (-2, -1))
        return batch


def bare(directory):
    return Bare.from_pretrained(str(directory))


def spread(directory):
    return Spread.from_pretrained(str(directory))


def right(directory):
    return Right.from_pretrained(str(directory))
"""


@pytest.mark.parametrize("name, why, first", [
    ("bare", "[gMASK] is missing behind a text", "data.input_ids: text 0, 'the island': token"),
    ("spread", "runs of blanks, tabs and lines are not folded into words of their own",
     "data.input_ids: text 1, 'a  b\\tc\\nd': token 1 is"),
    ("right", "batches are padded on the right instead of the left", "batch.0.input_ids: row "),
])
def test_a_planted_cause_is_named(workshop, texts, monkeypatch, name, why, first):
    (workshop.root / "own_prompts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(workshop.root))
    rows = [json.loads(line) for line in Path(texts).read_text("utf-8").splitlines()]
    plain = texts_file(workshop.root / "plain.jsonl", rows[:2] + rows[3:4])
    outcome = workshop.align("data", "glm", "--data", plain, "--tokenizer", f"own_prompts:{name}")
    sys.modules.pop("own_prompts")
    assert outcome.code == 1 and outcome.report["diagnosis"], outcome.report.get("failures")
    assert why in outcome.report["diagnosis"]["sentence"]
    assert outcome.report["failures"][0].startswith(first)
