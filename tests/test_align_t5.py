"""T5 through conversion and every stage: heads, variants, files, paging, PaddleNLP's classes, wrong nets, BLEU."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from align_fixtures import Workshop, all_aligned, save_checkpoint
from conftest import fast
from safetensors.numpy import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

import models.t5
from align.faults.t5 import FAULTS
from align.inputs import seeded
from align.scores import texts_of
from align.selftest import prove
from align.texts import DATA, pieces_of
from convert.errors import BadInput
from convert.t5 import FAMILY

NEIGHBOURS = {"nearest_neighbour_accuracy", "nearest_neighbour_f1"}
HEADS = {
    "T5ForConditionalGeneration": (
        {"perplexity", "next_token_accuracy", "bleu"}, ["logits", "encoder_last_hidden_state"]),
    "T5Model": (NEIGHBOURS, ["last_hidden_state", "encoder_last_hidden_state"]),
    "T5EncoderModel": (NEIGHBOURS, ["last_hidden_state"]),
}
V1_0 = dict(feed_forward_proj="relu", tie_word_embeddings=True)
VARIANTS = {
    "v1.0": ("T5ForConditionalGeneration", (), V1_0),
    "v1.0 base": ("T5Model", (), V1_0),
    "gated-silu": ("T5ForConditionalGeneration", (), dict(feed_forward_proj="gated-silu")),
    "gelu": ("T5EncoderModel", (), dict(feed_forward_proj="gelu")),
    "gated-prelu": ("T5Model", (), dict(feed_forward_proj="gated-prelu")),
    "gate by itself": ("T5Model", (), dict(feed_forward_proj="relu", dense_act_fn="silu", is_gated_act=True)),
    "deep encoder": ("T5Model", (), dict(num_layers=4, num_decoder_layers=1)),
    "near distances": ("T5ForConditionalGeneration", (), dict(
        relative_attention_num_buckets=8, relative_attention_max_distance=20)),
    "narrow heads": ("T5Model", (), dict(d_kv=6, num_heads=3)),
    "epsilon 0.1": ("T5Model", (), dict(layer_norm_epsilon=0.1)),
    "float16 kept": ("T5ForConditionalGeneration", (), dict(dtype="float16")),
    "cast to bfloat16": ("T5ForConditionalGeneration", ("--dtype", "bfloat16"), V1_0),
    "pdparams": ("T5ForConditionalGeneration", ("--format", "pdparams"), {}),
    "bin in shards": ("T5ForConditionalGeneration", ("--shard-size", "20KB"), dict(shard="20KB", binary=True)),
}
FEW = ("--limit", "3", "--max-length", "12")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def plain(workshop):
    """A converted v1.1, its run's name."""
    return workshop.make("T5ForConditionalGeneration", "plain")


def stages(workshop, run, *flags, metric=FEW):
    return {stage: workshop.align(stage, run, *flags, *(metric if stage == "metric" else ()))
            for stage in ("weights", "forward", "metric", "loss")}


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_aligned_at_every_stage(workshop, head):
    values, outputs = HEADS[head]
    outcomes = stages(workshop, workshop.make(head, tokenizer=True), metric=("--limit", "8"))
    assert all_aligned(outcomes)
    prefix = "t5." if head == "T5ForConditionalGeneration" else ""
    blocks = [f"decoder.block.{j}" for j in range(3)]
    decoder = [] if head == "T5EncoderModel" else [*blocks, "decoder.final_layer_norm"]
    modules = ["shared", "encoder.block.0", "encoder.block.1", "encoder.final_layer_norm", *decoder]
    forward = outcomes["forward"]
    assert [tensor["name"] for tensor in forward.modules] == [*(f"{prefix}{name}" for name in modules), *outputs]
    blocks = [tensor for tensor in forward.modules if "block" in tensor["name"]]
    assert all(tensor["rel_l2"] <= 1e-5 and tensor["isolated"]["rel_l2"] <= 2e-6 for tensor in blocks)
    assert not any("Not judged" in note for note in forward.report["notes"])
    norms = [tensor for tensor in forward.report["tensors"] if tensor["name"].endswith("layer_norm (small input)")]
    assert len(norms) == 5 + (10 if decoder else 0)
    assert set(outcomes["metric"].report["values"]) == values


@pytest.mark.parametrize("variant", fast(
    VARIANTS, "v1.0", "gated-prelu", "cast to bfloat16", "bin in shards"))
def test_every_variant_is_aligned_at_every_stage(workshop, variant):
    head, flags, options = VARIANTS[variant]
    outcomes = stages(workshop, workshop.make(head, variant.replace(" ", "-"), flags, **options))
    assert all_aligned(outcomes)
    assert all(tensor["rel_l2"] <= 2e-5 for tensor in outcomes["forward"].report["tensors"])


def test_paged_gives_the_same_figures(workshop, plain):
    figures = [workshop.align(stage, plain, "--paging", paging, *flags)
               for paging in ("off", "on") for stage, flags in (("forward", ()), ("metric", FEW))]
    assert all(outcome.code == 0 for outcome in figures)
    for whole, paged in zip(figures[:2], figures[2:], strict=True):
        assert whole.report["tensors"] == paged.report["tensors"]
        assert whole.report["values"] == paged.report["values"]


@pytest.mark.parametrize("flags", [("--rows", "1"), ("--rows", "5"), ("--tokens", "104")], ids=" ".join)
def test_a_table_of_positions_is_not_taken_for_copies_of_rows(workshop, plain, flags):
    """Tables are [tokens, tokens, heads]; 4, 16 and 13 of the noise floor's rows divide 96, 72, 96, 104 and 78."""
    outcome = workshop.align("forward", plain, *flags)
    assert outcome.code == 0, outcome.stderr


def test_as_many_rows_as_tokens_are_refused_or_avoided(workshop, plain):
    outcome = workshop.align("forward", plain, "--rows", "16", "--tokens", "16")
    assert outcome.code == 2 and "16 rows of 16 tokens" in " ".join(outcome.stderr.split())
    inputs = seeded({"pad_token_id": 0}, {"vocab": 50, "positions": 99}, kind="tokens to tokens", rows=6, tokens=8)
    assert inputs.arrays["decoder_attention_mask"].shape == (6, 5)


def test_two_environments_find_the_same(workshop, plain):
    for stage, flags in (("forward", ()), ("metric", FEW)):
        together = workshop.align(stage, plain, *flags)
        workshop.align(stage, plain, "--only", "reference", *flags)
        workshop.align(stage, plain, "--only", "candidate")
        apart = workshop.align(stage, plain, "--compare")
        assert (apart.code, apart.report["tensors"]) == (0, together.report["tensors"]), stage


def test_encoder_and_decoder_are_fed_rows_of_different_lengths_with_different_padding():
    sizes = {"vocab": 50, "positions": 1 << 20}
    for tokens in (1, 2, 5, 64, 96):
        inputs = seeded({"pad_token_id": 0}, sizes, kind="tokens to tokens", tokens=tokens)
        encoder, decoder = (inputs.arrays[f"{side}attention_mask"] for side in ("", "decoder_"))
        assert encoder.shape == (4, tokens) and decoder.shape[1] != tokens and decoder.shape[1] >= 1
        assert encoder[0].all() and decoder[0].all()
    assert [row.argmin() == 0 for row in decoder[1:]] == [True, False, True]  # both, right, left
    assert (inputs.arrays["decoder_input_ids"][decoder == 1] != 0).all()


# Files ----------------------------------------------------------------------------------------------------------------

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
NO_POSITIONS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def old_file(directory, edit=lambda tensors: None, head="T5ForConditionalGeneration", **options):
    """As the hub's first T5 files: the table up to four times, and positions of the attention to the encoder."""
    save_checkpoint(directory, head, **options)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name: tensors["shared.weight"] for name in COPIES}
    if options.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["shared.weight"].copy()
    tensors[NO_POSITIONS] = np.zeros((32, 4), np.float32)
    edit(tensors)
    tensors = {name: array.copy() for name, array in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("options", [V1_0, {}], ids=["v1.0", "v1.1"])
def test_the_table_is_written_once_whatever_the_file_repeats(workshop, options):
    run = workshop.convert("t5", old_file(workshop.root / f"old-{len(options)}", **options), f"old-{len(options)}")
    written = load_file(workshop.output(run) / "model.safetensors")
    tables = [name for name, array in written.items() if array.shape == (190, 32)]
    assert tables == ["t5.shared.weight"]
    assert ("lm_head.weight" in written) == (not options)
    assert all_aligned({stage: workshop.align(stage, run) for stage in ("weights", "loss")})


def other_copy(tensors):
    tensors[COPIES[1]] = tensors[COPIES[1]] + 1


def other_head(tensors):
    tensors["lm_head.weight"][3, 4] += 1


@pytest.mark.parametrize("edit,named", [(other_copy, COPIES[1]), (other_head, "lm_head.weight")])
def test_a_copy_that_is_none_is_refused(workshop, edit, named):
    source = old_file(workshop.root / f"bad-{edit.__name__}", edit, **V1_0)
    with pytest.raises(AssertionError):
        workshop.convert("t5", source, f"bad-{edit.__name__}")
    assert not workshop.output(f"bad-{edit.__name__}").exists()


def test_the_config_is_what_paddlenlp_wants_and_the_source_unchanged(workshop, plain):
    config = json.loads((workshop.output(plain) / "config.json").read_text())
    assert config["bos_token_id"] == config["decoder_start_token_id"] == 0
    assert "bos_token_id" not in json.loads((workshop.root / "source-plain" / "config.json").read_text())


@pytest.mark.parametrize("changes,told", [
    ({"tie_encoder_decoder": True}, "tie_encoder_decoder is set"),
    ({"is_decoder": True}, "is_decoder is set"),
    ({"feed_forward_proj": "gated-gelu-new"}, "feed_forward_proj is 'gated-gelu-new'"),
    ({"feed_forward_proj": 3.5}, "feed_forward_proj is 3.5"),
    ({"num_decoder_layers": "three"}, "num_decoder_layers is three"),
], ids=str)
def test_configs_that_are_refused(changes, told):
    from convert.plan import make_plan
    with pytest.raises(BadInput, match=told):
        make_plan(FAMILY, FAMILY.demo | changes, {})


# PaddleNLP's classes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("head", HEADS)
def test_paddlenlps_classes_compute_the_same_but_for_the_loss(workshop, head):
    run = workshop.make(head, f"nlp-{head}")
    assert all_aligned({stage: workshop.align(stage, run, "--target", "paddlenlp", *flags)
                        for stage, flags in (("weights", ()), ("forward", ()), ("metric", FEW))})
    loss = workshop.align("loss", run, "--target", "paddlenlp")
    assert loss.failing == (["loss.padded", "loss.ignored", "loss.labels-only"]
                            if head == "T5ForConditionalGeneration" else [])


def test_paddlenlp_ignores_the_farthest_distance(workshop):
    run = workshop.make("T5ForConditionalGeneration", "near", relative_attention_max_distance=40)
    outcome = workshop.align("forward", run, "--target", "paddlenlp")
    assert outcome.code == 1 and outcome.report["first_divergence"] == "t5.encoder.block.0"
    assert outcome.report["named"] == "t5.encoder.block.0.layer.0.SelfAttention.relative_attention_bias"


def test_paddlenlp_knows_three_activations(workshop):
    run = workshop.make("T5Model", "gelu-nlp", feed_forward_proj="gelu")
    outcome = workshop.align("forward", run, "--target", "paddlenlp")
    assert outcome.code == 2 and "gelu is not supported" in outcome.stderr


# Planted faults -------------------------------------------------------------------------------------------------------

ENCODER, DECODER, ATTENTION = "t5.encoder.block", "t5.decoder.block", "layer.0.SelfAttention"
SAMPLE = {
    "distances one way/t5/net": (f"{ENCODER}.0.{ATTENTION} relative positions",
                                 "are one for all keys behind the query, as a decoder's"),
    "scores divided/t5/net": (f"{ENCODER}.1.{ATTENTION} scale",
                              "divides the scores by the root of the head width, which the reference does not"),
    "padding of the encoder ignored/t5/net": (f"{DECODER}.0.layer.1.EncDecAttention mask",
                                              "is missing: every query sees every key"),
    "causal mask missing/t5/net": (f"{DECODER}.0.{ATTENTION} mask", "is not causal: queries see the keys behind them"),
    "gelu with erf/t5/net": (f"{ENCODER}.1.layer.1.DenseReluDense activation",
                             "is gelu (erf) instead of gelu_new (tanh approximation)"),
    "norm subtracts the mean/t5/net": (f"{ENCODER}.1.layer.0.layer_norm", "subtracts the mean, as a layer norm"),
    "head scaled though it is untied/t5/net": ("lm_head", "is multiplied by 0.125"),
    "head not scaled though it is tied/t5/net": ("logits", "is multiplied by 8"),
    "epsilon 1e-5 of the config/t5/config": (f"{ENCODER}.0 layer norms", "has epsilon 1e-05 instead of 1e-06"),
    "k and v of the attention to the encoder swapped/t5/net-weights": (
        f"{DECODER}.1.layer.1.EncDecAttention.k.weight", "are swapped"),
    "blocks run in the wrong order/t5/net": (f"{ENCODER}.1", None),
    "decoder start of the config/t5/config": ("loss.labels-only", None),
    "q and k swapped/t5/net-weights": (f"{ENCODER}.1.{ATTENTION}.q.weight", "are swapped"),
    "range of distances that none is in/t5/checkpoint": (
        f"{ENCODER}.0.{ATTENTION}.relative_attention_bias.weight", "no output of these inputs shows it"),
}
MORE = {
    "gelu with erf/t5/net",
    "distances one way/t5/net",
    "causal mask missing/t5/net",
    "norm subtracts the mean/t5/net",
    "head scaled though it is untied/t5/net",
    "epsilon 1e-5 of the config/t5/config",
    "blocks run in the wrong order/t5/net",
    "q and k swapped/t5/net-weights",
}
"""For ``make test-full``, as ``python -m align.selftest`` plants all there are."""


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["sample", "more"])
def proof(tmp_path_factory, request):
    """Of the sample without ``MORE``, and of ``MORE``."""
    return prove([fault for fault in FAULTS if fault.name in SAMPLE and (fault.name in MORE) is request.param],
                 tmp_path_factory.mktemp("planted"))


def test_planted_faults_are_caught_named_and_explained(proof):
    assert proof.false_alarms == []
    assert {outcome.fault.name for outcome in proof.outcomes} in (MORE, SAMPLE.keys() - MORE)
    for outcome in proof.outcomes:
        named, sentence = SAMPLE[outcome.fault.name]
        assert outcome.caught and outcome.in_right_block and outcome.named_right, (outcome.fault.name, outcome.named)
        assert outcome.named == named, outcome.fault.name
        told = outcome.result.diagnosis
        assert (told is None) if sentence is None else sentence in told.sentence, (outcome.fault.name, told)


# Translation ----------------------------------------------------------------------------------------------------------

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ZAHLEN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]


@pytest.fixture(scope="module")
def trained(workshop):
    """A T5 that has learnt for some seconds to say numbers in German, with its tokenizer, and 24 pairs to score."""
    directory = workshop.root / "numbers"
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    net = T5ForConditionalGeneration(T5Config(
        vocab_size=3 + 2 * len(NUMBERS), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=0.0)).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(250):
        ids, labels = np.zeros((32, 6), np.int64), np.full((32, 6), -100)
        for row, length in enumerate(generator.integers(2, 6, 32)):
            said = generator.integers(0, len(NUMBERS), length)
            ids[row, : length + 1], labels[row, : length + 1] = [*(3 + said), 1], [*(3 + len(NUMBERS) + said), 1]
        loss = net(input_ids=torch.tensor(ids), attention_mask=torch.tensor(ids != 0).long(),
                   labels=torch.tensor(labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval().save_pretrained(directory)
    _write_tokenizer(directory, [f"▁{word}" for word in (*NUMBERS, *ZAHLEN)])
    said = [generator.integers(0, len(NUMBERS), length) for length in generator.integers(2, 6, 24)]
    rows = [{"translation": {"en": " ".join(NUMBERS[i] for i in one), "de": " ".join(ZAHLEN[i] for i in one)}}
            for one in said]
    (workshop.root / "numbers.json").write_text("\n".join(map(json.dumps, rows)))
    return workshop.convert("t5", directory, "numbers")


def _write_tokenizer(directory, pieces):
    from transformers import T5TokenizerFast
    vocabulary = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [(piece, -1.0) for piece in pieces]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0).save_pretrained(directory)


def scored(workshop, run):
    return workshop.align("metric", run, "--dataset", str(workshop.root / "numbers.json"), "--columns",
                          "source=translation.en,target=translation.de")


def test_the_bleu_of_a_trained_net_is_a_real_figure_and_equal_on_both_sides(workshop, trained):
    outcome = scored(workshop, trained)
    assert all_aligned({"metric": outcome})
    bleu = outcome.report["values"]["bleu"]
    assert 20 < bleu["reference"] < 100 and bleu["candidate"] == bleu["reference"]
    assert outcome.tensor("text.predictions")["passed"]
    assert bleu["reference"] == pytest.approx(_bleu_of_generate(workshop))


def _bleu_of_generate(workshop):
    """By transformers' own decoding and tokenizer, and sacrebleu."""
    from sacrebleu import corpus_bleu
    from transformers import AutoTokenizer
    directory = workshop.root / "numbers"
    net, tokenizer = T5ForConditionalGeneration.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    rows = [json.loads(line)["translation"] for line in (workshop.root / "numbers.json").read_text().splitlines()]
    found = net.generate(**tokenizer([row["en"] for row in rows], padding=True, return_tensors="pt"), max_new_tokens=14,
                         num_beams=1, do_sample=False)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    return corpus_bleu(texts, [[row["de"] for row in rows]]).score


def test_a_net_that_translates_otherwise_has_another_bleu(workshop, trained):
    with patch.object(models.t5.T5LayerFF, "forward", lambda self, hidden: hidden):
        outcome = scored(workshop, trained)
    assert outcome.code == 1 and {"text.predictions", "value.bleu"} <= set(outcome.failing)


@pytest.fixture(scope="module")
def pieces(workshop):
    """A SentencePiece model trained on the pairs that ship, as T5's checkpoints carry it: ``spiece.model``."""
    import sentencepiece
    directory = workshop.root / "pieces"
    save_checkpoint(directory, "T5ForConditionalGeneration", vocab_size=310)
    rows = [json.loads(line) for line in (DATA / "translations.jsonl").read_text("utf-8").splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([row[side] for row in rows for side in ("source", "target")]), vocab_size=300, pad_id=0,
        model_prefix=str(directory / "spiece"), eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (directory / "spiece.vocab").unlink()
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 10}')
    return workshop.convert("t5", directory, "pieces")


def test_a_checkpoint_with_a_sentencepiece_model_is_tokenized_as_it_says(workshop, pieces):
    outcome = workshop.align("metric", pieces, "--limit", "4")
    assert all_aligned({"metric": outcome})
    assert any("4 rows of the sentence pairs that ship with paddle-parity, tokenized as the source does" in note
               for note in outcome.report["notes"])
    assert any("before each source: 'translate English to German: '" in note for note in outcome.report["notes"])


def test_texts_are_those_of_the_tokenizers_own_decoding(workshop, pieces):
    from transformers import AutoTokenizer
    ids = np.random.default_rng(0).integers(0, 310, (200, 20))
    for use_fast in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(workshop.output(pieces), use_fast=use_fast)
        assert texts_of(ids, pieces_of(tokenizer)) == tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_paddlenlps_tokenizer_gives_the_same_ids(workshop, pieces):
    from paddlenlp.transformers import T5Tokenizer
    from transformers import AutoTokenizer
    theirs, ours = (cls.from_pretrained(str(workshop.output(pieces))) for cls in (AutoTokenizer, T5Tokenizer))
    text = "translate English to German: The ferry leaves the island every morning."
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_without_a_tokenizer_ids_are_the_words(workshop, plain):
    outcome = workshop.align("metric", plain, *FEW)
    assert any("as seeded ids below vocab_size, because the checkpoint has no tokenizer" in note
               for note in outcome.report["notes"])
    assert any("BLEU nrefs:1" in note for note in outcome.report["notes"])


def test_a_set_without_the_columns_is_refused(workshop, trained):
    outcome = workshop.align("metric", trained, "--dataset", str(workshop.root / "numbers.json"))
    assert outcome.code == 2 and "--columns source=NAME" in outcome.stderr
