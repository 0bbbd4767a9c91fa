"""Diagnoses: planted faults get the right explanation, faults that are not in stock get none."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import torch
from align_fixtures import Workshop
from paddle.nn import functional as F
from safetensors.numpy import load_file, save_file

import models
from align import explanations
from align.diagnose import diagnose
from align.explanations.weights import difference
from align.selftest import one_reference
from models import attention, bert, gptj
from models.activation import activation

LAYER, BLOCK = "bert.encoder.layers.1", "transformer.h.1"


@pytest.fixture(scope="module", autouse=True)
def one_torch_side():
    """It is the same however wrong the net is: each of its passes is computed once."""
    with one_reference():
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("diagnose"))
    workshop.make("BertForMaskedLM", "bert")
    workshop.make("GPTJForCausalLM", "gptj")
    workshop.make("GPTJForSequenceClassification", "classes")
    return workshop


@pytest.fixture
def why(workshop, monkeypatch):
    """``why(run, fault)``: the stage's outcome and the explanation with the net broken after it was loaded."""
    load, found = models.from_pretrained, []

    def diagnosis(*arguments):
        found.append(diagnose(*arguments))
        return found[-1]
    monkeypatch.setattr("align.forward.diagnose", diagnosis)

    def run(name, fault):
        def broken(directory):
            net = load(directory)
            fault(net)
            return net
        monkeypatch.setattr(models, "from_pretrained", broken)
        outcome = workshop.align("diagnose", name)
        assert outcome.code in (0, 1), outcome.stderr
        return outcome, next(iter(found), None)
    return run


@contextmanager
def rewritten(workshop, run, edit):
    """``edit(tensors)`` done to the output's checkpoint, and undone."""
    file = workshop.output(run) / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    edit(tensors)
    save_file({name: np.array(array, order="C") for name, array in tensors.items()}, file, {"format": "np"})
    try:
        yield
    finally:
        file.write_bytes(whole)


def untouched(net):
    pass


@pytest.mark.parametrize("run", ["bert", "gptj", "classes"])
def test_where_all_agrees_there_is_nothing_to_explain(why, run):
    outcome, found = why(run, untouched)
    assert (outcome.code, found) == (0, None)
    assert "Nothing to explain" in outcome.stdout


# Changed weights ------------------------------------------------------------------------------------------------------

def projections(part):
    return [f"{BLOCK}.attn.{name}_proj.{part}" for name in "qkv"]


def transposed(tensors):
    tensors[f"{LAYER}.self_attn.k_proj.weight"] = tensors[f"{LAYER}.self_attn.k_proj.weight"].T


def swapped(tensors):
    q, k, _ = projections("weight")
    tensors[q], tensors[k] = tensors[k], tensors[q]


def in_turn(tensors):
    q, k, v = projections("weight")
    tensors[q], tensors[k], tensors[v] = tensors[k], tensors[v], tensors[q]


def cut_per_head(tensors):
    fused = np.concatenate([tensors[name].T for name in projections("weight")]).reshape(4, 3, 8, 32)
    for number, name in enumerate(projections("weight")):
        tensors[name] = fused[:, number].reshape(32, 32).T


def shifted(tensors):
    for name in sorted(tensors):
        for layer in (0, 1):
            if f".h.{layer}." in name:
                tensors[name] = tensors[name.replace(f".h.{layer}.", f".h.{layer + 1}.")]


def exchanged(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        other = name.replace(".1.", ".2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def half(tensors):
    tensors[f"{BLOCK}.mlp.fc_in.weight"] = tensors[f"{BLOCK}.mlp.fc_in.weight"].astype(np.float16).astype(np.float32)


def brain(tensors):
    bits = tensors[f"{LAYER}.linear1.weight"].view(np.uint32)
    tensors[f"{LAYER}.linear1.weight"] = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def one_element(tensors):
    tensors[f"{LAYER}.linear2.bias"][5] += 1e-4


def a_little_more(tensors):
    tensors[f"{BLOCK}.ln_1.weight"] *= np.float32(1.0005)


def no_bias(tensors):
    tensors[f"{BLOCK}.mlp.fc_in.bias"][:] = 0


def heads_moved(tensors):
    name = projections("weight")[0]
    tensors[name] = tensors[name].reshape(32, 4, 8)[:, [1, 0, 3, 2]].reshape(32, 32)


def embedding_as_head(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].T


def key_bias(tensors):
    tensors[f"{LAYER}.self_attn.k_proj.bias"] += 1


def rows_moved(tensors):
    tensors["transformer.wte.weight"] = np.roll(tensors["transformer.wte.weight"], 1, 0)


def broken(tensors):
    tensors[f"{LAYER}.norm1.weight"][3] = np.nan


WEIGHTS = [
    (transposed, "bert", "transposed-weight", f"{LAYER}.self_attn.k_proj.weight", "is transposed: undone"),
    (swapped, "gptj", "swapped-weights", f"{BLOCK}.attn.q_proj.weight", "k_proj.weight are swapped"),
    (in_turn, "gptj", "qkv-order", f"{BLOCK}.attn.q_proj.weight", "in each other's place"),
    (cut_per_head, "gptj", "qkv-order", f"{BLOCK}.attn.q_proj.weight", "per head"),
    (shifted, "gptj", "shifted-layers", "transformer.h.0", "holds the weights of transformer.h.1"),
    (exchanged, "bert", "swapped-layers", LAYER, "and bert.encoder.layers.2 hold each other's weights"),
    (half, "gptj", "rounded-to-float16", f"{BLOCK}.mlp.fc_in.weight", "is rounded to float16"),
    (brain, "bert", "rounded-to-bfloat16", f"{LAYER}.linear1.weight", "is rounded to bfloat16"),
    (one_element, "bert", "changed-elements", f"{LAYER}.linear2.bias", "is changed at [5]"),
    (a_little_more, "gptj", "scaled-weight", f"{BLOCK}.ln_1.weight", "is multiplied by 1.0005"),
    (no_bias, "gptj", "missing-bias", f"{BLOCK}.mlp.fc_in.bias", "is all zeros"),
    (heads_moved, "gptj", "permuted-weight", f"{BLOCK}.attn.q_proj.weight", "in the order 1, 0, 3, 2"),
    (embedding_as_head, "gptj", "tied-weights", "lm_head.weight", "holds transformer.wte.weight"),
    (key_bias, "bert", "shifted-weight", f"{LAYER}.self_attn.k_proj.bias", "no output of these inputs shows it"),
    (rows_moved, "gptj", "permuted-weight", "transformer.wte.weight", "has its rows moved on by +1"),
    (broken, "bert", "nonfinite-weight", f"{LAYER}.norm1.weight", "holds 1 elements that are NaN"),
]


@pytest.mark.parametrize("edit, run, kind, subject, told", WEIGHTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_changed_weight_is_named_and_said_how(workshop, why, edit, run, kind, subject, told):
    with rewritten(workshop, run, edit):
        outcome, found = why(run, untouched)
    assert outcome.code == 1
    assert (found.kind, found.subject) == (kind, subject)
    assert told in found.sentence and found.sentence == outcome.report["diagnosis"]["sentence"]
    assert found.after < 1e-6


# Changed operations ---------------------------------------------------------------------------------------------------

def patched(place, name, make):
    """``make(old)`` for the forward of one sublayer, as a fault."""
    def fault(net):
        layer = net
        for part in place.split("."):
            layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
        if name == "forward":
            layer.forward = make(layer)
        else:
            setattr(layer, name, make(getattr(layer, name)))
    return fault


def masked(place, change):
    """``change`` of the mask, the second argument of a block."""
    def make(layer):
        run = layer.forward
        return lambda hidden, mask, *rest: run(hidden, change(mask), *rest)
    return patched(place, "forward", make)


def ids(change):
    """``change(types, positions)`` of what BERT's embeddings look up."""
    def make(layer):
        run = layer.forward
        return lambda words, types, positions: run(words, *change(types, positions))
    return patched("bert.embeddings", "forward", make)


def last_back(types, positions):
    step = (paddle.arange(positions.shape[-1]) == positions.shape[-1] - 1).astype(positions.dtype)
    return types, positions - step


def pre_norm(layer):
    def run(hidden, mask=None):
        hidden = hidden + layer.self_attn(layer.norm1(hidden), mask)
        return hidden + layer.linear2(layer.activation(layer.linear1(layer.norm2(hidden))))
    return run


def one_after_the_other(block):
    def run(hidden, mask, sin, cos, past=None):
        attended, present = block.attn(block.ln_1(hidden), mask, sin, cos, past)
        return hidden + attended + block.mlp(block.ln_1(hidden + attended)), present
    return run


def dropping(layer):
    return lambda x: F.dropout(x, 0.1, training=True)


def visible_padding_of_row_1(mask):
    row = mask.numpy()
    row[1:2] = np.where(np.tril(np.ones(row.shape[-2:])) * (row[1:2] < -1) > 0, -10, row[1:2])
    return paddle.to_tensor(row)


def first_token(net):
    net.forward = lambda **inputs: {"logits": net.score(net.transformer(**inputs)["last_hidden_state"])[:, 0]}


FAINT = patched("bert.embeddings.layer_norm", "_epsilon", lambda old: 1e-6)
TANH = patched(LAYER, "activation", lambda old: activation("gelu_new"))
OPERATIONS = [
    ("bert", FAINT, "layer-norm-epsilon", "bert.embeddings.layer_norm"),
    ("bert", TANH, "gelu-variant", f"{LAYER} activation"),
    ("gptj", patched(f"{BLOCK}.mlp", "act", lambda old: activation("relu")), "activation", f"{BLOCK}.mlp activation"),
    ("bert", patched(f"{LAYER}.norm2", "_epsilon", lambda old: 1e-5), "layer-norm-epsilon", f"{LAYER}.norm2"),
    ("bert", patched(f"{LAYER}.norm2", "_epsilon", lambda old: 1e-8), "layer-norm-epsilon", f"{LAYER}.norm2"),
    ("gptj", patched("transformer.h.0.ln_1", "_epsilon", lambda old: 3.3e-6), "layer-norm-epsilon",
     "transformer.h.0.ln_1"),
    ("bert", masked(LAYER, lambda mask: None), "mask-missing", f"{LAYER}.self_attn mask"),
    ("bert", masked(LAYER, lambda mask: mask.clip(min=-10.0)), "mask-value", f"{LAYER}.self_attn mask"),
    ("gptj", masked(BLOCK, visible_padding_of_row_1), "mask-value", f"{BLOCK}.attn mask"),
    ("gptj", masked(BLOCK, lambda mask: mask[:, :, -1:]), "causal-mask-missing", f"{BLOCK}.attn mask"),
    ("bert", masked(LAYER, lambda mask: mask.min() - mask), "mask-polarity", f"{LAYER}.self_attn mask"),
    ("bert", ids(lambda types, positions: (types, (positions + 1) % 96)), "position-offset",
     "bert.embeddings positions"),
    ("bert", ids(last_back), "position-offset", "bert.embeddings positions"),
    ("bert", ids(lambda types, positions: (types * 0, positions)), "token-types",
     "bert.embeddings.token_type_embeddings"),
    ("bert", patched(LAYER, "forward", pre_norm), "layer-norm-placement", LAYER),
    ("gptj", patched(BLOCK, "forward", one_after_the_other), "layer-norm-placement", BLOCK),
    ("bert", patched(f"{LAYER}.self_attn", "heads", lambda old: 2), "head-count", f"{LAYER}.self_attn heads"),
    ("gptj", patched(f"{BLOCK}.attn.k_proj", "forward", lambda layer: lambda x: x @ layer.weight.T),
     "transposed-weight", f"{BLOCK}.attn.k_proj.weight"),
    ("bert", patched(f"{LAYER}.linear2", "forward", lambda layer: lambda x: x @ layer.weight), "missing-bias",
     f"{LAYER}.linear2.bias"),
    ("bert", patched(f"{LAYER}.dropout2", "forward", dropping), "dropout", f"{LAYER}.norm2 dropout"),
    ("gptj", patched(f"{BLOCK}.mlp.dropout", "forward", dropping), "dropout", f"{BLOCK} dropout"),
    ("classes", first_token, "pooling", "logits"),
]


@pytest.mark.parametrize("run, fault, kind, subject", OPERATIONS, ids=[f"{case[2]}-{case[0]}" for case in OPERATIONS])
def test_an_operation_of_the_net_is_explained_with_figures(why, run, fault, kind, subject):
    outcome, found = why(run, fault)
    assert outcome.code == 1
    assert found is not None and (found.kind, found.subject) == (kind, subject)
    assert found.after < 1e-6 and found.before > (5e-7 if fault is FAINT else 1e-6)
    assert f"from {found.before:.1e} to {found.after:.1e}" in found.sentence


def halves(x, sin, cos):
    turning = 2 * sin.shape[-1]
    one, other = x[..., : turning // 2], x[..., turning // 2: turning]
    return paddle.concat([one * cos - other * sin, other * cos + one * sin, x[..., turning:]], -1)


def turned_back(x, sin, cos, rotate=gptj.rotate):
    return rotate(x, -sin, cos)


def scaled(factor):
    return lambda query, *rest: attention.attend(query * factor, *rest)


FUNCTIONS = [
    (gptj, "rotate", halves, "rotary-style", "rotary"), (gptj, "rotate", turned_back, "rotary-direction", "rotary"),
    (gptj, "rotate", lambda x, sin, cos: x, "rotary-missing", "rotary"),
    (gptj, "attend", scaled(1.0001), "attention-scale", "scale"),
    (bert, "attend", scaled(8**0.5), "attention-scale", "scale"),
    (bert, "attend", scaled(1.37), "attention-scale", "scale"),
]


@pytest.mark.parametrize("module, name, function, kind, operation", FUNCTIONS)
def test_a_function_of_the_net_is_explained(why, monkeypatch, module, name, function, kind, operation):
    monkeypatch.setattr(module, name, function)
    _, found = why(module.__name__.removeprefix("models."), untouched)
    attended = "bert.encoder.layers.0.self_attn" if module is bert else "transformer.h.0.attn"
    assert (found.kind, found.subject) == (kind, f"{attended} {operation}")
    assert "1.37" in found.sentence or function is not FUNCTIONS[-1][2]


# None is better than a wrong one --------------------------------------------------------------------------------------

def both(*faults):
    def fault(net):
        for one in faults:
            one(net)
    return fault


def jittered(layer):
    run, noise = layer.forward, np.random.default_rng(0)
    return lambda x: run(x) * (1 + 3e-6 * paddle.to_tensor(noise.standard_normal((*x.shape[:2], 32)).astype("float32")))


def through(change):
    def make(layer):
        run = layer.forward
        return lambda x: change(run(x))
    return make


NOT_IN_STOCK = [
    ("bert", both(TANH, patched(f"{LAYER}.norm1", "_epsilon", lambda old: 1e-3))),
    ("gptj", patched(f"{BLOCK}.mlp", "act", lambda old: paddle.nn.Softplus())),
    ("gptj", patched(BLOCK, "forward", lambda block: lambda *rest, run=block.forward: (run(*rest)[0] * 1.01, None))),
    ("bert", patched(f"{LAYER}.linear1", "forward", through(lambda x: x.clip(-2, 2)))),
    ("bert", patched(f"{LAYER}.linear2", "forward", jittered)),
    ("bert", patched(f"{LAYER}.self_attn.q_proj", "forward", through(
        lambda x: x * paddle.to_tensor(np.repeat([1, 1.1, 0.9, 1.2], 8).astype("float32"))))),
    ("bert", masked(LAYER, lambda mask: mask - 0.1 * (paddle.arange(96.0)[:, None] - paddle.arange(96.0)).abs())),
    ("bert", patched(f"{LAYER}.linear2", "forward", through(lambda x: x.astype("bfloat16").astype("float32")))),
]


@pytest.mark.parametrize("run, fault", NOT_IN_STOCK, ids=range(len(NOT_IN_STOCK)))
def test_a_fault_that_is_not_in_stock_is_not_explained(why, run, fault):
    outcome, found = why(run, fault)
    assert (outcome.code, found) == (1, None)
    assert "No explanation in stock accounts for" in outcome.stdout


def test_a_mask_of_minus_ten_thousand_is_no_fault_and_is_not_blamed(why):
    outcome, found = why("bert", masked(LAYER, lambda mask: mask.clip(min=-1e4)))
    assert (outcome.code, found) == (0, None)


def test_two_faults_at_once_are_told_together_only_where_one_is_a_weight(workshop, why):
    """The weight is known from the arrays, so the operation can be found beside it."""
    with rewritten(workshop, "bert", transposed):
        _, found = why("bert", TANH)
    assert found.kind == "gelu-variant"
    assert "as the candidate holds it" in found.sentence


# Arrays ---------------------------------------------------------------------------------------------------------------

W = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)


@pytest.mark.parametrize("held, kind", [
    (W.T, "transposed-weight"), (-W, "sign"), (W * np.float32(3), "scaled-weight"), (W[::-1], "permuted-weight"),
    (W[:, ::-1], "permuted-weight"), (W + np.float32(0.5), "shifted-weight"), (W * 0, "constant-weight"),
    (np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32), "unrelated-weight"),
    (W * (1 + 1e-3 * W), "changed-weight"), (np.roll(W, 1, 0), "permuted-weight"),
])
def test_the_relation_between_two_arrays(held, kind):
    assert difference(W, np.ascontiguousarray(held), tuple, 2).kind == kind


FUSED = np.random.default_rng(7).standard_normal((24, 8)).astype(np.float32)
PARTS = FUSED.reshape(2, 3, 4, 8)
"""q, k and v of two heads, four rows each."""


@pytest.mark.parametrize("held,told", [
    (np.stack([PARTS[:, part] for part in range(3)]), "holds all of q, then k, then v, and not head by head"),
    (PARTS[:, [2, 0, 1]], "holds v, q, k in each head, in this order"),
    (FUSED.reshape(3, 2, 4, 8).swapaxes(0, 1), "holds q, k and v head by head, and not one behind the other"),
    (FUSED.reshape(3, 8, 8)[[1, 0, 2]], "holds k, q, v, in this order"),
])
def test_a_fused_matrix_is_told_by_its_layout(held, told):
    found = difference(FUSED, held.reshape(24, 8), tuple, 2)
    assert (found.kind, found.told) == ("qkv-order", told)


def test_rows_of_a_matrix_that_is_not_fused_are_permuted_ones():
    """16 rows for 8 columns are no q, k and v."""
    held = FUSED[:16].reshape(2, 2, 4, 8).swapaxes(0, 1).reshape(16, 8)
    assert difference(FUSED[:16], held, tuple, 2).kind == "permuted-weight"


def test_the_catalogue_is_data_and_shares_nothing_with_the_nets():
    import inspect

    from align.explanations import operations, place, surgery
    assert len(operations.CATALOGUE) >= 20
    assert all(idea.about for idea in operations.CATALOGUE)
    assert len(set(operations.CATALOGUE)) == len(operations.CATALOGUE)
    files = {file.stem for file in Path(operations.__file__).parent.glob("*.py")}
    assert files == {module.__name__.rpartition(".")[2] for module in operations.MODULES} | {
        "__init__", "attention", "variant"}
    for module in (*operations.MODULES, operations, place, surgery, explanations):
        assert "import paddle" not in inspect.getsource(module) and "models." not in inspect.getsource(module)


def test_a_linear_that_is_recorded_by_itself_is_no_attention():
    """Its path below the place is empty, as is what most families call fused."""
    from align.explanations.operations.attention import attentions
    from align.explanations.place import Layer
    from convert.traits import Traits
    linear = torch.nn.Linear(6, 6)
    alone = Layer("", "opt.embeddings.project_in", linear, {"weight": "weight"})
    assert attentions(SimpleNamespace(linears=[alone], traits=Traits(), root=linear)) == []
