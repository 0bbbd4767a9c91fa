"""The engine that moves bytes: flows in every order, tiles of every shape, digests, casts; with tiny constants."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save_file

from convert import stream
from convert.checkpoint import Checkpoint, Matrix, TensorInfo, cut, open_checkpoint
from convert.dtypes import BY_NAME, cast, has_nonfinite
from convert.plan import Move, Plan
from convert.rules import Filling, Head, Rule, causal_mask, constant, zeros
from convert.stream import Buffers, carry_out, chunks_of, flow, made, run_all, tiling, together
from convert.verify import NotBitExact, verify
from convert.writer import Staging, make_layout

UINTS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}
SIZES = st.integers(0, 21)
CONSTANTS = st.fixed_dictionaries({
    "TILES": st.tuples(st.integers(1, 700), st.integers(1, 700)), "CHUNK": st.integers(1, 300),
    "BREAK": st.integers(1, 90), "GAP": st.integers(0, 60),
    "PANEL": st.integers(1, 40), "SHEET": st.integers(1, 300), "NEAR": st.integers(1, 60),
    "GRAIN": st.integers(1, 20), "LEAST": st.integers(1, 300)})
FLOATS = ["float64", "float32", "float16", "bfloat16"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A path with an open handle, written anew for each example."""
    path = tmp_path_factory.mktemp("engine") / "data"
    handle = os.open(path, os.O_CREAT | os.O_RDWR)
    yield path, handle
    os.close(handle)


def numbered(size, dtype):
    """Elements that differ from their neighbours wherever the dtype allows, and from zero."""
    return (np.arange(1, size + 1) * 2654435761 % (1 << 8 * dtype.size)).astype(UINTS[dtype.size]).view(dtype.storage)


def lying(file, dtype, rows, columns, pitch, step, gap=3):
    """A matrix in ``file`` and, as numpy has it, what it holds."""
    path, handle = file
    reach = 1 + max(0, rows - 1) * pitch + max(0, columns - 1) * step
    pool = numbered(gap + reach, dtype)
    os.truncate(handle, 0)
    os.pwrite(handle, pool.tobytes(), 0)
    expected = np.lib.stride_tricks.as_strided(pool[gap:], (rows, columns), (pitch * dtype.size, step * dtype.size))
    return Matrix(path, handle, gap * dtype.size, dtype, rows, columns, pitch, step), expected.copy()


@contextmanager
def with_constants(constants):
    """Also where hypothesis leaves an example in the middle of it: tests behind would crawl through tiny tiles."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(stream, name, value)
        yield


def gathered(pieces, size, dtype):
    """The flow's elements, each of them seen exactly once, in their places."""
    found, seen = np.zeros(size, dtype.storage), np.zeros(size, int)
    for start, piece in pieces:
        assert piece.ndim == 1 and piece.flags.c_contiguous and 0 < piece.nbytes <= max(stream.CHUNK, dtype.size)
        found[start: start + len(piece)] = piece
        seen[start: start + len(piece)] += 1
    assert (seen == 1).all()
    return found


# --- flows


@settings(max_examples=200, deadline=None)
@given(rows=SIZES, columns=SIZES, dtype=st.sampled_from(list(BY_NAME.values())), constants=CONSTANTS,
       transpose=st.booleans(), extra=st.integers(0, 3), step=st.integers(0, 3), turned=st.booleans(),
       out_of_order=st.booleans())
def test_any_matrix_flows_in_the_order_of_its_rows(file, rows, columns, dtype, constants, transpose, extra, step,
                                                   turned, out_of_order):
    shape = (columns, rows) if turned else (rows, columns)
    pitch = max(0, shape[1] * step + extra - 1)
    strides = (step, pitch) if turned else (pitch, step)
    matrix, expected = lying(file, dtype, rows, columns, *strides)
    wanted, right = (matrix.T, expected.T) if transpose else (matrix, expected)
    with with_constants(constants):
        cost = stream.BREAK if out_of_order else stream.IN_ORDER
        found = gathered(flow(wanted, Buffers(), break_cost=cost), rows * columns, dtype)
        if not out_of_order:
            starts = [start for start, _ in flow(wanted, Buffers())]
            assert starts == sorted(starts)
    assert found.tobytes() == right.tobytes()


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), constants=CONSTANTS, transpose=st.booleans())
def test_every_element_is_seen_once_and_in_the_order_of_the_file_where_it_says_so(file, rows, columns, constants,
                                                                                   transpose):
    matrix, expected = lying(file, BY_NAME["float16"], rows, columns, columns, 1)
    seen = []
    with with_constants(constants):
        for _ in flow(matrix.T if transpose else matrix, Buffers(), break_cost=stream.BREAK,
                      seen=lambda start, some: seen.append((start, some.copy()))):
            pass
    everything = np.concatenate([some for _, some in seen]).view("u2")
    assert np.array_equal(np.sort(everything), np.sort(expected.view("u2"), axis=None))
    numbered_ones = [(start, some) for start, some in seen if start is not None]
    for start, some in numbered_ones:
        assert some.tobytes() == expected.reshape(-1)[start: start + len(some)].tobytes()
    if len(numbered_ones) == len(seen):
        assert everything.tobytes() == expected.tobytes()


@pytest.mark.parametrize("rows, columns", [(2, 400_000), (64, 20_000), (300, 4000), (5000, 300)])
def test_what_is_turned_comes_in_pieces_of_half_a_mebibyte(file, rows, columns):
    """Each piece is hashed, checked and written by itself, and short ones are all overhead."""
    matrix, expected = lying(file, BY_NAME["float16"], rows, columns, columns, 1)
    pieces = [some.nbytes for _, some in flow(matrix.T, Buffers(), break_cost=stream.BREAK)]
    assert len(pieces) <= 2 + 2 * expected.nbytes // stream.CHUNK


@given(rows=st.integers(1, 10**6), columns=st.integers(1, 10**6), size=st.sampled_from([1, 2, 4, 8]))
def test_tiles_cover_the_matrix_and_fit(rows, columns, size):
    for cost, tile in product((stream.BREAK, stream.IN_ORDER), stream.TILES):
        high, wide = tiling(rows, columns, size, cost, tile)
        assert 1 <= high <= rows and 1 <= wide <= columns
        assert high * wide * size <= tile
        assert wide * size <= stream.CHUNK
        assert high == rows or wide == 1 or cost == stream.BREAK


@pytest.mark.parametrize("rows,columns,size,tile,small", [
    (4096, 4096, 2, (4096, 4096), (4096, 4096)), (4096, 4096, 4, (4096, 2048), (4096, 2048)),
    (16384, 4096, 2, (16384, 1366), (16384, 1024)), (4096, 16384, 2, (4096, 5462), (4096, 4096)),
    (50400, 4096, 2, (10080, 2048), (10080, 1366))])
def test_tiles_of_gptj(rows, columns, size, tile, small):
    """Whole rows of the target, but for its head, of which few fill a tile."""
    assert tuple(tiling(rows, columns, size, stream.BREAK, nbytes) for nbytes in stream.TILES) == (tile, small)


@given(st.integers(-5, 50), st.integers(0, 60), st.integers(-1, 9))
def test_pieces_of_a_range(start, length, size):
    whole = range(start, start + length)
    pieces = list(cut(whole, size))
    assert [number for piece in pieces for number in piece] == list(whole)
    assert {len(piece) for piece in pieces[:-1]} <= {max(1, size)}


@given(st.lists(st.integers(1, 9)), st.lists(st.integers(1, 9)))
def test_two_flows_side_by_side(left, right):
    def flowing(lengths):
        start = 0
        for length in lengths:
            yield start, np.arange(start, start + length)
            start += length
    pairs = together(flowing(left), flowing(right))
    if sum(left) == sum(right):
        pairs = list(pairs)
        assert all(np.array_equal(one, other) for one, other in pairs)
        assert [number for one, _ in pairs for number in one] == list(range(sum(left)))
    else:
        with pytest.raises(ValueError, match="ended before"):
            list(pairs)


def test_memory_is_used_again():
    buffers = Buffers()
    with buffers.borrow(100) as first, buffers.borrow(100) as second:
        assert first is not second and first.nbytes == 100
    with buffers.borrow(100) as again, buffers.borrow(60) as smaller:
        assert (again is first or again is second) and smaller.nbytes == 60


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0), (2, 0, 1)])
def test_permuted_axes(order, tmp_path):
    values = torch.arange(2 * 3 * 5, dtype=torch.float32).reshape(2, 3, 5)
    permuted = values.permute(order).contiguous().permute(np.argsort(order).tolist())
    torch.save({"permuted": permuted, "with ones": permuted[:, None, :, None]}, tmp_path / "some.bin")
    with open_checkpoint(tmp_path / "some.bin") as checkpoint:
        for name in checkpoint.tensors:
            assert np.concatenate(list(chunks_of(checkpoint, name))).tobytes() == values.numpy().tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (1, 7), (7, 1), (0, 7), (7, 0), (2, 3, 5), (1, 1, 4, 4)])
def test_a_tensor_of_any_dimensions_is_a_matrix(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 16)
    values = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    save_file({"it": values}, tmp_path / "some.safetensors")
    with open_checkpoint(tmp_path / "some.safetensors") as checkpoint:
        assert b"".join(chunk.tobytes() for chunk in chunks_of(checkpoint, "it")) == values.numpy().tobytes()


# --- tensors that are made


@settings(deadline=None)
@given(filling=st.sampled_from([causal_mask(), zeros(), constant(-1e9)]), length=st.integers(1, 12),
       chunk=st.integers(1, 300), dimensions=st.sampled_from([2, 4]))
def test_what_is_made_in_pieces_is_what_is_made_whole(filling, length, chunk, dimensions):
    shape = (1,) * (dimensions - 2) + (length, length)
    rule = Rule("buffer", (("it",),), ("it",), shape, otherwise=filling)
    move = Move("it", rule, (), filling, shape, BY_NAME["float32"], shape, BY_NAME["float16"])
    with with_constants({"CHUNK": chunk}):
        pieces = list(made(move.filling, move.shape, move.dtype))
    by_name = {"causal mask": np.tril(np.ones(shape[-2:])), "zeros": np.zeros(shape)}
    whole = by_name.get(filling.name, np.full(shape, -1e9))
    with np.errstate(over="ignore"):
        assert np.array_equal(np.concatenate([piece for _, piece in pieces]), whole.reshape(-1).astype(np.float16))
    assert np.array_equal(filling.make(shape), whole.reshape(shape)) and filling.make(shape).dtype == np.float32


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0)])
def test_fillings_of_every_shape(shape):
    assert np.array_equal(constant(2.5).make(shape), np.full(shape, 2.5)) and zeros().make(shape).shape == shape


# --- whole conversions


def linear(name, shape, dtype, target):
    rule = Rule("linear", ((name,),), (name,), shape, transposed=True)
    return Move(name, rule, (name,), None, shape, BY_NAME[dtype], shape[::-1], BY_NAME[target])


def kept(name, shape, dtype, target):
    rule = Rule("keep", ((name,),), (name,), shape)
    return Move(name, rule, (name,), None, shape, BY_NAME[dtype], shape, BY_NAME[target])


def filled(name, shape, filling, dtype):
    float32 = BY_NAME["float32"]
    return Move(name, Rule("buffer", ((name,),), (name,), shape, otherwise=filling), (), filling, shape, float32, shape,
                BY_NAME[dtype])


def plan_of(moves):
    return Plan(None, Head("Some", "Some", "encoder"), None, {}, tuple(moves), (), (), {})


def converted(moves, source, output, file_format="safetensors", shard_size=1 << 40):
    """Carry out ``moves``, verify them, and return what the target holds and both sides' digests."""
    plan, told = plan_of(moves), []
    layout = make_layout(plan.moves, file_format, shard_size)
    with open_checkpoint(source) as checkpoint, Staging(output) as staging:
        staging.allocate(layout)
        digests = carry_out(plan, checkpoint, layout, staging, advance=told.append)
        assert sum(told) == plan.nbytes
        verify(plan, checkpoint, staging.path)
        with open_checkpoint(staging.path) as held:
            return {name: held.read(name) for name in held.tensors}, digests


@pytest.mark.parametrize("file_format", ["safetensors", "pdparams"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", FLOATS)
def test_every_cast_in_every_orientation_is_torchs(stored, target, file_format, tmp_path, monkeypatch):
    for name, value in {"TILES": (640, 320), "CHUNK": 64, "BREAK": 24, "PANEL": 8, "SHEET": 100}.items():
        monkeypatch.setattr(stream, name, value)
    torch.manual_seed(0)
    shapes = {"tall": (37, 5), "wide": (5, 37), "square": (16, 16), "row": (1, 9), "column": (9, 1), "one": (1, 1)}
    source = {name: torch.randn(shape).mul(30).to(getattr(torch, stored)) for name, shape in shapes.items()}
    source |= {"vector": source["tall"][:, 0].clone(), "scalar": source["one"][0, 0].clone(),
               "kept": source["tall"].clone(), "across": source["wide"].t().contiguous().t()}
    torch.save(source, tmp_path / "some.bin")
    moves = [linear(name, shape, stored, target) for name, shape in shapes.items()]
    moves += [kept(name, tuple(source[name].shape), stored, target) for name in ("vector", "scalar", "kept")]
    moves += [linear("across", (5, 37), stored, target)]
    held, digests = converted(moves, tmp_path / "some.bin", tmp_path / "out", file_format)
    for move in moves:
        value = source[move.source]
        right = bits(value.t() if move.transposed else value, target)
        assert held[move.target].tobytes() == right
        assert digests.target[move.target] == xxhash.xxh3_128(right).hexdigest()
        assert digests.source[move.source] == xxhash.xxh3_128(bits(value, stored)).hexdigest()


@pytest.mark.parametrize("shape,times", [((40, 24), 1), ((24, 40), 1), ((40, 100), 2)])
def test_a_matrix_is_read_once_for_each_tile_and_never_for_its_digest(shape, times, tmp_path, monkeypatch):
    """The third does not fit into a tile, and what its second tile leaves out of a row is less than a call."""
    for name, value in {"TILES": (2 * 40 * 60, 8), "CHUNK": 256, "PANEL": 16}.items():
        monkeypatch.setattr(stream, name, value)
    values = torch.arange(shape[0] * shape[1], dtype=torch.int16).reshape(shape).view(torch.float16).nan_to_num(0, 0, 0)
    save_file({"it": values}, tmp_path / "some.safetensors")
    read, elements = Matrix.read, []

    def counted(matrix, rows, columns, out):
        elements.append(out.size)
        read(matrix, rows, columns, out)
    monkeypatch.setattr(Matrix, "read", counted)
    plan = plan_of([linear("it", shape, "float16", "float16")])
    layout = make_layout(plan.moves, "safetensors", 1 << 40)
    with open_checkpoint(tmp_path / "some.safetensors") as checkpoint, Staging(tmp_path / "out") as staging:
        staging.allocate(layout)
        digests = carry_out(plan, checkpoint, layout, staging)
    assert sum(elements) == times * values.numel()
    assert digests.source["it"] == xxhash.xxh3_128(values.numpy().tobytes()).hexdigest()


def bits(tensor, dtype):
    """As the file has them, cast by torch."""
    number = {"float64": torch.int64, "float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}[dtype]
    return tensor.to(getattr(torch, dtype)).contiguous().view(number).numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tensors_with_any_constants(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("any")
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=5))
    turned = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    across = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = {f"t{number}": torch.from_numpy(generator.standard_normal(shape).astype("f4"))
              for number, shape in enumerate(shapes)}
    torch.save({name: value.t().contiguous().t() if lie else value
                for (name, value), lie in zip(values.items(), across, strict=True)}, directory / "some.bin")
    target = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    moves = [(linear if turn else kept)(name, tuple(value.shape), "float32", target)
             for (name, value), turn in zip(values.items(), turned, strict=True)]
    moves += [filled(f"mask{number}", (1, 1, 7, 7), causal_mask_of_tests, "float32") for number in range(3)]
    with with_constants(data.draw(CONSTANTS)):
        held, digests = converted(moves, directory / "some.bin", directory / "out",
                                  shard_size=data.draw(st.sampled_from([1, 500, 1 << 40])))
    for move in moves:
        whole = values[move.source] if move.sources else torch.ones(1, 1, 7, 7).tril()
        right = bits(whole.t() if move.transposed else whole, move.dtype.name)
        assert held[move.target].tobytes() == right
        assert digests.target[move.target] == xxhash.xxh3_128(right).hexdigest()
    assert digests.source == {name: xxhash.xxh3_128(value.numpy().tobytes()).hexdigest()
                              for name, value in values.items()}


causal_mask_of_tests = causal_mask()


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_reading_back_sees_every_single_bit(shape, tmp_path, monkeypatch):
    """Whatever one bit of the result is turned, in any tile, panel or sheet: it is found."""
    for name, value in {"TILES": (48, 24), "CHUNK": 8, "PANEL": 4, "SHEET": 12, "NEAR": 8}.items():
        monkeypatch.setattr(stream, name, value)
    values = np.arange(48, dtype=np.float16).reshape(shape)
    save_file({"it": torch.from_numpy(values)}, tmp_path / "some.safetensors")
    plan = plan_of([linear("it", shape, "float16", "float16")])
    layout = make_layout(plan.moves, "safetensors", 1 << 40)
    with open_checkpoint(tmp_path / "some.safetensors") as checkpoint, Staging(tmp_path / "out") as staging:
        staging.allocate(layout)
        carry_out(plan, checkpoint, layout, staging)
        path, offset = staging.path / layout.places["it"][0], layout.places["it"][1]
        clean = path.read_bytes()
        for bit in range(8 * values.nbytes):
            changed = bytearray(clean)
            changed[offset + bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(NotBitExact, match="it read back is not it, bit for bit"):
                verify(plan, checkpoint, staging.path)
        path.write_bytes(clean)
        verify(plan, checkpoint, staging.path)


def test_a_square_matrix_that_was_not_transposed_is_found(tmp_path):
    """The fault that no shape shows: what is written is the source as it lies."""
    values = np.arange(256, dtype=np.float32).reshape(16, 16)
    save_file({"it": torch.from_numpy(values)}, tmp_path / "some.safetensors")
    promised, wrong = linear("it", (16, 16), "float32", "float32"), kept("it", (16, 16), "float32", "float32")
    layout = make_layout([promised], "safetensors", 1 << 40)
    with open_checkpoint(tmp_path / "some.safetensors") as checkpoint, Staging(tmp_path / "out") as staging:
        staging.allocate(layout)
        carry_out(plan_of([wrong]), checkpoint, layout, staging)
        assert load_file(staging.path / "model.safetensors")["it"].tobytes() == values.tobytes()
        with pytest.raises(NotBitExact, match="bit for bit"):
            verify(plan_of([promised]), checkpoint, staging.path)


def test_masks_of_all_layers_are_made_once(tmp_path, monkeypatch):
    mask, calls = causal_mask(), []
    counting = Filling("counted", lambda shape, rows: calls.append(rows) or mask.rows(shape, rows))
    save_file({"it": torch.zeros(2, 2)}, tmp_path / "some.safetensors")
    moves = [filled(f"h.{layer}", (1, 1, 9, 9), counting, "float32") for layer in range(5)]
    plan, layout = plan_of(moves), make_layout(moves, "safetensors", 1 << 40)
    monkeypatch.setattr(stream, "CHUNK", 72)
    with open_checkpoint(tmp_path / "some.safetensors") as checkpoint, Staging(tmp_path / "out") as staging:
        staging.allocate(layout)
        digests = carry_out(plan, checkpoint, layout, staging)
        assert [row for rows in calls for row in rows] == list(range(9)) and max(map(len, calls)) == 2
        held = load_file(staging.path / "model.safetensors")
    assert len(set(digests.target.values())) == 1
    assert all(np.array_equal(array, np.tril(np.ones((1, 1, 9, 9)))) for array in held.values())


# --- NaN and inf, threads


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_pattern_of_an_exponent(dtype):
    dtype = BY_NAME[dtype]
    tops = np.arange(1 << 16, dtype=np.uint64) << np.uint64(8 * dtype.size - 16)
    for low in (0, 1) if dtype.size > 2 else (0,):
        patterns = (tops + np.uint64(low)).astype(UINTS[dtype.size])
        right = patterns & np.array(dtype.exponent, patterns.dtype) == dtype.exponent
        assert not has_nonfinite(patterns[~right].view(dtype.storage), dtype)
        for pattern in patterns[right][:: 1 if dtype.size == 2 else 7]:
            assert has_nonfinite(np.array([0, pattern, 1], patterns.dtype).view(dtype.storage), dtype)


def test_what_is_no_float_is_finite():
    for dtype in BY_NAME.values():
        if not dtype.floating:
            assert not has_nonfinite(np.full(3, 255, "u1").astype(dtype.storage), dtype)
        assert not has_nonfinite(np.empty(0, dtype.storage), dtype)


def test_widening_float16_is_torchs_on_every_bit_pattern():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    found = cast(every, BY_NAME["float16"], BY_NAME["float32"])
    right = torch.from_numpy(every).float().numpy()
    ordinary = ~np.isnan(right)
    assert np.array_equal(found.view("u4")[ordinary], right.view("u4")[ordinary]) and np.isnan(found[~ordinary]).all()


def test_the_first_failure_stops_the_others():
    stop, began = threading.Event(), threading.Event()

    def failing(buffers):
        began.wait()
        raise KeyError("this one")

    def waiting(buffers):
        began.set()
        assert stop.wait(20)
    with pytest.raises(KeyError, match="this one"):
        run_all([failing, *[lambda buffers: pytest.fail("started after the failure")] * 20, waiting], stop)


def test_a_source_that_shrinks_while_it_is_read_is_told(file):
    from convert.errors import BadInput
    matrix, _ = lying(file, BY_NAME["float32"], 8, 8, 8, 1)
    for shorter in (matrix, matrix.T, replace(matrix, columns=4), replace(matrix, columns=4, step=2)):
        os.truncate(file[1], 100)
        with pytest.raises(BadInput, match="ended while it was read"):
            list(flow(shorter, Buffers()))


def test_a_checkpoint_still_reads_rows_and_elements(tmp_path):
    """What align and models stand on."""
    values = torch.arange(12.0).reshape(4, 3)
    save_file({"it": values}, tmp_path / "some.safetensors")
    with open_checkpoint(tmp_path / "some.safetensors") as checkpoint:
        assert isinstance(checkpoint, Checkpoint) and isinstance(checkpoint.tensors["it"], TensorInfo)
        assert np.array_equal(checkpoint.read("it"), values)
        assert np.array_equal(checkpoint.read_rows("it", 1, 3), values[1:3])
        assert np.array_equal(checkpoint.read_elements("it", 2, 7), values.reshape(-1)[2:7])


@pytest.mark.parametrize("flag", ["--help", "--rules"])
def test_what_only_prints_imports_nothing_heavy(flag):
    program = """
import sys
from convert.cli import main
from convert.gptj import FAMILY
try:
    main(FAMILY, sys.argv[1:])
finally:
    print(sorted({"numpy", "torch", "paddle", "transformers", "xxhash", "huggingface_hub"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", program, flag], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
