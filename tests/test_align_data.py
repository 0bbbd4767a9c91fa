"""``python -m align.data``: ids worked out by hand, every cause planted and named, loaders, refusals."""

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from align_fixtures import Workshop
from tokenizer_fixtures import (
    OPT,
    settings,
    spelled_bpe,
    spelled_wordpiece,
    texts_file,
    trained_bloom,
    trained_bpe,
    trained_unigram,
)
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from align.inputs import SEED
from align.pipelines import corpus
from align.trace import load_trace

BERT, GPT2, OPT_LM, T5 = "BertForMaskedLM", "GPT2LMHeadModel", "OPTForCausalLM", "T5ForConditionalGeneration"
WORDS = ["un", "##aff", "##able", "##a", "a", "hello", "world", "cafe", "caf", "##é", "b", "##b", "你", "好", "##好",
         "!", "Hello", "[", "]", "##s", "sep", "it"]
WORDS_OF = {word: 5 + number for number, word in enumerate(WORDS)}
TEXTS = [{"text": "Hello world"}, {"text": "Café"}, {"text": "你好 hello"}, {"text": "unaffable"},
         {"text": "a [SEP] b!"}, {"text": "a", "next": "b a"}, {"text": " ".join(["hello"] + ["a"] * 18 + ["world"])},
         {"text": "hello a b world"}]


def recorded(workshop, run):
    """What each side recorded, by its framework."""
    traces = workshop.reports / run / "traces"
    return {side: load_trace(traces, "data", side, "").arrays for side in ("torch", "paddle")}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def texts(workshop):
    return texts_file(workshop.root / "texts.jsonl", TEXTS)


@pytest.fixture(scope="module")
def run_of(workshop):
    """``run_of(head, name, make, **options)``: a tiny checkpoint with the tokenizer that ``make`` puts beside it."""
    def made(head, name, make, **options):
        source = workshop.source(head, name, **options)
        make(source)
        family = {BERT: "bert", GPT2: "gpt2", OPT_LM: "opt", T5: "t5"}.get(head, "bloom")
        return workshop.convert(family, source, name)
    return made


@pytest.fixture(scope="module")
def bert(run_of):
    return run_of(BERT, "bert", lambda source: spelled_wordpiece(source, WORDS))


# Known answers --------------------------------------------------------------------------------------------------------

def test_wordpieces_worked_out_by_hand(workshop, bert, texts):
    """Greedy longest match (Wu et al. 2016): un ##aff ##able; café is cafe once its accent is gone; 你 and 好 apart."""
    outcome = workshop.align("data", bert, "--data", texts, "--max-length", "12", "--batch-size", "3")
    assert outcome.code == 0, outcome.report.get("failures")
    w, cls, sep = WORDS_OF, 2, 3
    rows = [[cls, w["hello"], w["world"], sep], [cls, w["cafe"], sep], [cls, w["你"], w["好"], w["hello"], sep],
            [cls, w["un"], w["##aff"], w["##able"], sep], [cls, w["a"], sep, w["b"], w["!"], sep],
            [cls, w["a"], sep, w["b"], w["a"], sep], [cls, w["hello"], *[w["a"]] * 18, w["world"], sep],
            [cls, w["hello"], w["a"], w["b"], w["world"], sep]]
    types = [[0] * len(row) for row in rows]
    types[5] = [0, 0, 0, 1, 1, 1]
    cut = [*rows[6][:11], sep]
    for arrays in recorded(workshop, bert).values():
        assert arrays["data.input_ids"].tolist() == [*chain(*rows)]
        assert arrays["data.token_type_ids"].tolist() == [*chain(*types)]
        assert arrays["data.attention_mask"].tolist() == [1] * sum(map(len, rows))
        assert arrays["data.lengths"].tolist() == list(map(len, rows))
        assert arrays["cut.input_ids"].tolist() == cut
        assert arrays["special.ids"].tolist() == [-1, -1, 1, 3, 0, 2, 4]
        order = np.random.default_rng(SEED).permutation(8).tolist()
        assert arrays["batches.order"].tolist() == order and arrays["batches.rows"].tolist() == [3, 3, 2]
        assert arrays["drop_last.order"].tolist() == order[:6] and arrays["drop_last.rows"].tolist() == [3, 3]
        first = [(cut if number == 6 else rows[number]) for number in order[:3]]
        width = max(map(len, first))
        assert arrays["batch.0.input_ids"].tolist() == [row + [0] * (width - len(row)) for row in first]
        assert arrays["batch.0.attention_mask"].tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in first]
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.int64)}


def test_byte_pairs_merged_by_hand(workshop, run_of):
    """Merges by rank (Sennrich et al. 2016): l+o before lo+w before e+r; the blank belongs to the word behind it."""
    letters = [*bytes_to_unicode().values()]
    pieces = [*letters, "lo", "low", "er", "Ġlow", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    run = run_of(GPT2, "merged", lambda source: spelled_bpe(
        source, vocabulary, ["l o", "lo w", "e r", "Ġ low"]), vocab_size=261)
    file = texts_file(workshop.root / "low.jsonl", [{"text": "lower low"}, {"text": "wol"}, {"text": "é"}])
    outcome = workshop.align("data", run, "--data", file)
    assert outcome.code == 0, outcome.report.get("failures")
    expected = [vocabulary[piece] for piece in ("low", "er", "Ġlow", "w", "o", "l", "Ã", "©")]
    for arrays in recorded(workshop, run).values():
        assert arrays["data.input_ids"].tolist() == expected
        assert arrays["data.lengths"].tolist() == [3, 3, 2]


def test_the_report_has_the_interface_of_every_stage(workshop, bert, texts):
    outcome = workshop.align("data", bert, "--data", texts)
    report = outcome.report
    assert (report["stage"], report["verdict"], report["first_divergence"]) == ("data", "aligned", None)
    assert report["reference"]["framework"] == "torch" and report["candidate"]["framework"] == "paddle"
    assert report["candidate"]["weights_digest"] is None and report["inputs_digest"]
    assert {"name", "shape", "dtype", "max_abs", "rel_l2", "allowed", "passed"} <= report["tensors"][0].keys()
    assert all(tensor["allowed"] == 0 for tensor in report["tensors"])
    assert (workshop.reports / bert / "index.html").is_file() and (workshop.reports / bert / "data.md").is_file()
    assert "data: aligned" in outcome.stdout


# Planted causes -------------------------------------------------------------------------------------------------------

def planted(workshop, run, texts, *flags, **changes):
    """The outcome with other settings in the directory that the conversion wrote; they are put back behind."""
    file = workshop.output(run) / "tokenizer_config.json"
    before = file.read_text("utf-8")
    settings(workshop.output(run), **changes)
    try:
        return workshop.align("data", run, *(("--data", texts) if texts else ()), *flags)
    finally:
        file.write_text(before, "utf-8")


def named(outcome, why):
    assert outcome.code == 1, outcome.stderr
    assert outcome.report["verdict"] == "diverged"
    assert outcome.report["diagnosis"] and why in outcome.report["diagnosis"]["sentence"], (
        outcome.report["diagnosis"], outcome.report["failures"][:3])
    assert outcome.report["diagnosis"]["after"] == 0 < outcome.report["diagnosis"]["before"]
    return True


@pytest.mark.parametrize("changes, why, failure", [
    ({"do_lower_case": False}, "texts are not lower-cased",
     "data.input_ids: text 0, 'Hello world': token 1 is 'Hello' (21), the reference's 'hello' (10)"),
    ({"strip_accents": False}, "accents are not stripped",
     "data.input_ids: text 1, 'Café': token 1 is 'caf' (13), the reference's 'cafe' (12)"),
    ({"tokenize_chinese_chars": False}, "Chinese characters are not split",
     "data.input_ids: text 2, '你好 hello': token 2 is '##好' (19), the reference's '好' (18)"),
    ({"padding_side": "left"}, "batches are padded on the left instead of the right", "batch.0.input_ids: row 0"),
    ({"truncation_side": "left"}, "what is too long is cut on the left instead of the right",
     "cut.input_ids: text 6, 'hello a a a a a a a a a a a a a a a a a…': token 1 is 'a' (9), the reference's 'hello'"),
    ({"model_input_names": ["input_ids"]}, "token_type_ids are absent", "data.token_type_ids: the candidate does not"),
    ({"pad_token": "[UNK]"}, "the id that batches are padded with is that of an unknown token, 1, instead of 0",
     "special.ids: the pad token is '[UNK]' (1), the reference's '[PAD]' (0)"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)
def test_a_setting_of_bert(workshop, bert, texts, changes, why, failure):
    outcome = planted(workshop, bert, texts, "--max-length", "12", **changes)
    assert named(outcome, why)
    assert outcome.report["failures"][0].startswith(failure)
    assert outcome.report["first_divergence"] == failure.partition(":")[0]


OWN = """
from paddlenlp.transformers.bert.tokenizer import BertTokenizer
from paddlenlp.transformers.t5.tokenizer import T5Tokenizer


class WithoutSep(BertTokenizer):
    def build_inputs_with_special_tokens(self, first, second=None):
        return [self.cls_token_id] + first + (second or [])

    def create_token_type_ids_from_sequences(self, first, second=None):
        return [0] * (1 + len(first)) + [1] * len(second or [])

    def get_special_tokens_mask(self, first, second=None, already_has_special_tokens=False):
        return [1] + [0] * (len(first) + len(second or []))


class Uncut(BertTokenizer):
    def __call__(self, *texts, truncation=False, max_length=None, **given):
        return super().__call__(*texts, **given)


class Shorter(BertTokenizer):
    def __call__(self, *texts, max_length=None, **given):
        return super().__call__(*texts, max_length=max_length and max_length - 1, **given)


class Blind(BertTokenizer):
    def tokenize(self, text, **given):
        return [piece for word in self.basic_tokenizer.tokenize(text)
                for piece in self.wordpiece_tokenizer.tokenize(word)]


class Alike(BertTokenizer):
    def create_token_type_ids_from_sequences(self, first, second=None):
        return [0] * len(super().create_token_type_ids_from_sequences(first, second))


class Endless(T5Tokenizer):
    def build_inputs_with_special_tokens(self, first, second=None):
        return first + (second or [])

    def get_special_tokens_mask(self, first, second=None, already_has_special_tokens=False):
        return [0] * len(first + (second or []))


class Plain:
    pad_token_id = 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *texts, **given):
        return self.tokenizer(*texts, **given)

    def convert_ids_to_tokens(self, ids):
        return self.tokenizer.convert_ids_to_tokens(ids)


class Seen(Plain):
    def collate(self, rows):
        batch = self.tokenizer.pad([dict(row) for row in rows], return_tensors="np")
        batch["attention_mask"] = batch["attention_mask"] * 0 + 1
        batch["labels"] = batch.pop("label")
        return batch


class Narrow(Plain):
    def collate(self, rows):
        batch = self.tokenizer.pad([dict(row) for row in rows], return_tensors="np")
        batch["labels"] = batch.pop("label")
        return {name: array.astype("int32") if name == "input_ids" else array for name, array in batch.items()}


class Bucketed(Plain):
    def collate(self, rows):
        batch = self.tokenizer.pad(sorted(map(dict, rows), key=lambda row: row["label"]), return_tensors="np")
        batch["labels"] = batch.pop("label")
        return batch


class Talkative(Plain):
    def collate(self, rows):
        batch = self.tokenizer.pad([dict(row) for row in rows], return_tensors="np")
        batch["labels"] = batch.pop("label")
        return {**batch, "position_ids": batch["input_ids"] * 0}


def talkative(directory):
    return Talkative(BertTokenizer.from_pretrained(str(directory)))


def narrow(directory):
    return Narrow(BertTokenizer.from_pretrained(str(directory)))


def bucketed(directory):
    return Bucketed(BertTokenizer.from_pretrained(str(directory)))


def plain(directory):
    return Plain(BertTokenizer.from_pretrained(str(directory)))


def seen(directory):
    return Seen(BertTokenizer.from_pretrained(str(directory)))


def without_sep(directory):
    return WithoutSep.from_pretrained(str(directory))


def uncut(directory):
    return Uncut.from_pretrained(str(directory))


def shorter(directory):
    return Shorter.from_pretrained(str(directory))


def blind(directory):
    return Blind.from_pretrained(str(directory))


def alike(directory):
    return Alike.from_pretrained(str(directory))


def endless(directory):
    return Endless.from_pretrained(str(directory))


def broken(directory):
    raise RuntimeError("no vocabulary")


class Failing(Plain):
    def __call__(self, *texts, **given):
        raise RuntimeError("not this text")


class Nested(Plain):
    def __call__(self, *texts, **given):
        return {name: [row] for name, row in self.tokenizer(*texts, **given).items()}


class Listed(Plain):
    def __call__(self, *texts, **given):
        return self.tokenizer(*texts, **given)["input_ids"]


class Unlabelled(Plain):
    def collate(self, rows):
        return self.tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="np")


def failing(directory):
    return Failing(BertTokenizer.from_pretrained(str(directory)))


def nested(directory):
    return Nested(BertTokenizer.from_pretrained(str(directory)))


def listed(directory):
    return Listed(BertTokenizer.from_pretrained(str(directory)))


def unlabelled(directory):
    return Unlabelled(BertTokenizer.from_pretrained(str(directory)))
"""


@pytest.fixture(scope="module")
def own(workshop):
    (workshop.root / "own_data.py").write_text(OWN)
    sys.path.insert(0, str(workshop.root))
    yield lambda name: ("--tokenizer", f"own_data:{name}")
    sys.path.remove(str(workshop.root))


@pytest.mark.parametrize("name, why", [
    ("without_sep", "[SEP] (EOS) is missing behind a text"),
    ("uncut", "what is too long is not cut"),
    ("shorter", "texts are cut at 11 tokens instead of 12"),
    ("alike", "token_type_ids are 0 throughout"),
    ("blind", "special tokens that are written out in a text are not recognised"),
    ("seen", "the attention mask shows padding too"),
])
def test_a_tokenizer_of_the_users_own(workshop, bert, texts, own, name, why):
    assert named(workshop.align("data", bert, "--data", texts, "--max-length", "12", *own(name)), why)


def test_rows_without_a_collator_are_padded_by_paddlenlps_pad(workshop, bert, texts, own):
    outcome = workshop.align("data", bert, "--data", texts, *own("plain"))
    failing = [name for name in outcome.failing if name != "special.ids"]
    assert failing == [] and "own_data.Plain" in outcome.stdout


def test_a_loader_of_other_numbers_or_in_another_order(workshop, bert, texts, own):
    """Neither is a tokenizer's doing, and neither is explained by one."""
    narrow = workshop.align("data", bert, "--data", texts, *own("narrow"))
    assert "batch.0.input_ids: the dtype is int32, the reference's int64" in narrow.report["failures"]
    bucketed = workshop.align("data", bert, "--data", texts, "--batch-size", "4", *own("bucketed"))
    order = np.random.default_rng(SEED).permutation(8).tolist()
    place = next(place for place in range(4) if sorted(order[:4])[place] != order[place])
    assert f"batches.order: text {place} is {sorted(order[:4])[place]}, the reference's {order[place]}" in (
        bucketed.report["failures"])
    assert narrow.report["diagnosis"] is bucketed.report["diagnosis"] is None


def test_what_only_the_candidates_batches_hold_is_told(workshop, bert, texts, own):
    outcome = workshop.align("data", bert, "--data", texts, *own("talkative"))
    assert "batch.0.position_ids: the reference did not record it" in outcome.report["failures"]


def test_two_causes_at_once_are_named_where_one_is_paddlenlps_own(workshop, bert):
    """PaddleNLP's BERT takes ☕ for punctuation: [UNK] a instead of [UNK]."""
    file = texts_file(workshop.root / "symbols.jsonl", [{"text": "Hello ☕a"}, {"text": "a b"}])
    outcome = workshop.align("data", bert, "--data", file)
    assert named(outcome, "symbols are split off like punctuation: with that")
    assert named(planted(workshop, bert, file, do_lower_case=False), "texts are not lower-cased, and symbols are split")


def test_nothing_in_stock_explains_what_nobody_planted(workshop, bert, texts):
    """A vocabulary with two words exchanged is no cause of these."""
    file = workshop.output(bert) / "vocab.txt"
    before = file.read_text("utf-8")
    file.write_text(before.replace("\nhello\nworld\n", "\nworld\nhello\n"), "utf-8")
    try:
        outcome = workshop.align("data", bert, "--data", texts)
    finally:
        file.write_text(before, "utf-8")
    assert outcome.code == 1 and outcome.report["diagnosis"] is None
    assert outcome.report["failures"][0].startswith("data.input_ids: text 0, 'Hello world': token 1 is 'hello' (11)")
    assert outcome.report["named"] == "data.input_ids[0][1]"


@pytest.fixture(scope="module")
def gpt2(run_of):
    return run_of(GPT2, "gpt2", trained_bpe)


def test_gpt2_on_what_ships_and_with_a_prefix_space_and_a_bos(workshop, gpt2):
    outcome = workshop.align("data", gpt2)
    assert outcome.code == 0, outcome.report["failures"]
    groups = {tensor["name"].partition(".")[0] for tensor in outcome.report["tensors"]}
    assert {"english", "chinese", "mixed", "emoji", "empty", "whitespace", "combining", "control", "scripts",
            "special-tokens", "pairs", "very-long", "cut", "batches", "drop_last", "special"} <= groups
    assert "It also gives token_type_ids, which this model does not take" in " ".join(outcome.report["notes"])
    assert named(planted(workshop, gpt2, None, add_prefix_space=True),
                 "a space is put before every text, also where there is one (prefix space)")
    file = texts_file(workshop.root / "plain.jsonl", [{"text": "one fish"}, {"text": "two"}])
    assert named(planted(workshop, gpt2, file, add_bos_token=True), "<|endoftext|> (BOS) is put before a text")


def test_opt_without_its_bos(workshop, run_of):
    run = run_of(OPT_LM, "opt", lambda source: trained_bpe(source, ("<s>", "<pad>", "</s>", "<unk>"), **OPT))
    file = texts_file(workshop.root / "single.jsonl", [{"text": "one fish"}, {"text": "two and three"}])
    whole = workshop.align("data", run, "--data", file)
    assert whole.failing == ["data.special_tokens_mask"]  # PaddleNLP's GPT knows no mask of special tokens
    assert named(planted(workshop, run, file, add_bos_token=False), "</s> (BOS) is missing before a text")
    assert named(workshop.align("data", run), "as transformers' GPT2Tokenizer does it, the one in Python, and not as "
                 "its GPT2TokenizerFast, and blanks around special tokens that are written out in a text are dropped")


def test_bloom_has_a_fast_tokenizer_alone(workshop, run_of):
    run = run_of("BloomForCausalLM", "bloom", trained_bloom)
    assert workshop.align("data", run).code == 0
    file = texts_file(workshop.root / "bloom.jsonl", [{"text": "three small fish"}, {"text": "one"}])
    assert named(planted(workshop, run, file, padding_side="right"),
                 "batches are padded on the right instead of the left")


@pytest.fixture(scope="module")
def t5(run_of):
    return run_of(T5, "t5", trained_unigram)


def test_t5_ends_and_starts(workshop, t5, own):
    file = texts_file(workshop.root / "t5.jsonl", [{"text": "The ferry leaves the island."}, {"text": "Nobody knew."}])
    assert workshop.align("data", t5, "--data", file).code == 0
    arrays = recorded(workshop, t5)
    for side in arrays.values():
        ids, (first, second) = side["data.input_ids"].tolist(), side["data.lengths"]
        assert side["decoder.decoder_input_ids"].tolist() == [0, *ids[: first - 1], 0, *ids[first: first + second - 1]]
    assert named(workshop.align("data", t5, "--data", file, *own("endless")), "</s> (EOS) is missing behind a text")
    config = workshop.output(t5) / "config.json"
    before = config.read_text("utf-8")
    config.write_text(json.dumps({**json.loads(before), "bos_token_id": 1}), "utf-8")
    try:
        assert named(workshop.align("data", t5, "--data", file), "the decoder starts with EOS (1) instead of 0")
    finally:
        config.write_text(before, "utf-8")


# Two environments, refusals -------------------------------------------------------------------------------------------

def test_each_side_by_itself_gives_the_same_report(workshop, bert, texts):
    flags = ("--data", texts, "--max-length", "12")
    together = planted(workshop, bert, texts, "--max-length", "12", do_lower_case=False).report
    assert workshop.align("data", bert, *flags, "--only", "reference").code == 0
    recorded_side = planted(workshop, bert, None, "--only", "candidate", do_lower_case=False)
    assert recorded_side.code == 0 and recorded_side.report == {}
    apart = workshop.align("data", bert, "--compare")
    assert apart.code == 1
    for key in ("tensors", "failures", "diagnosis", "named", "first_divergence", "inputs_digest", "notes"):
        assert apart.report[key] == together[key], key


def test_a_comparison_needs_no_framework_and_the_reference_not_paddle(workshop, bert, texts):
    def run(*flags, without):
        hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in without)
        program = f"import sys; {hidden}; import runpy; runpy.run_module('align.data', run_name='__main__')"
        where = ("--run", bert, "--reports", str(workshop.reports))
        return subprocess.run([sys.executable, "-c", program, *where, *flags],
                              cwd=Path(corpus.__file__).parents[1], capture_output=True, text=True)
    assert run("--data", texts, "--only", "reference", without=("paddle", "paddlenlp")).returncode == 0
    assert workshop.align("data", bert, "--only", "candidate").code == 0
    compared = run("--compare", without=("torch", "transformers", "tokenizers", "paddle", "paddlenlp"))
    assert (compared.returncode, compared.stderr) == (0, "") and "data: aligned" in compared.stdout


def refused(outcome, *words):
    assert outcome.code == 2 and outcome.report == {}, outcome.stdout
    lines = outcome.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words), lines
    return True


def test_a_checkpoint_without_a_tokenizer(workshop):
    run = workshop.make("BertForMaskedLM", "bare")
    assert refused(workshop.align("data", run), "has no tokenizer (tokenizer.json, vocab.txt", "nothing to compare")


def test_a_file_that_paddlenlp_wants_and_is_not_there(workshop, run_of, texts):
    run = run_of(BERT, "no-vocabulary", lambda source: spelled_wordpiece(source, WORDS))
    (workshop.output(run) / "vocab.txt").unlink()
    assert refused(workshop.align("data", run, "--data", texts), "PaddleNLP's BertTokenizer cannot be loaded from",
                   "It reads vocab.txt")


def test_what_cannot_be_followed(workshop, bert, texts, own, tmp_path):
    assert refused(workshop.align("data", bert, "--data", "gone.jsonl"), "the data set gone.jsonl does not exist")
    assert refused(workshop.align("data", bert, "--data", texts, "--columns", "text=nosuch"), "no column nosuch")
    assert refused(workshop.align("data", bert, "--data", texts, "--max-length", "4"), "4 tokens a row are too few")
    few = ("data", bert, "--data", texts)
    assert refused(workshop.align(*few, "--tokenizer", "nosuch"), "is not of the form package.module:build")
    assert refused(workshop.align(*few, "--tokenizer", "own_data:nosuch"), "cannot be imported")
    assert refused(workshop.align(*few, *own("broken")), "your own_data:broken failed", "no vocabulary")
    for name, told in (("failing", "own_data.Failing failed at own_data.py"), ("listed", "own_data.Listed failed at"),
                       ("nested", "own_data.Nested gives no flat row of input_ids for 'Hello world'"),
                       ("unlabelled", "it needs input_ids, and labels")):
        assert refused(workshop.align(*few, *own(name)), told)
    (workshop.root / "unreadable.py").write_text("def build(directory:\n")
    assert refused(workshop.align(*few, "--tokenizer", "unreadable:build"), "cannot be imported (SyntaxError")
    for side in (("reference", "--data", texts), ("candidate",)):
        assert workshop.align("data", bert, "--only", *side).code == 0
    for flags, told in ((("--limit", "3"), "--limit: this is of a set that --data names"),
                        (("--only", "candidate", "--data", texts), "--data: what both sides do is chosen"),
                        (("--compare", "--max-length", "9"), "--max-length: what both sides do is chosen"),
                        (("--only", "reference", *own("plain")), "--tokenizer: this is asked for where the Paddle"),
                        (("--data", texts, "--split", "train"), "--split train")):
        assert refused(workshop.align("data", bert, *flags), told)
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}\n')
    assert refused(workshop.align("data", bert, "--data", str(tmp_path / "numbers.jsonl")), "a text is needed")


def test_the_corpus_that_ships():
    """Each group has what it is named after, and nothing that a terminal would obey is printed."""
    texts = corpus.shipped(["[CLS]", "[SEP]"])
    groups = corpus.grouped(texts)
    assert list(groups) == ["english", "numbers", "chinese", "mixed", "emoji", "empty", "whitespace", "combining",
                            "control", "scripts", "symbols", "special tokens", "pairs", "very long"]
    assert [texts[number].text for number in groups["empty"]] == [""]
    assert texts[groups["special tokens"][-1]].text == "a".join(["", "[CLS]", "[SEP]", ""])
    assert all(text.excerpt.isprintable() and len(text.text) < 5000 for text in texts)
    assert any(len(text.text) > 4000 for text in texts) and sum(text.pair is not None for text in texts) == 5
    assert all(text.isascii() or text.isprintable() for text in (corpus.DATA / corpus.TEXTS).read_text(
        "utf-8").split("\n"))
