"""Continuations: our loop against transformers' own, margins by trial, right nets of all families, planted faults."""

from __future__ import annotations

import copy
import io
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import chatglm_fixtures
import numpy as np
import pytest
from align_fixtures import Workshop, torch_model

from align import generate
from align.decoding import search
from align.decoding.continuations import case_of, judged, place_of_beams
from align.decoding.feeding import Feed, Start, Whole
from align.decoding.margins import Closest, Measured, _Ended, _Kept, margin
from align.decoding.search import Strategy, drawn, gumbel, write
from align.decoding.torch_side import generate as torch_generate
from align.decoding.torch_side import takes
from align.explanations.decoding import explained
from align.faults.decoding import FAULTS
from align.faults.fault import NotPlanted
from align.reference import outputs_of
from align.runs import load_run
from align.submission import lay_out
from align.tolerance import step_noise
from align.trace import RECORDED, Step

VOCABULARY, PAD = 257, 256


# The loop -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def side():
    """Torch, with three rows, two of them padded; and what they come to greedily."""
    model = torch_model("GPTJForCausalLM", n_layer=1)
    found = SimpleNamespace(model=model, run=SimpleNamespace(head=SimpleNamespace(inputs="tokens")))
    found.outputs = lambda arrays: outputs_of(model, arrays)
    mask = np.ones((3, 9), np.int64)
    mask[1, :3] = mask[2, :6] = 0
    ids = np.where(mask == 1, np.random.default_rng(1).integers(0, 250, mask.shape), PAD)
    found.feed = Feed(found.run, takes(found), Start(ids, mask))
    return found


def texts(side, strategy):
    return write(Whole(side, side.feed), side.feed.start.ids, side.feed.start.mask, strategy).tokens


STRATEGIES = [
    {}, {"least": 2}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5, "seed": 3},
    {"temperature": 1.3, "top_p": 0.4, "least": 3}, {"beams": 4}, {"beams": 3, "length_penalty": 0.0},
    {"beams": 4, "length_penalty": 2.0, "least": 2}, {"beams": 2, "length_penalty": -1.0, "early_stopping": True},
    {"beams": 4, "early_stopping": "never"}, {"beams": 3, "early_stopping": True, "length_penalty": 0.5}]


@pytest.mark.parametrize("options", STRATEGIES, ids=lambda options: "-".join(map(str, options.values())) or "best")
def test_the_texts_are_those_of_transformers(side, options):
    """Without an end, and with two that these very texts come to."""
    free = Strategy("one", 8, PAD, **options)
    found = texts(side, free)
    assert np.array_equal(torch_generate(side, side.feed, free, cached=False).tokens, found)
    ended = replace(free, ends=tuple({*found[:, 4].tolist(), int(found[1, 5])}))
    shorter = texts(side, ended)
    assert np.array_equal(torch_generate(side, side.feed, ended, cached=True).tokens, shorter)
    assert (shorter == PAD).any(), "some texts end"


def test_draws_have_the_probabilities_of_softmax():
    """4,000 draws: each share within 5 standard deviations of the formula's, of all tokens and of the most probable."""
    logits = np.array([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    for options, kept in (({"temperature": 1.0}, 6), ({"temperature": 0.5}, 6), ({"temperature": 1.0, "top_k": 3}, 3),
                          ({"temperature": 1.0, "top_p": 0.8}, 3)):
        strategy = Strategy("drawn", 1, 0, **options)
        expected = np.exp(logits[0] / strategy.temperature)[:kept]
        expected /= expected.sum()
        tokens = np.concatenate([drawn(logits.repeat(400, 0), strategy, step).argmax(-1) for step in range(10)])
        shares = np.bincount(tokens, minlength=6) / len(tokens)
        assert not shares[kept:].any()
        assert (np.abs(shares[:kept] - expected) < 5 * np.sqrt(expected * (1 - expected) / len(tokens))).all()


def test_noise_is_another_for_each_row_step_token_and_seed_and_always_the_same():
    known = gumbel(1, 2, 3, 50)
    assert np.array_equal(known, gumbel(1, 2, 3, 50)) and len(set(known.tolist())) == 50
    for other in (gumbel(0, 2, 3, 50), gumbel(1, 0, 3, 50), gumbel(1, 2, 0, 50)):
        assert not np.isclose(known, other).any()


# Margins --------------------------------------------------------------------------------------------------------------

def moved(logits, noise, generator, corners):
    """Every logit up or down by half the noise, or by less."""
    signs = generator.choice([-1.0, 1.0], logits.shape) if corners else generator.uniform(-1, 1, logits.shape)
    return logits + signs * noise / 2


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 3},
                                     {"temperature": 1.0, "top_p": 0.7}, {"temperature": 0.8, "top_p": 0.5}],
                         ids=lambda options: "-".join(map(str, options)) or "greedy")
def test_a_margin_is_the_smallest_noise_that_changes_the_choice(options):
    generator, strategy, changed = np.random.default_rng(0), Strategy("one", 40, 0, **options), 0
    for step in range(20):
        logits = generator.standard_normal(7) * 2
        taken = int(drawn(logits[None], strategy, step)[0].argmax())
        found, _ = margin(logits, taken, strategy, 0, step)
        trials = [moved(logits, noise, generator, corners) for corners in (True, False)
                  for noise in [0.999 * found] * 10]
        assert all(int(drawn(one[None], strategy, step)[0].argmax()) == taken for one in trials)
        wider = [moved(logits, 1.15 * found, generator, True) for _ in range(120)]
        changed += any(int(drawn(one[None], strategy, step)[0].argmax()) != taken for one in wider)
    assert changed >= 17, "margins are not much smaller than they need be"


class Table:
    """A net of logits that only the text decides, each of them off by as much as torch's own error may make it."""

    def __init__(self, seed, measured=0.0, trial=0):
        self.seed, self.measured, self.trial = seed, measured, trial

    def next(self, ids, mask):
        rows = []
        for row in ids:
            key = (self.seed, *row.tolist())
            logits = 2 * np.random.default_rng(key).standard_normal(12)
            noise = step_noise(np.abs(logits).max(), self.measured) if self.measured else 0.0
            rows.append(moved(logits, noise, np.random.default_rng((self.trial, *key)), True))
        return np.stack(rows)

    def select(self, rows): ...


def test_a_search_goes_the_same_way_where_every_margin_exceeds_the_noise():
    changed = kept = 0
    for seed in range(24):
        strategy = Strategy("beam", 4, 0, (3,), beams=3, length_penalty=(1.0, 0.5, 2.0)[seed % 3],
                            early_stopping=seed % 2 == 0)
        ids, measured = np.array([[seed % 12, 5]]), (1e-2, 1e-3, 1e-4)[seed // 2 % 3]
        search = Measured(1, strategy, np.array([measured]))
        right = write(Table(seed), ids, np.ones_like(ids), strategy, beams=search)
        closest = min([step[0].ratio for step in search.closest] + [search.decided(0).ratio])
        same = all(np.array_equal(write(Table(seed, measured, trial), ids, np.ones_like(ids), strategy).tokens,
                                  right.tokens) for trial in range(1, 6))
        assert same or closest <= 1
        kept, changed = kept + (closest > 1), changed + (not same)
    assert kept >= 6 and changed >= 3, "both are seen"


def made(strategy, theirs, ours, margins, noise=1e-3, **told):
    """A step of the reference and its answer, of one strategy."""
    name, theirs, ours = strategy.name, np.array(theirs), np.array(ours)
    step = Step({RECORDED: {name: theirs}, "margins": {name: np.array(margins)},
                 "noise": {name: np.full(np.shape(margins), noise)},
                 "start": {"ids": np.zeros((len(theirs), 1)), "mask": np.ones((len(theirs), 1))}},
                told={"loop": {}, "mistakes": {}, "takes": []} | told)
    return step, Step({RECORDED: {name: ours}})


def test_where_texts_part_is_judged_by_the_margin():
    strategy, spell = Strategy("greedy", 4, 0), str
    texts, wide = [[5, 6, 7, 8]], [[1.0, 1.0, 1.0, 1.0]]
    close = [[1.0, 1e-4, 5e-4, 1.0]]
    for ours, margins, passed, compared in (
            (texts, wide, True, 4), (texts, close, True, 2), ([[5, 6, 9, 9]], close, True, 1),
            ([[5, 6, 9, 9]], wide, False, 2), ([[5, 6, 7, 9]], close, False, 1 + 0)):
        step, answer = made(strategy, texts, ours, margins)
        case = case_of("greedy", strategy, step, answer)
        result = judged(case, spell)
        assert result.passed is passed
        assert case.rows[0].compared == compared
    assert "token 3: 9" in result.failure and "instead of 8" in result.failure and "1.0e+00" in result.failure
    step, answer = made(strategy, texts, texts, [[1e-4] * 4])
    nothing = judged(case_of("greedy", strategy, step, answer), spell)
    assert not nothing.passed and "no token could be compared" in nothing.failure


def parted(name, mistakes):
    """What is said of a text that parts at its third token, beside one without cache that does not."""
    strategy = Strategy("greedy", 4, 0)
    step, right = made(strategy, [[5, 6, 7, 8]], [[5, 6, 7, 8]], [[1.0] * 4])
    cases = [case_of("greedy", strategy, step, right)]
    step, wrong = made(replace(strategy, name=name), [[5, 6, 7, 8]], [[5, 6, 9, 9]], [[1.0] * 4],
                       mistakes={name: mistakes})
    cases = [*cases[: "cache" in name], case_of(name, strategy, step, wrong)]
    return explained(SimpleNamespace(options=SimpleNamespace(compare=True)), step, cases).sentence


def test_mistakes_that_the_texts_do_not_tell_apart_are_all_told():
    told = parted("greedy", [["one", {"0": [2, 9]}], ["two", {"0": [1, 9]}], ["three", {"0": [2, 9]}]])
    assert told.startswith("one; or, which these texts do not tell apart: three: done to torch's own logits")


def test_the_loop_is_not_to_blame_for_what_goes_wrong_with_the_cache_alone():
    told = parted("greedy (with cache)", [["one", {"0": [2, 9]}]])
    assert told.startswith("without the cache every row agrees")


def test_texts_under_way_are_sets():
    left = np.array([[[1, -1], [2, -1]], [[1, 3], [2, 4]]])
    assert place_of_beams(left, left[:, ::-1], [1, 3], [1, 3]) is None
    assert place_of_beams(left, left[:, ::-1], [1, 3], [2, 4]) == 2
    other = left.copy()
    other[1, 1, 1] = 5
    assert place_of_beams(left, other, [1, 3], [1, 3]) == 0


def test_noise_is_never_below_the_table_nor_below_torchs_own():
    assert step_noise(10.0, 0.0) == pytest.approx(2e-4)
    assert step_noise(10.0, 1e-5) == pytest.approx(2 * 6 * 1e-4)


def test_torchs_own_error_is_measured_on_every_row(side):
    """Against a copy of the model that is float64 in all but its scores."""
    tokens = texts(side, Strategy("greedy", 4, PAD))
    given = side.feed.whole(*(np.concatenate([start, new], 1)[:, :-1] for start, new in (
        (side.feed.start.ids, tokens), (side.feed.start.mask, np.ones_like(tokens)))))
    exact = outputs_of(copy.deepcopy(side.model).double(), given)["logits"][:, -4:]
    errors = np.abs(side.outputs(given)["logits"][:, -4:] - exact).max(-1) / np.abs(exact).max(-1)
    side.sweep = lambda passes, purpose=None: [one() for one in passes]
    found = generate._measured(side, side.feed, tokens)
    assert found.shape == (3,) and (found > 0.3 * errors.max(1)).all() and (found < 30 * errors.max(1)).all()


def test_texts_with_other_beginnings_may_be_off_by_the_errors_of_both():
    kept = _Kept(np.array([-1.0, -1.25, -1.5]), np.array([0, 0, 1]), np.arange(3), np.zeros(3, bool),
                 np.array([0.1, 0.2, 0.4]), np.array([0.01, 0.02]))
    alike, other = kept.pair(0, 1), kept.pair(0, 2)
    assert (alike.margin, other.margin) == (0.25, 0.5)
    assert alike.noise == pytest.approx(0.01, rel=1e-3) and other.noise == pytest.approx(0.1 + 0.4)


def test_a_text_that_did_not_count_wins_only_if_it_comes_in_and_scores_better():
    search = Measured(1, Strategy("beam", 4, 0, beams=2), np.zeros(1))
    winner = _Ended((1,), -1.0, 0.1, True, Closest())
    for entry, told in ((Closest(9.0, 1.0), Closest(9.0, 1.0)), (Closest(0.1, 1.0), Closest(0.5, 0.2))):
        rival = _Ended((2,), -1.5, 0.1, False, entry)
        found = search._rivalry(winner, rival)
        assert (found.margin, found.noise) == pytest.approx((told.margin, told.noise))


def test_the_end_is_the_configs_else_that_of_the_generation_config():
    def ends(config, beside):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=beside))
        return generate._ends(SimpleNamespace(run=SimpleNamespace(config=config, sizes={"vocab": 10}),
                                              reference=SimpleNamespace(model=model)))
    assert ends({"eos_token_id": 5}, 3) == (5,) and ends({"eos_token_id": [5, 6]}, 3) == (5, 6)
    assert ends({}, 3) == (3,) and ends({"eos_token_id": None}, [3, 4, 99]) == (3, 4) and ends({}, None) == ()


def test_torch_that_parts_from_itself_with_its_cache_is_told():
    def told(margins):
        cached = "greedy (with cache)"
        step = Step({RECORDED: {"greedy": np.array([[5, 6, 7]]), cached: np.array([[5, 6, 8]])},
                     "margins": {"greedy": np.array([margins])}, "noise": {"greedy": np.full((1, 3), 1e-3)}})
        return generate._apart(step, "")
    assert told([1.0, 1.0, 1.0])[0].startswith("torch itself writes other texts with its cache than without (greedy, 1")
    assert told([1.0, 1.0, 1e-4]) == told([1.0, 1e-4, 1.0]) == []


def test_the_seed_is_tried_for_that_tells_the_mistakes_apart(monkeypatch):
    """Of four seeds the third; none where weights come in block by block, nor for what lies within the noise."""
    shown = {2: "one token too many is drawn, one token too few"}
    monkeypatch.setattr(generate, "mistakes_of", lambda found, start, strategy: [
        (shown.get(strategy.seed, ""), {"0": (1, 7)})])
    few = {"top-k-few": Strategy("top-k-few", 4, PAD, temperature=1.0, top_k=3)}
    for paged, apart, seed in ((False, 1.0, 2), (False, 1e-4, 0), (True, 1.0, 0)):
        monkeypatch.setattr(generate, "_closeness", lambda *given, apart=apart: (
            np.array([[1.0, apart, 1.0]]), np.full((1, 3), 1e-3)))
        session = SimpleNamespace(paged=paged, options=SimpleNamespace(length_penalty=None))
        found, _ = generate._telling(few, session, lambda strategy, cached: strategy.seed, None, None, None)
        assert found["top-k-few"].seed == seed


# Families -------------------------------------------------------------------------------------------------------------

HEADS = {"gptj": "GPTJForCausalLM", "gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM", "bloom": "BloomForCausalLM",
         "t5": "T5ForConditionalGeneration"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    found = Workshop(tmp_path_factory.mktemp("generate"))
    for family, head in HEADS.items():
        found.make(head, family, tokenizer=family in ("gpt2", "t5"))
    return found


@pytest.mark.parametrize("family", ["gptj", "t5", *(pytest.param(family, marks=pytest.mark.full) for family in (
    "gpt2", "opt", "bloom"))])
def test_right_nets_write_what_torch_writes(shop, family):
    outcome = shop.align("generate", family, "--tokens", "6")
    assert (outcome.code, outcome.report["verdict"]) == (0, "aligned"), outcome.report.get("failures", outcome.stderr)
    names = [tensor["name"] for tensor in outcome.report["tensors"]]
    assert names == [f"{name}{cached}" for name in (
        "greedy", "greedy-ended", "beam", "beam-ended", "top-k", "top-k-few", "top-p", "top-p-few", "temperature")
        for cached in ("", " (with cache)")]
    told = next(note for note in outcome.report["notes"] if "judged to their end" in note)
    ended, rows = map(int, re.match(r"(\d+) of (\d+) rows", told).groups())
    assert rows == 4 * len(names) and ended >= 0.9 * rows
    rows = outcome.report["tables"][-1]["rows"]
    assert len(rows) == 4 * len(names) and any("(padded)" in row[1] for row in rows)
    if family != "bloom":  # which says one word for ever
        lengths = {len(row[7]) for row in rows if row[0] == "greedy-ended"}
        assert len(lengths) > 1


def test_a_net_whose_code_the_checkpoint_brings_is_continued_by_the_same_loop(shop):
    source = chatglm_fixtures.save_checkpoint(shop.root / "glm", dtype="float32", architectures=[
        "ChatGLMForConditionalGeneration"])
    shop.convert("chatglm", source, "chatglm")
    flags = "--tokens", "5", "--strategy", "greedy", "beam"
    outcome = shop.align("generate", "chatglm", *flags, "--trust-remote-code")
    assert outcome.code == 0, outcome.report.get("failures", outcome.stderr)
    assert any("with cache" in tensor["name"] for tensor in outcome.report["tensors"])
    assert shop.align("generate", "chatglm", *flags).code == 2


def planted(shop, fault, family):
    with fault.plant(shop.output(family)):
        return shop.align("generate", family, *fault.flags)


def is_shown(fault, outcome):
    """By the very case that is there to show it, in whatever texts a net writes."""
    there = {"the end does not stop a text": "greedy-ended", "top-k with a token too few": "top-k-few"}
    return there.get(fault.kind, fault.block) in outcome.failing


@pytest.mark.full
@pytest.mark.parametrize("family", ["gptj", "opt", "bloom", "t5"])
def test_every_family_shows_every_fault(shop, family):
    for fault in FAULTS:
        if not (fault.kind.startswith("positions") and family in ("bloom", "t5")):  # which are given none
            outcome = planted(shop, fault, family)
            assert outcome.code == 1 and is_shown(fault, outcome), fault.kind
            assert fault.says in outcome.report["diagnosis"]["sentence"], fault.kind


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_planted_fault_is_caught_and_explained(shop, fault):
    outcome = planted(shop, fault, "gpt2")
    assert (outcome.code, outcome.report["verdict"]) == (1, "diverged")
    assert is_shown(fault, outcome)
    assert outcome.report["first_divergence"] == outcome.failing[0].partition(" ")[0]
    assert fault.says in outcome.report["diagnosis"]["sentence"]
    assert re.search(r"row \d, (token|of the texts|behind token)", outcome.report["failures"][0])


def test_no_earlier_stage_sees_such_a_fault(shop):
    with pytest.raises(NotPlanted), FAULTS[0].plant(shop.output("gpt2")):
        assert shop.align("forward", "gpt2").code == 0


def test_a_loop_of_ours_that_is_wrong_is_told_from_a_net_that_is_wrong(shop, monkeypatch):
    monkeypatch.setattr(search, "best_of", lambda scores, count: scores - 5 * (scores == scores.max()))
    outcome = shop.align("generate", "gpt2", "--tokens", "6", "--strategy", "top-k")
    assert outcome.code == 1 and "the loop itself goes another way" in outcome.report["diagnosis"]["sentence"]


# The command line -----------------------------------------------------------------------------------------------------

def test_recorded_apart_and_together_give_one_report_and_it_is_handed_in(shop, tmp_path):
    flags = "--tokens", "5", "--strategy", "greedy", "beam"
    together = shop.align("generate", "gpt2", *flags).report
    place = tmp_path / "to-review"
    lay_out(shop.reports / "gpt2", place)
    step = place / "pipeline" / "Step5"
    assert {file.name for file in step.iterdir()} >= {"generate.md", "generate.json", "generate_torch.npy",
                                                      "generate_paddle.npy"}
    assert "| Step5 | generate | aligned" in (place / "README.md").read_text("utf-8")
    assert shop.align("generate", "gpt2", *flags, "--only", "reference").code == 0
    refused = shop.align("generate", "gpt2", "--only", "candidate", "--tokens", "5")
    assert refused.code == 2 and "--tokens: what both sides do is chosen where the reference" in refused.stderr
    assert shop.align("generate", "gpt2", "--only", "candidate").code == 0
    apart = shop.align("generate", "gpt2", "--compare").report
    for name in ("verdict", "tensors", "notes", "tables", "inputs_digest", "reference", "candidate"):
        assert together[name] == apart[name], name


def test_prompts_are_shown_side_by_side(shop, monkeypatch):
    outcome = shop.align("generate", "gpt2", "--tokens", "4", "--strategy", "greedy", "--prompt", "one", "two words")
    assert outcome.code == 0 and "Continuations side by side" in outcome.stdout
    table = outcome.report["tables"][0]
    assert [row[0] for row in table["rows"][::2]] == ["one", "two words"]
    assert all(row[2] == row[3] and row[4] == "equal" for row in table["rows"])
    monkeypatch.setattr("sys.stdin", io.StringIO("and\nmore\n\nnever\n"))
    outcome = shop.align("generate", "gpt2", "--tokens", "3", "--strategy", "greedy", "--interactive")
    assert outcome.code == 0 and outcome.stdout.count("Continuations side by side") == 2
    names = [tensor["name"] for tensor in outcome.report["tensors"]]
    assert "greedy [prompt 2]" in names and "greedy [prompt 3]" not in names
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 99 + "\nand\n\n"))
    outcome = shop.align("generate", "gpt2", "--tokens", "3", "--strategy", "greedy", "--interactive")
    assert outcome.code == 0 and "positions are to hold" in outcome.stdout
    assert "greedy" in [tensor["name"] for tensor in outcome.report["tensors"]]
    assert any("Reference: transformers' generate" in note for note in outcome.report["notes"])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    outcome = shop.align("generate", "gpt2", "--interactive")
    assert outcome.code == 2 and "no prompt was given" in outcome.stderr and not outcome.report


@pytest.mark.parametrize("flags, says", [
    (("--prompt", ""), "a prompt is empty"),
    (("--prompt", "x" * 99), "the model's 96 positions are to hold 24 new ones too"),
    (("--tokens", "95"), "leaves no room for a prompt"),
    (("--strategy", "greedy", "--top-k", "3"), "--top-k is for a strategy that was not asked for"),
    (("--rows", "2", "--prompt", "a"), "--rows counts the texts that ship"),
    (("--top-p", "1.5"), "is not a share above 0"), (("--beams", "1"), "at least 2 beams"),
    (("--temperature", "0"), "is not a number above 0"), (("--seed", "-1"), "-1 is not a whole number of 0 or more"),
    (("--length-penalty", "nan"), "nan is not a finite number"), (("--length-penalty", "inf"), "not a finite number"),
    (("--prompt", "a\udcff"), "is no text in UTF-8"), (("--beams", "x"), "x is not at least 2 beams"),
    (("--tokens", "few"), "few is not a whole number above 0"), (("--top-p", "x"), "x is not a share above 0"),
    (("--temperature", "hot"), "hot is not a number above 0"), (("--seed", "1.5"), "1.5 is not a whole number")])
def test_what_cannot_be_is_refused(shop, flags, says):
    refused = shop.align("generate", "gpt2", *flags)
    assert refused.code == 2 and says in refused.stderr and "Traceback" not in refused.stderr


def test_prompts_need_a_tokenizer_and_texts_a_head(shop):
    refused = shop.align("generate", "gptj", "--prompt", "a")
    assert refused.code == 2 and "has no tokenizer" in refused.stderr
    shop.make("BertForMaskedLM", "bert")
    refused = shop.align("generate", "bert")
    assert refused.code == 2 and refused.stderr.count("\n") == 1
    assert "BertForMaskedLM does not continue texts" in refused.stderr
    assert generate.STAGE.lacking(load_run("bert", shop.reports)) in refused.stderr
    assert generate.STAGE.lacking(load_run("gptj", shop.reports)) is None


NET = """
import paddle
from models.gpt2 import GPT2LMHeadModel


class Mine(paddle.nn.Layer):
    def __init__(self, net):
        super().__init__()
        self.gpt, self.lm_head = net.gpt, net.lm_head
        self.whole = [net]

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.whole[0](input_ids, attention_mask=attention_mask)["logits"]}


def build(config, directory):
    return Mine(GPT2LMHeadModel.from_pretrained(directory))
"""


def test_a_net_of_ones_own_is_left_to_count_for_itself_and_said_so(shop, tmp_path, monkeypatch):
    """It counts positions from the padding on, which generation does not: rows without padding agree."""
    (tmp_path / "counts_for_itself.py").write_text(NET, "utf-8")
    monkeypatch.chdir(tmp_path)
    outcome = shop.align("generate", "gpt2", "--target", "counts_for_itself:build", "--tokens", "6", "--strategy",
                         "greedy")
    report = shop.reports / "gpt2" / "counts_for_itself.build" / "generate.md"
    told = report.read_text("utf-8")
    assert outcome.code == 1 and "takes no position_ids" in told
    assert "With cache nothing is compared: this Mine does not take past_key_values" in told
    assert "positions count the padding" in told
    shutil.rmtree(report.parent)


FORGETFUL = NET.replace("attention_mask=None):", "attention_mask=None, position_ids=None, past_key_values=None, "
                        "use_cache=False):").replace("attention_mask=attention_mask)",
                                                     "attention_mask=attention_mask, position_ids=position_ids)")


def test_a_net_that_takes_a_past_and_keeps_none_is_not_called_right_with_cache(shop, tmp_path, monkeypatch):
    """It reads the whole of a text at each step, whatever it is asked for."""
    (tmp_path / "forgetful.py").write_text(FORGETFUL, "utf-8")
    monkeypatch.chdir(tmp_path)
    outcome = shop.align("generate", "gpt2", "--target", "forgetful:build", "--tokens", "4", "--strategy", "greedy")
    report = shop.reports / "gpt2" / "forgetful.build" / "generate.md"
    told = report.read_text("utf-8")
    assert outcome.code in (0, 1) and "(with cache)" not in told
    assert "With cache nothing is compared: this Mine gives nothing to keep." in told
    shutil.rmtree(report.parent)
