"""What is written: both formats, shards, dtypes as torch casts them, and the files that come along."""

import json

import numpy as np
import paddle
import paddlenlp.transformers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models
from convert.dtypes import BY_NAME, cast
from convert.writer import parse_size

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BUFFERS = ("attn.bias", "attn.masked_bias")


def bits(tensor):
    return tensor.contiguous().view(SIGNED[tensor.element_size()]).numpy()


def transposed(name, value):
    return value.t() if value.ndim == 2 and name != "transformer.wte.weight" else value


@pytest.fixture
def source(torch_model, tmp_path):
    """A GPT-J in some dtype: its directory and its state dict."""
    def make(dtype="float32"):
        model = torch_model("GPTJForCausalLM").to(DTYPES[dtype])
        model.save_pretrained(tmp_path / dtype)
        return tmp_path / dtype, model.state_dict()
    return make


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", ["keep", *DTYPES])
@pytest.mark.parametrize("file_format", ["safetensors", "pdparams"])
def test_dtype_is_torchs_cast(stored, wanted, file_format, source, convert):
    directory, state = source(stored)
    run = convert(directory, "--dtype", wanted, "--format", file_format)
    assert run.code == 0, run.stderr
    target = DTYPES[stored if wanted == "keep" else wanted]
    if file_format == "safetensors":
        held = load_file(run.output / "model.safetensors")
    else:
        loaded = paddle.load(str(run.output / "model_state.pdparams"), return_numpy=True)
        held = {name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == np.uint16
                else torch.from_numpy(array) for name, array in loaded.items()}
    for name, value in state.items():
        assert held[name].dtype == target
        assert np.array_equal(bits(held[name]), bits(transposed(name, value.to(target)))), name
    assert {held[name].dtype for name in held if name.endswith(BUFFERS)} == {torch.float32}
    assert {row["dtype"] for row in run.report["tensors"] if row["target"].endswith(BUFFERS)} == {"float32"}
    assert {row["dtype"] for row in run.report["tensors"] if row["source"]} == {str(target).removeprefix("torch.")}


def test_paddle_reads_bfloat16_as_bfloat16(source, convert):
    directory, state = source("bfloat16")
    run = convert(directory, "--format", "pdparams")
    held = paddle.load(str(run.output / "model_state.pdparams"))
    assert held["lm_head.weight"].dtype == paddle.bfloat16
    expected = state["lm_head.weight"].float().t().numpy()
    assert np.array_equal(held["lm_head.weight"].astype("float32").numpy(), expected)


@pytest.mark.parametrize("stored,wanted", [("float16", "float32"), ("float16", "bfloat16"), ("bfloat16", "float32"),
                                           ("bfloat16", "float16")])
def test_all_65536_patterns_of_a_half_go_through_a_file(stored, wanted, checkpoint, convert):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(DTYPES[stored]).view(4096, 16)
    directory = checkpoint(vocab_size=4096)
    state = load_file(directory / "model.safetensors") | {"transformer.wte.weight": every}
    save_file(state, directory / "model.safetensors")
    run = convert(directory, "--dtype", wanted, "--allow-nonfinite")
    assert run.code == 0, run.stderr
    held = load_file(run.output / "model.safetensors")["transformer.wte.weight"]
    same_but_for_the_payload_of_nan(bits(held), bits(every.to(DTYPES[wanted])), wanted)


def same_but_for_the_payload_of_nan(found, expected, dtype):
    """Torch's scalar and vector code disagree over the payload: 0x7FC0 and 0xFFFF are both its bfloat16 NaN."""
    nan = torch.isnan(torch.from_numpy(expected).view(DTYPES[dtype])).numpy()
    assert np.array_equal(torch.isnan(torch.from_numpy(found).view(DTYPES[dtype])).numpy(), nan)
    assert np.array_equal(found[~nan], expected[~nan])


def patterns(width):
    """Bit patterns of a float: any, and the borders where rounding, subnormals and overflow live."""
    float16_bits = st.integers(0, 2**16 - 1).map(lambda number: np.uint16(number).view(np.float16))
    between = float16_bits.filter(np.isfinite).map(
        lambda half: (np.float64(half) + np.float64(np.nextafter(half, np.float16(np.inf)))) / 2)
    halfway = between.map(lambda value: int(np.array(value, f"f{width}").view(f"u{width}")))
    nudged = st.tuples(halfway, st.integers(-1, 1)).map(lambda pair: (pair[0] + pair[1]) % 2 ** (8 * width))
    low = st.sampled_from([0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000])
    bfloat16_borders = st.tuples(st.integers(0, 2**15 - 1), low).map(lambda pair: (pair[0] << 16) + pair[1])
    return st.lists(st.one_of(st.integers(0, 2 ** (8 * width) - 1), nudged, bfloat16_borders), min_size=1, max_size=64)


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored,width", [("float64", 8), ("float32", 4)])
def test_casts_are_torchs_on_any_bit_pattern(stored, width, wanted):
    @settings(max_examples=150, deadline=None)
    @given(patterns(width))
    def check(numbers):
        array = np.array(numbers, f"u{width}").view(f"f{width}")
        found = cast(array, BY_NAME[stored], BY_NAME[wanted]).view(f"i{BY_NAME[wanted].size}")
        with np.errstate(all="ignore"):
            same_but_for_the_payload_of_nan(found, bits(torch.from_numpy(array).to(DTYPES[wanted])), wanted)
    check()


@pytest.mark.parametrize("file_format,stem", [("safetensors", "model"), ("pdparams", "model_state")])
def test_shards(file_format, stem, source, convert):
    directory, state = source()
    run = convert(directory, "--format", file_format, "--shard-size", "8KB")
    assert run.code == 0, run.stderr
    index = json.loads((run.output / f"{stem}.{file_format}.index.json").read_text())
    files = sorted(path.name for path in run.output.glob(f"{stem}-*"))
    assert files == [f"{stem}-{number:05d}-of-{len(files):05d}.{file_format}" for number in range(1, len(files) + 1)]
    assert len(files) > 2 and not (run.output / f"{stem}.{file_format}").exists()
    where = {}
    for name in files:
        if file_format == "safetensors":
            held = load_file(run.output / name)
        else:
            held = paddle.load(str(run.output / name), return_numpy=True)
        assert sum(value.nbytes for value in held.values()) <= 8000
        where |= dict.fromkeys(held, name)
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == run.report["bytes"] == sum(
        4 * value.numel() for value in state.values()) + 2 * 4 * (8 * 8 + 1)
    for net in (paddlenlp.transformers.GPTJForCausalLM.from_pretrained(str(run.output)),
                models.from_pretrained(run.output)):
        held = net.state_dict()
        for name, value in state.items():
            assert np.array_equal(held[name].numpy(), transposed(name, value).numpy()), name


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(source, convert):
    directory, state = source()
    run = convert(directory, "--shard-size", "1B")
    assert len(list(run.output.glob("*.safetensors"))) == len(state) + 4


def test_the_metadata_is_what_paddlenlp_accepts(source, convert):
    with safe_open(convert(source()[0]).output / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "np"}


@pytest.mark.parametrize("text,nbytes", [("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("1.5 kb", 1500), ("12", 12)])
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


def test_large_tensors_go_through_in_pieces(torch_model, tmp_path, convert, monkeypatch):
    """Tiles and chunks far smaller than a tensor."""
    monkeypatch.setattr("convert.stream.TILES", (4096, 2048))
    monkeypatch.setattr("convert.stream.CHUNK", 512)
    model = torch_model("GPTJForCausalLM", n_embd=24, n_inner=150, vocab_size=131, n_head=3)
    model.save_pretrained(tmp_path / "source")
    run = convert(tmp_path / "source")
    assert run.code == 0, run.stderr
    held = load_file(run.output / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(held[name], transposed(name, value)), name
    whole = convert(tmp_path / "source", "--dtype", "float16", output="out/half")
    for name, value in model.state_dict().items():
        assert torch.equal(load_file(whole.output / "model.safetensors")[name], transposed(name, value).half()), name


COMPANIONS = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model"]


def test_tokenizer_and_generation_config_come_along(source, convert):
    directory, _ = source()
    for name in [*COMPANIONS, "training_args.json", "flax_model.msgpack"]:
        (directory / name).write_text(name)
    run = convert(directory)
    assert {name: (run.output / name).read_text() for name in COMPANIONS} == {name: name for name in COMPANIONS}
    assert {path.name for path in run.output.iterdir()} == {
        *COMPANIONS, "config.json", "model.safetensors", "paddle_parity.json"}


def test_a_missing_tokenizer_is_no_error(source, convert):
    run = convert(source()[0])
    assert run.code == 0 and not list(run.output.glob("*vocab*"))


def test_gptj_gets_the_pad_token_that_paddlenlps_class_needs(checkpoint, convert):
    run = convert(checkpoint(pad_token_id=None))
    assert run.config["pad_token_id"] == 2
    assert any("pad_token_id = 2" in note for note in run.report["notes"])
    given = convert(checkpoint(pad_token_id=7), output="out/given")
    assert given.config["pad_token_id"] == 7 and given.report["notes"] == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_config_in_half_precision_says_float32_because_paddles_cpu_computes_in_it(dtype, source, convert):
    run = convert(source(dtype)[0])
    assert "torch_dtype" not in run.config and run.config["dtype"] == "float32"
    assert any(f'dtype="{dtype}"' in note for note in run.report["notes"])


def test_the_rest_of_the_config_is_the_sources(source, convert):
    directory, _ = source()
    before = json.loads((directory / "config.json").read_text())
    after = convert(directory).config
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"pad_token_id", "torch_dtype"}
