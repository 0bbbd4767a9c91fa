"""ChatGLM through every stage, its torch side being code that the checkpoint brings along."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from align_fixtures import Workshop, all_aligned
from chatglm_fixtures import SPECIAL, TINY, as_the_tokenizer_pads, config_of, prompts, save_checkpoint, state_of
from conftest import fast
from safetensors.torch import load_file

from align import prompts as made
from align.inputs import Inputs, seeded
from align.oracle import Float64
from align.reference import Reference
from align.runs import load_run
from align.texts import load_rows
from convert.chatglm import FAMILY, PROMPTS

TRUST = "--trust-remote-code"
CODE_TOLD = "The reference is code that the checkpoint brings along: modeling_chatglm.py (xxh3-128 "


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("chatglm"))


@pytest.fixture(scope="module")
def run_of(workshop):
    """``run_of(name, *flags, **options)``: a checkpoint of this name, converted; returns the run's name."""
    def make(name, *flags, **options):
        return workshop.convert("chatglm", save_checkpoint(workshop.root / f"source-{name}", **options), name, *flags)
    return make


@pytest.fixture(scope="module")
def plain(run_of):
    """The checkpoint as it is published, small."""
    return run_of("plain")


def sentencepieces(directory):
    """A SentencePiece model with ChatGLM's marks, trained on the passages that ship; returns the directory."""
    import sentencepiece
    texts = [row["text"] for row in load_rows(None, "test", 64)[1]]
    blanks = [f"<|blank_{length}|>" for length in range(2, 10)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=150, pad_id=3, unk_id=0, bos_id=1, eos_id=2,
        user_defined_symbols=["<n>", "<|tab|>", *blanks], minloglevel=2)
    (directory / "ice_text.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "num_image_tokens": 0, "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}))
    return directory


# Every stage ----------------------------------------------------------------------------------------------------------

def assert_within(outcomes, layers=3):
    assert all_aligned(outcomes)
    tensors = outcomes["forward"].report["tensors"]
    assert all(tensor["rel_l2"] <= 1e-6 for tensor in tensors)
    blocks = [tensor for tensor in outcomes["forward"].modules if ".layers." in f".{tensor['name']}"]
    assert len(blocks) == layers and all(tensor["isolated"]["rel_l2"] <= 1e-6 for tensor in blocks)


VARIANTS = {
    "as published": ((), {}),
    "bare": ((), {"bare": True}),
    "positions of one dimension": ((), {"position_encoding_2d": False}),
    "untied": ((), {"tie_word_embeddings": False}),
    "float32": ((), {"dtype": "float32"}),
    "bfloat16": ((), {"dtype": "bfloat16"}),
    "bin": ((), {"binary": True}),
    "cast to bfloat16": (("--dtype", "bfloat16"), {"dtype": "float32"}),
    "cast to float16, bare": (("--dtype", "float16"), {"dtype": "float32", "bare": True}),
    "widened, pdparams": (("--dtype", "float32", "--format", "pdparams"), {}),
    "wide heads, many layers": ((), {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 8}),
    "epsilon 0.1": ((), {"layernorm_epsilon": 0.1}),
    "without head and frequencies": ((), {"without": "inv_freq", "architectures": ["ChatGLMForConditionalGeneration"]}),
}


@pytest.mark.parametrize("variant", fast(
    VARIANTS, "as published", "bare", "untied", "bin", "cast to float16, bare", "widened, pdparams"))
def test_every_variant_is_aligned_at_every_stage(workshop, run_of, variant):
    flags, options = VARIANTS[variant]
    run = run_of(variant.replace(" ", "-").replace(",", ""), *flags, **options)
    outcomes = workshop.align_all(run, TRUST)
    assert_within(outcomes, options.get("num_layers", 3))
    if not options.get("bare"):
        assert set(outcomes["metric"].report["values"]) == {"perplexity", "next_token_accuracy"}
        assert set(outcomes["loss"].report["values"]) == {"loss.plain", "loss.padded", "loss.ignored"}


@pytest.mark.parametrize("bare", [False, True])
def test_texts_become_prompts_by_the_checkpoints_own_pieces(workshop, bare):
    source = sentencepieces(save_checkpoint(workshop.root / f"source-pieces-{bare}", bare=bare))
    run = workshop.convert("chatglm", source, f"pieces-{bare}")
    outcomes = {stage: workshop.align(stage, run, TRUST) for stage in ("metric", "loss")}
    assert all_aligned(outcomes)
    assert any("64 rows of the passages that ship with paddle-parity, tokenized as the source does" in note
               for note in outcomes["metric"].report["notes"])
    examples = np.load(workshop.reports / run / "traces" / "metric_torch.npy", allow_pickle=True).item()
    assert examples


def test_the_recorded_modules_and_outputs_are_in_order(workshop, plain):
    outcome = workshop.align("forward", plain, TRUST)
    assert [tensor["name"] for tensor in outcome.modules] == [
        "chatglm.transformer.word_embeddings", *(f"chatglm.transformer.layers.{i}" for i in range(3)),
        "chatglm.transformer.final_layernorm", "logits"]
    assert any("prompt without an answer; padded positions are not compared" in note
               for note in outcome.report["notes"])


def test_the_reference_trace_is_what_the_code_computes(workshop, plain):
    """The torch side's logits of real tokens, computed here once more."""
    workshop.align("forward", plain, TRUST)
    traces = workshop.reports / plain / "traces"
    with np.load(traces / "forward_inputs.npz") as stored:
        inputs = Inputs({name: stored[name] for name in stored})
    model = Reference(load_run(plain, workshop.reports), trust_remote_code=True).model
    with torch.no_grad():
        logits = model(**{name: torch.tensor(array) for name, array in inputs.arrays.items()}).logits.numpy()
    real = inputs.arrays["input_ids"] != SPECIAL["pad_token_id"]
    recorded = np.load(traces / "forward_torch.npy", allow_pickle=True).item()
    assert np.array_equal(recorded["logits"], logits[real])


@pytest.mark.parametrize("bare", fast([False, True], False))
def test_paging_finds_the_same_numbers(workshop, run_of, bare):
    run = run_of(f"paged-{bare}", bare=bare)
    whole, paged = ({stage: workshop.align(stage, run, TRUST, "--paging", paging) for stage in
                     ("forward", "metric", "loss")} for paging in ("off", "on"))
    assert all_aligned(paged)
    for stage, outcome in whole.items():
        assert outcome.report["tensors"] == paged[stage].report["tensors"], stage


def test_two_environments(workshop, plain):
    """The candidate and the comparison need neither torch's side nor leave to run its code."""
    together = workshop.align("forward", plain, TRUST)
    assert workshop.align("forward", plain, "--only", "reference").code == 2
    assert workshop.align("forward", plain, TRUST, "--only", "reference").code == 0
    assert workshop.align("forward", plain, "--only", "candidate").code == 0
    apart = workshop.align("forward", plain, "--compare")
    assert apart.code == 0 and apart.report["tensors"] == together.report["tensors"]
    assert any(CODE_TOLD in note for note in apart.report["notes"])


# The checkpoint's own code --------------------------------------------------------------------------------------------

@pytest.fixture
def trap(workshop, run_of, request):
    """(run, marker): a converted checkpoint whose code leaves a marker when it is run."""
    name = "trap-" + re.sub(r"\W+", "-", request.node.name)
    run, marker = run_of(name), workshop.root / f"{name}-ran"
    source = workshop.root / f"source-{name}"
    for file in source.glob("*.py"):
        file.write_text(f"open({str(marker)!r}, 'w').close()\n" + file.read_text())
    return run, marker, source


@pytest.mark.parametrize("stage,flags", [
    (stage, flags) for stage in ("forward", "metric", "loss") for flags in ((), ("--paging", "on"),
                                                                           ("--only", "reference"))
] + [("diagnose", ()), ("diagnose", ("--paging", "on"))], ids=str)
def test_it_is_not_run_unless_the_user_says_so(workshop, trap, stage, flags, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    run, marker, source = trap
    outcome = workshop.align(stage, run, *flags)
    assert (outcome.code, outcome.report) == (2, {})
    assert outcome.stderr.count("\n") == 1 and not marker.exists()
    for words in ("code that the checkpoint brings along", "modeling_chatglm.py, configuration_chatglm.py",
                  str(source), TRUST):
        assert words in outcome.stderr


def test_with_leave_it_is_run_and_both_terminal_and_report_say_which(workshop, trap):
    run, marker, source = trap
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 0 and marker.exists()
    assert f"{TRUST}: running code that the checkpoint brings along, in {source}" in outcome.stderr
    told = next(note for note in outcome.report["notes"] if CODE_TOLD in note)
    import xxhash
    for file in source.glob("*.py"):
        assert xxhash.xxh3_128(file.read_bytes()).hexdigest() in told and file.name in outcome.stderr


def test_the_weights_stage_needs_none_of_it(workshop, trap):
    run, marker, _ = trap
    outcome = workshop.align("weights", run)
    assert outcome.code == 0 and not marker.exists()
    assert not any("brings along" in note for note in outcome.report["notes"])


@pytest.mark.parametrize("entry", [
    "someone/elsewhere--modeling_chatglm.ChatGLMForConditionalGeneration", "../trap.ChatGLM", "a.b.C", "", 5, None])
def test_code_that_lies_elsewhere_is_refused(workshop, run_of, entry):
    name = f"elsewhere-{abs(hash(str(entry)))}"
    run = run_of(name)
    config = workshop.root / f"source-{name}" / "config.json"
    config.write_text(json.dumps(config_of(auto_map={"AutoModel": entry})))
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1
    assert ("auto_map" in outcome.stderr) and not outcome.report


def test_code_that_is_missing_or_broken_is_told(workshop, run_of):
    run = run_of("broken")
    source = workshop.root / "source-broken"
    code = (source / "modeling_chatglm.py").read_text()
    (source / "modeling_chatglm.py").write_text("from transformers.generation import NoLongerThere\n" + code)
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 2 and "the checkpoint's own code failed at " in outcome.stderr
    assert "NoLongerThere" in outcome.stderr
    (source / "modeling_chatglm.py").write_text(code.replace("class ChatGLMModel(", "class Renamed("))
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 2 and "NameError: name 'ChatGLMModel' is not defined" in outcome.stderr
    (source / "modeling_chatglm.py").write_text(code.replace("self.final_layernorm(hidden)", "self.gone(hidden)"))
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 2 and "'ChatGLMModel' object has no attribute 'gone'" in outcome.stderr
    (source / "modeling_chatglm.py").unlink()
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 2 and "modeling_chatglm.py, which its config.json names, is not in" in outcome.stderr
    shutil.rmtree(source)


def test_other_families_are_as_they_were(workshop):
    """The flag changes nothing where the torch side is transformers' own."""
    outcome = workshop.align("forward", workshop.make("GPTJForCausalLM", "gptj"), TRUST)
    assert outcome.code == 0 and "brings along" not in outcome.stderr


# The reference --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["published", "float32"])
def test_its_weights_are_the_sources_to_the_bit_though_its_class_makes_float16(workshop, run_of, dtype):
    """from_pretrained of transformers 4.55 would round a float32 source to the float16 that the class asks for."""
    run = run_of(f"exact-{dtype}", dtype=dtype)
    model = Reference(load_run(run, workshop.reports), trust_remote_code=True).model
    stored = load_file(workshop.root / f"source-exact-{dtype}" / "model.safetensors")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, stored[name].float()), name
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    buffers = dict(model.named_buffers())
    assert len(buffers) == TINY["num_layers"]
    assert all(torch.equal(buffer, stored[name].float()) for name, buffer in buffers.items())


def test_frequencies_are_not_cast_with_the_weights(workshop, run_of):
    run = run_of("bfloat16-frequencies", "--dtype", "bfloat16", hidden_size=64)
    model = Reference(load_run(run, workshop.reports), paged=True, trust_remote_code=True).model
    exact = state_of(config_of(hidden_size=64))["transformer.layers.0.attention.rotary_emb.inv_freq"].float()
    assert not torch.equal(exact, exact.bfloat16().float())
    assert all(torch.equal(buffer, exact) for buffer in model.buffers())


def test_no_pass_computes_with_the_angles_of_another(workshop, plain):
    """The code keeps its table of angles; made in float64, it would make the next pass in float32 another one."""
    model = Reference(load_run(plain, workshop.reports), trust_remote_code=True).model
    inputs = {name: torch.tensor(array) for name, array in as_the_tokenizer_pads(prompts([(7, 9), (4, 3)])).items()}
    with torch.no_grad():
        with Float64():
            double = model(**inputs).logits
        single = model(**inputs).logits
        with Float64():
            again = model(**inputs).logits
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    assert torch.equal(double, again)
    assert 1e-9 < (double - single).abs().max() / double.abs().max() < 1e-5


def test_the_oracle_is_the_code_in_double(workshop, plain):
    """Weights, table and all widened, written without the mode."""
    import copy
    model = Reference(load_run(plain, workshop.reports), trust_remote_code=True).model
    inputs = {name: torch.tensor(array) for name, array in as_the_tokenizer_pads(prompts([(7, 9), (4, 3)])).items()}
    double = copy.deepcopy(model).double()
    float32, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    try:
        with torch.no_grad():
            expected = double(**inputs).logits
    finally:
        torch.Tensor.float = float32
    with torch.no_grad(), Float64():
        found = model(**inputs).logits
    assert (found - expected).abs().max() <= 1e-13 * expected.abs().max()


# Inputs ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("positions", [True, False])
def test_rows_are_arranged_as_the_tokenizer_does(positions):
    ids = prompts([(7, 9), (3, 6), (12, 2), (9, 1)])
    rows = [[word for word in row if word != SPECIAL["pad_token_id"]] for row in ids.tolist()]
    found = made.arranged(rows, PROMPTS, config_of(position_encoding_2d=positions), FAMILY.sizes(TINY))
    expected = as_the_tokenizer_pads(ids)
    assert np.array_equal(found["input_ids"], ids)
    assert np.array_equal(found["attention_mask"], expected["attention_mask"])
    real = ids != SPECIAL["pad_token_id"]
    if positions:
        assert np.array_equal(found["position_ids"], expected["position_ids"])
    else:  # an answer to [gMASK] goes on counting
        assert np.array_equal(found["position_ids"], np.where(real, real.cumsum(1) - 1, 0))


def test_seeded_inputs_are_prompts_of_all_kinds():
    inputs = seeded(TINY, {**FAMILY.sizes(TINY), "positions": 96}, kind=PROMPTS)
    ids, real = inputs.arrays["input_ids"], inputs.mask
    assert ids.shape == (4, 96) and real[0].all() and real[1:, 0].sum() == 0 and real[:, -1].all()
    assert np.array_equal(real, ids != SPECIAL["pad_token_id"])
    counts = {"bos_token_id": [1, 1, 1, 1], "gmask_token_id": [1, 1, 0, 1], "mask_token_id": [0, 0, 1, 0]}
    for mark, count in counts.items():
        assert (ids == SPECIAL[mark]).sum(1).tolist() == count
    assert ids[3, -1] == SPECIAL["bos_token_id"]
    answers = made.answers(inputs.arrays["attention_mask"])
    behind = np.cumsum(ids == SPECIAL["bos_token_id"], axis=1) > 0
    assert np.array_equal(answers, behind & (ids != SPECIAL["bos_token_id"]))


@pytest.mark.parametrize("changes,says", [({"gmask_token_id": 160}, "gmask_token_id is 160"),
                                          ({"bos_token_id": 151}, "no two of them may be the same"),
                                          ({"mask_token_id": None}, "mask_token_id is None"),
                                          ({"pad_token_id": -1}, "pad_token_id is -1")], ids=str)
def test_marks_that_are_no_words_are_refused(workshop, run_of, changes, says):
    name = "marks-" + "-".join(map(str, changes.values()))
    run = run_of(name, **changes)
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 2 and says in outcome.stderr and outcome.stderr.splitlines()[-1].startswith("error: ")


def test_words_are_those_of_the_sentencepiece_model(tmp_path):
    import sentencepiece
    directory = sentencepieces(tmp_path)
    marks = made.marks_of(PROMPTS, TINY, FAMILY.sizes(TINY))
    tokenizer = made.Tokenizer(directory, PROMPTS, marks)
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "ice_text.model"))
    assert tokenizer.words("the river") == model.encode("the river")
    pieces = model.id_to_piece(tokenizer.words("a\tb\n\nc    d e"))
    assert [piece for piece in pieces if piece.startswith("<")] == ["<|tab|>", "<n>", "<n>", "<|blank_4|>"]
    row = tokenizer("the river", truncation=True, max_length=7)["input_ids"]
    words = model.encode("the river")[:4]
    assert row == [*words[:2], SPECIAL["gmask_token_id"], SPECIAL["bos_token_id"], *words[2:], SPECIAL["eos_token_id"]]
    (directory / "tokenizer_config.json").write_text('{"num_image_tokens": 20000}')
    shifted = made.Tokenizer(directory, PROMPTS, marks)
    assert shifted.words("the river") == [20000 + word for word in model.encode("the river")]


def test_a_damaged_sentencepiece_model_is_told(workshop, run_of):
    run = run_of("damaged-pieces")
    (workshop.root / "source-damaged-pieces" / "ice_text.model").write_bytes(b"no model")
    outcome = workshop.align("metric", run, TRUST)
    assert outcome.code == 2 and "the tokenizer in" in outcome.stderr and "cannot be read" in outcome.stderr


@pytest.fixture
def own(workshop, monkeypatch):
    """``own(name, body)``: a target in whose ``build`` the ``body`` is, which finds the code that was loaded last as
    ``code``; returns the flags that choose it.
    """
    monkeypatch.syspath_prepend(str(workshop.root))

    def make(name, body=""):
        (workshop.root / f"{name}.py").write_text(f"""
import sys, models

def build(config, directory):
    code = [module for name, module in sys.modules.items() if name.endswith(".modeling_chatglm")][-1]
    {body}
    return models.from_pretrained(directory)
""")
        return "--target", f"{name}:build", TRUST
    return make


def test_a_target_of_the_users_own_is_held_against_it(workshop, plain, own):
    """Its classes are fingerprinted where they are trusted; transformers has none."""
    target = own("own_chatglm")
    assert workshop.align("weights", plain, *target[:2]).code == 0
    assert workshop.align("forward", plain, *target).code == 0


@pytest.mark.parametrize("part,changed", [
    ("Attention.forward", "lambda self, hidden_states: hidden_states"), ("MLP.forward", "None"),
    ("turned", "lambda x, matrices: x"), ("half_linear", "None")])
def test_a_target_that_changes_it_is_refused(workshop, plain, own, part, changed):
    """Whatever other code of that name has been loaded before, as by another checkpoint."""
    target = own(f"changing_{part.replace('.', '_')}", f"code.{part} = {changed}")
    outcome = workshop.align("forward", plain, *target)
    assert outcome.code == 2 and f"modeling_chatglm.{part}" in outcome.stderr, outcome.stderr


def test_what_an_earlier_target_did_to_it_is_gone_from_the_next_reference(workshop, plain, own):
    changing = own("forgetting", "code.Attention.forward = lambda self, *_, **__: (0 * _[0], None)")
    assert workshop.align("forward", plain, *changing).code == 2
    assert workshop.align("forward", plain, *own("forgotten")).code == 0
    assert workshop.align("forward", plain, TRUST).code == 0


def test_code_that_is_not_the_references_may_be_changed(workshop, plain, run_of, own):
    """That of another checkpoint under the same name: the reference does not run it."""
    other = workshop.root / "source-another" / "modeling_chatglm.py"
    run = run_of("another")
    other.write_text(f"{other.read_text()}\nANOTHER = True\n")
    assert workshop.align("forward", run, TRUST).code == 0
    target = own("changing_another", "next(module for module in list(sys.modules.values()) if hasattr(module, "
                                     "'ANOTHER')).Attention.forward = None")
    outcome = workshop.align("forward", plain, *target)
    assert outcome.code == 0, outcome.stderr
