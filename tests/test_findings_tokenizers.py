"""Where PaddleNLP 3.0.0b4 takes texts apart otherwise than transformers' AutoTokenizer, each in a few lines."""

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import AutoTokenizer as PaddleAutoTokenizer
from paddlenlp.transformers.bert.tokenizer import BertTokenizer
from paddlenlp.transformers.bloom.tokenizer import BloomTokenizer
from paddlenlp.transformers.gpt.tokenizer import GPTTokenizer
from paddlenlp.transformers.t5.tokenizer import T5Tokenizer
from PIL import Image
from tokenizer_fixtures import OPT, minilm_wordpiece, trained_bloom, trained_bpe, trained_unigram
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ConvNextImageProcessor


def both(directory, make, cls):
    make(directory)
    return AutoTokenizer.from_pretrained(directory), cls.from_pretrained(str(directory))


def opt(directory):
    return trained_bpe(directory, ("<s>", "<pad>", "</s>", "<unk>"), **OPT)


def test_bert_takes_every_symbol_for_punctuation(tmp_path):
    """BERT's own code (Devlin et al.) splits off Unicode's P and ASCII's signs; PaddleNLP all of S too."""
    torch, paddle_ = both(tmp_path, minilm_wordpiece, BertTokenizer)
    assert torch.tokenize("€4") == ["€", "##4"] and paddle_.tokenize("€4") == ["€", "4"]
    assert torch.tokenize("😀😀") == ["[UNK]"] and paddle_.tokenize("😀😀") == ["[UNK]", "[UNK]"]


def test_the_odd_token_of_a_pair_that_is_too_long_goes_to_the_other_text(tmp_path):
    """transformers' default tokenizer keeps it for the second text; PaddleNLP and transformers' slow one the first."""
    torch, paddle_ = both(tmp_path, minilm_wordpiece, BertTokenizer)
    texts = ("a a a a a a", "b b b b b b")
    counts = []
    for tokenizer in (torch, paddle_, AutoTokenizer.from_pretrained(tmp_path, use_fast=False)):
        row = tokenizer(*texts, truncation=True, max_length=8)["input_ids"]  # three special tokens, five words
        words = tokenizer.convert_ids_to_tokens(row)
        counts.append((words.count("a"), words.count("b")))
    assert counts == [(2, 3), (3, 2), (3, 2)]


def test_token_types_are_shorter_than_the_ids_that_have_a_bos(tmp_path):
    _, paddle_ = both(tmp_path, opt, GPTTokenizer)
    row = paddle_("fish")
    assert len(row["token_type_ids"]) == len(row["input_ids"]) - 1
    assert len(paddle_("fish", "bird")["token_type_ids"]) == len(paddle_("fish", "bird")["input_ids"]) - 2
    assert paddle_("fish", return_special_tokens_mask=True)["special_tokens_mask"][0] == 0  # the BOS


def test_a_bos_before_the_second_text_and_blanks_that_are_dropped(tmp_path):
    torch, paddle_ = both(tmp_path, opt, GPTTokenizer)
    end = torch.convert_tokens_to_ids("</s>")
    assert torch("a", "b")["input_ids"].count(end) == 1 and paddle_("a", "b")["input_ids"].count(end) == 2
    assert torch.tokenize("a </s> b") == ["a", "Ġ", "</s>", "Ġb"] and paddle_.tokenize("a </s> b") == ["a", "</s>", "b"]


def test_t5_folds_tabs_and_lines_and_ends_a_text_once(tmp_path):
    torch, paddle_ = both(tmp_path, trained_unigram, T5Tokenizer)
    assert torch("x</s>")["input_ids"][-2:] == [1, 1]
    assert paddle_("x</s>")["input_ids"][-2] != 1 and paddle_("x</s>")["input_ids"][-1] == 1
    unknown = torch.unk_token_id
    assert unknown in torch("x\x85y")["input_ids"] and unknown not in paddle_("x\x85y")["input_ids"]


def test_t5s_fast_tokenizer_leaves_uncomposed_what_sentencepiece_composes(tmp_path):
    """à with two more marks: SentencePiece's NFKC composes the first; transformers' fast one looks at whole letters."""
    torch, paddle_ = both(tmp_path, trained_unigram, T5Tokenizer)
    text = "a\u0300\u0301\u0302"
    assert paddle_.tokenize(text) == paddle_.sp_model.encode(text, out_type=str) != torch.tokenize(text)


def test_blooms_slow_tokenizer_cuts_words_as_gpt2_does_and_auto_takes_none_of_gpt2s_names(tmp_path):
    trained_bloom(tmp_path)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.model.save(str(tmp_path))
    slow = BloomTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert [word for word, _ in fast.pre_tokenizer.pre_tokenize_str("fish2go!")] == ["fish2go", "!"]
    assert slow.pat.findall("fish2go!") == ["fish", "2", "go", "!"]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ValueError, match="GPT2Tokenizer does not exist"):
        PaddleAutoTokenizer.from_pretrained(str(tmp_path))


def test_the_centre_of_a_picture_is_rounded_to_even():
    """15 rows, 8 of them kept: 3.5 above. Paddle begins at 4, transformers at 3."""
    column = np.repeat(np.arange(15, dtype=np.uint8)[:, None, None], 15, 1).repeat(3, 2)
    cropped = np.asarray(paddle.vision.transforms.CenterCrop(8)(Image.fromarray(column)))
    processor = ConvNextImageProcessor(size={"shortest_edge": 8}, crop_pct=8 / 15, do_rescale=False, do_normalize=False)
    theirs = processor(column, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    assert (cropped[0, 0, 0], theirs[0, 0, 0]) == (4, 3)
