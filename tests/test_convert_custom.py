"""Home-made GPTs: examples/, other layouts, the way back into the net, and the story of 8 heads instead of 12."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import paddle
import pytest
import torch
import transformers
from align_fixtures import Workshop, all_aligned, torch_model
from conftest import call, fast
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import models
from convert.__main__ import family_named, load_family
from convert.__main__ import main as convert_main
from convert.back import main as back_main
from convert.checkpoint import opened
from convert.cli import main as family_main
from convert.custom import fill
from convert.errors import BadInput
from convert.plan import make_plan
from convert.stream import carry_out
from convert.writer import Staging, make_layout

EXAMPLES = Path(__file__).parents[1] / "examples"
MY_GPT, EIGHT_HEADS = EXAMPLES / "my_gpt.py", EXAMPLES / "eight_heads.py"
STAGES = ("weights", "forward", "metric", "loss")
specification = importlib.util.spec_from_file_location("my_gpt_net", EXAMPLES / "my_gpt_net.py")
my_gpt_net = importlib.util.module_from_spec(specification)
specification.loader.exec_module(my_gpt_net)


def trained_like(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                table = name.startswith(("tokens", "places", "w"))
                weight.copy_(noise * (0.5 if table else 1.4 / weight.shape[1]**0.5))
            else:
                weight.copy_(0.1 * noise + float(name.endswith("weight")))
    return net.eval()


def my_net(layers=2, n_heads=12, width=48):
    return trained_like(my_gpt_net.MyGPT(300, 80, width, layers, n_heads))


class Home(Workshop):
    """A directory in which checkpoints of home-made nets are converted and aligned by a family file."""

    def take(self, net, family=MY_GPT, run="my"):
        source = self.root / f"{run}.pt"
        torch.save(net.state_dict(), source)
        return call(convert_main, ["--family", str(family), "--source", str(source), "--output", str(self.output(run)),
                                   "--reports", str(self.reports)])

    def stages(self, run="my", family=MY_GPT, *flags, stages=STAGES):
        return {stage: self.align(stage, run, "--family", str(family), *flags) for stage in stages}


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


@pytest.mark.parametrize("layers", fast([3, 12], 3))
def test_the_example_is_aligned_at_every_stage_against_the_users_own_net(home, layers):
    assert home.take(my_net(layers))[0] == 0
    assert all_aligned(home.stages())
    report = json.loads((home.reports / "my" / "forward.json").read_text())
    assert f"gpt.decoder.layers.{layers - 1}" in {tensor["name"] for tensor in report["tensors"]}
    assert len(report["sublayers"]) == 17 * layers
    assert report["reference"]["framework"] == "torch" and report["candidate"]["framework"] == "paddle"


def test_what_is_written_is_a_gpt2_checkpoint_for_models_and_paddlenlp(home):
    net = my_net()
    home.take(net)
    ids = np.random.default_rng(0).integers(0, 300, (2, 9))
    with torch.no_grad():
        expected = net(torch.tensor(ids)).numpy()
    ours = models.from_pretrained(home.output("my"))
    np.testing.assert_allclose(ours(paddle.to_tensor(ids))["logits"].numpy(), expected, rtol=1e-4, atol=1e-4)
    outcomes = home.stages("my", MY_GPT, "--target", "paddlenlp", stages=("weights", "forward", "metric"))
    assert all_aligned(outcomes)


def test_a_cast_conversion_rounds_the_users_net_too(home):
    net = my_net()
    torch.save(net.state_dict(), home.root / "my.pt")
    arguments = ["--family", str(MY_GPT), "--source", str(home.root / "my.pt"), "--output", str(home.output("my")),
                 "--reports", str(home.reports), "--dtype", "bfloat16", "--format", "pdparams"]
    assert call(convert_main, arguments)[0] == 0
    assert all_aligned(home.stages(stages=("weights", "forward")))


CONTRADICTIONS = [({"n_head": 8}, "n_head 8, the family file of my_gpt 12"),
                  ({"num_attention_heads": 8}, "num_attention_heads 8, the family file of my_gpt 12"),
                  ({"embd_pdrop": 0.0}, "embd_pdrop 0.0, the family file of my_gpt 0.1")]


@pytest.mark.parametrize("says, told", CONTRADICTIONS)
def test_a_config_beside_the_source_does_not_override_the_family_file(home, says, told):
    """Their net would be built with the config's heads, and both sides be wrong together."""
    home.take(my_net())
    config = json.loads((home.output("my") / "config.json").read_text())
    beside = home.root / "config.json"
    beside.write_text(json.dumps({key: config[key] for key in config if key not in ("n_head", "embd_pdrop")} | says))
    code, _, err = home.take(my_net(), run="again")
    assert code == 2 and told in " ".join(err.split()) and not home.output("again").exists()
    outcome = home.stages(stages=("forward",))["forward"]
    assert outcome.code == 2 and told in " ".join(outcome.stderr.split())


def test_a_config_beside_the_source_that_is_silent_leaves_it_to_the_family_file(home):
    home.take(my_net())
    config = json.loads((home.output("my") / "config.json").read_text())
    (home.root / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "n_head"}))
    assert home.take(my_net(), run="again")[0] == 0
    assert json.loads((home.output("again") / "config.json").read_text())["n_head"] == 12
    assert all_aligned(home.stages("again", stages=("weights", "forward")))


@pytest.mark.parametrize("says, told", CONTRADICTIONS[:1])
def test_a_paddle_checkpoint_that_contradicts_the_family_file_does_not_go_back_into_its_net(home, says, told):
    home.take(my_net())
    file = home.output("my") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | says))
    code, _, err = call(back_main, ["--family", str(MY_GPT), "--source", str(home.output("my")), "--output",
                                    str(home.root / "back"), "--reports", str(home.reports)])
    assert code == 2 and told in " ".join(err.split()) and not (home.root / "back").exists()


# The way back ---------------------------------------------------------------------------------------------------------


def carried_back(family, source, directory):
    """What ``family.inverse()`` makes of a Paddle checkpoint, by the planner and the engine of every conversion."""
    config = json.loads((source / "config.json").read_text())
    with opened(source) as checkpoint:
        plan = make_plan(family.inverse(), config, checkpoint.tensors)
        layout = make_layout(plan.moves, "safetensors", 1 << 30, framework="pt")
        with Staging(directory) as staging:
            staging.allocate(layout)
            carry_out(plan, checkpoint, layout, staging, allow_nonfinite=False, advance=lambda nbytes: None)
            staging.publish()
    return directory


def test_openais_weights_go_into_the_users_net(home):
    """GPT2LMHeadModel -> Paddle -> MyGPT: the same logits, to rounding, as transformers' class gives."""
    run = home.make("GPT2LMHeadModel", "openai")
    back = carried_back(load_family(MY_GPT), home.output(run), home.root / "from-openai")
    net = fill(my_gpt_net.MyGPT(257, 96, 32, 3, n_heads=4), back).eval()
    ids = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, given = torch_model("GPT2LMHeadModel")(ids).logits, net(ids)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(net.blocks[1].attn.key.weight,
                       torch_model("GPT2LMHeadModel").transformer.h[1].attn.c_attn.weight[:, 32:64].T)


def test_there_and_back_is_the_same_bits(home):
    net = my_net()
    home.take(net)
    back = carried_back(load_family(MY_GPT), home.output("my"), home.root / "back")
    again = fill(my_gpt_net.MyGPT(300, 80, 48, 2), back)
    for name, parameter in net.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


# Other layouts --------------------------------------------------------------------------------------------------------


class Fused(torch.nn.Module):
    """nanoGPT's shape: one fused linear, no biases, a mask that it is given."""

    def __init__(self, conv1d, bias):
        super().__init__()
        make = transformers.pytorch_utils.Conv1D if conv1d else lambda out, inp: torch.nn.Linear(inp, out, bias=bias)
        self.wte, self.wpe = torch.nn.Embedding(200, 32), torch.nn.Embedding(70, 32)
        self.h = torch.nn.ModuleList([torch.nn.ModuleDict({
            "n1": torch.nn.LayerNorm(32, bias=bias), "qkv": make(96, 32), "o": make(32, 32),
            "n2": torch.nn.LayerNorm(32, bias=bias), "fc": make(80, 32), "pr": make(32, 80)}) for _ in range(2)])
        for block in self.h:
            block.forward = lambda x, mask, block=block: run_block(block, x, mask)
        self.ln = torch.nn.LayerNorm(32, bias=bias)

    def forward(self, input_ids, attention_mask=None, labels=None):
        time = input_ids.shape[1]
        seen = torch.ones(time, time, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :].bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        x = self.wte(input_ids) + self.wpe(torch.arange(time))
        for block in self.h:
            x = block(x, mask)
        logits = self.ln(x) @ self.wte.weight.T
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def run_block(block, x, mask):
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in block["qkv"](block["n1"](x)).chunk(3, -1))
    weights = (q @ k.transpose(-1, -2) / 8**0.5 + mask).softmax(-1)
    x = x + block["o"]((weights @ v).transpose(1, 2).flatten(-2))
    return x + block["pr"](torch.nn.functional.gelu(block["fc"](block["n2"](x))))


FUSED_FAMILY = """
from convert.custom import fill, home_made_gpt2
from test_convert_custom import Fused

FAMILY = home_made_gpt2(
    "fused", n_head=4, words="wte", positions="wpe", block="h.{{i}}", norms=("n1", "n2"), qkv=("qkv",), out="o",
    up="fc", down="pr", last_norm="ln", conv1d_weights={conv1d}, biases={bias}, knows_masks=True,
    config={{"activation_function": "gelu"}}, reference=lambda config, source: fill(Fused({conv1d}, {bias}), source))
"""


@pytest.mark.parametrize("conv1d, bias", [(True, True), (False, True), (False, False)])
def test_fused_projections_conv1d_and_no_biases(home, conv1d, bias):
    family = home.root / "fused.py"
    family.write_text(FUSED_FAMILY.format(conv1d=conv1d, bias=bias))
    code, _, err = home.take(trained_like(Fused(conv1d, bias)), family, "fused")
    assert code == 0, err
    outcomes = home.stages("fused", family)
    assert all_aligned(outcomes)
    assert len(outcomes["forward"].report["sublayers"]) == 17 * 2


# The known story and the other suspicions -----------------------------------------------------------------------------


def test_the_report_says_heads_with_the_figures(home):
    assert home.take(my_net(n_heads=8), EIGHT_HEADS, "eight")[0] == 0
    assert all_aligned(home.stages("eight", EIGHT_HEADS, stages=("weights",)))
    outcome = home.stages("eight", EIGHT_HEADS, stages=("forward",))["forward"]
    assert outcome.code == 1
    assert outcome.report["first_divergence"] == "gpt.decoder.layers.0"
    diagnosis = outcome.report["diagnosis"]
    assert (diagnosis["kind"], diagnosis["subject"]) == ("head-count", "gpt.decoder.layers.0.self_attn heads")
    assert "heads are 12 instead of 8" in diagnosis["sentence"]
    assert diagnosis["before"] > 0.1 and diagnosis["after"] < 1e-5
    parts = {part["name"]: part["passed"] for part in outcome.report["sublayers"]}
    failing = {name for name, passed in parts.items() if not passed}
    assert all("attention: scale, mask, softmax" in name for name in failing) and len(failing) == 2


CHANGED_FAMILY = """
from dataclasses import replace
from pathlib import Path
from convert.__main__ import load_family

my = load_family(Path({file!r}))
head = my.heads[0]
FAMILY = replace(my, config_of=lambda header: {{**my.config_of(header), **{config}}}, heads=(
    replace(head, reference=lambda config, source: head.reference(config, source, **{theirs})),))
"""


def diverged(home, net, config, theirs):
    """Their net, built with ``theirs``, against Paddle's, whose config has ``config``."""
    family = home.root / "changed.py"
    family.write_text(CHANGED_FAMILY.format(file=str(MY_GPT), config=config, theirs=theirs))
    assert home.take(net, family)[0] == 0
    outcome = home.stages("my", family, stages=("forward",))["forward"]
    assert outcome.code == 1
    return outcome.report


@pytest.mark.parametrize("right, theirs", [(12, 6), (4, 12), (12, 1)])
def test_any_other_number_of_heads_is_found(home, right, theirs):
    report = diverged(home, my_net(), {"n_head": right}, {"n_heads": theirs})
    assert f"heads are {right} instead of {theirs}" in report["diagnosis"]["sentence"]


def test_another_gelu_is_told_apart_from_heads(home):
    """Suspicion one of the story: one side has the exact gelu, the other its approximation."""
    report = diverged(home, my_net(), {"activation_function": "gelu"}, {})
    failing = [part["name"] for part in report["sublayers"] if not part["passed"]]
    assert failing and all("mlp activation" in name for name in failing)


def test_what_convert_back_says_loads_the_result_into_the_users_net(home, tmp_path, monkeypatch):
    """OpenAI's weights: a plain load_state_dict fails, as is told; what is printed works, and gives torch's logits."""
    monkeypatch.chdir(tmp_path)
    theirs = trained_like(GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=80, n_embd=48, n_layer=2, n_head=12)))
    theirs.save_pretrained(tmp_path / "gpt2")
    assert call(family_main, family_named("gpt2"), ["--source", "gpt2", "--output", "out/gpt2"])[0] == 0
    code, said, _ = call(back_main, ["--family", str(MY_GPT), "--source", "out/gpt2", "--output", "from-openai"])
    snippet = re.search(r"^next: in Python, with a net of yours: (.+)$", said, re.M).group(1)
    assert code == 0 and "load_state_dict needs strict=False" in said
    net = my_gpt_net.MyGPT(300, 80, 48, 2)
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(load_file("from-openai/model.safetensors"))
    scope = {"net": net}
    exec(snippet, scope)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(scope["net"].eval()(ids), theirs(ids).logits)


def test_a_wrong_number_of_layers_in_the_family_file_is_told_as_such(home, tmp_path):
    family = tmp_path / "mine.py"
    family.write_text(MY_GPT.read_text().replace('config={"embd_pdrop": 0.1}', 'config={"n_layer": 5}'))
    code, _, said = home.take(my_net(2), family=family)
    assert code == 2
    assert "the family file (n_layer) says 5 layers, my.pt holds 2 (blocks.0 to blocks.1). Correct the number" in said


@pytest.mark.parametrize("layers, changed, says", [
    (2, {"blocks.0.up.weight": lambda w: w.T}, "blocks.0.up.weight has shape [48, 192], the config asks for"),
    (2, {"blocks.1.down.weight": lambda w: w.T}, "blocks.1.down.weight has shape [192, 48]"),
    (2, {"blocks.1.attn.key.weight": lambda w: w[:36]}, "blocks.1.attn.key.weight has shape [36, 48]"),
    (2, {"blocks.0.up.weight": lambda w: w[:191]},
     "blocks.0.up.weight has shape [191, 48], the config asks for [192, 48] (inner 192 x hidden 48)."),
    (1, {"blocks.0.up.bias": lambda w: w[:191]}, "blocks.0.up.bias has shape [191], the config asks for [192]"),
    (2, {"blocks.0.up.bias": lambda w: w[0]}, "blocks.0.up.bias has shape [], the config asks for [192]"),
    (2, {"blocks.1.up.bias": None},
     "that no source tensor fills: gpt.decoder.layers.1.linear1.bias; blocks.1.up.bias is not in the source"),
    (2, {"tokens.weight": None}, "there is no matrix tokens.weight"),
    (2, {"head.weight": lambda w: w + 1}, "head.weight"),
])
def test_what_does_not_fit_is_refused_with_a_sentence(home, layers, changed, says):
    """Suspicions two and three: Conv1D's [in, out] taken for a linear's, and heads that somebody pruned."""
    state = my_net(layers).state_dict()
    for name, change in changed.items():
        state[name] = None if change is None else change(state[name]).contiguous()
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, home.root / "bad.pt")
    code, _, err = call(convert_main, ["--family", str(MY_GPT), "--source", str(home.root / "bad.pt"), "--output",
                                       str(home.output("bad")), "--reports", str(home.reports)])
    assert code == 2 and says in err and not home.output("bad").exists()


@pytest.mark.parametrize("name, says", [("blocks.0.up.bias", "lacks blocks.0.up.bias"), ("more", "has more in vain")])
def test_a_net_that_the_checkpoint_does_not_fill_is_no_reference(tmp_path, name, says):
    state = {**my_net(1).state_dict(), "more": torch.ones(1)}
    del state[name if name != "more" else "head.weight"]
    torch.save({key: tensor for key, tensor in state.items() if name == "more" or key != "more"}, tmp_path / "my.pt")
    with pytest.raises(BadInput, match=says):
        fill(my_gpt_net.MyGPT(300, 80, 48, 1), tmp_path / "my.pt")
