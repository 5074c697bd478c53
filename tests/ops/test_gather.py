import pytest
import torch

from fastwm import ops
from fastwm.ops._backend import raw

TYPES = [torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.int32, torch.int64]


def ring(envs, length, shape, dtype):
    values = torch.randint(256, (envs, length, *shape))
    return values % 2 == 0 if dtype == torch.bool else values.to(dtype)


def ids_of(batch, envs):
    return torch.stack([torch.randint(envs, (batch,)), torch.randint(1, 10**12, (batch,))], -1)


def by_hand(ring, ids, offset, rows):
    length = ring.shape[1]
    out = [[ring[env, (row + offset + t) % length] for t in range(rows)] for env, row in ids]
    return torch.stack([torch.stack(window) for window in out])


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# Records of 1, 3, 4, 16, 48 and more bytes than the 16 kB of a block; windows wrap.
SHAPES = [(), (3,), (4,), (16,), (4, 4, 3), (0,), (47, 47, 3), (64, 64, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matches_reference(variant, dtype, shape):
    envs, length, batch = 3, 7, 4
    rings = [ring(envs, length, shape, dtype), ring(envs, length, (), torch.float32)]
    ids = ids_of(batch, envs)
    for offsets, rows in (((0, -1), (1, 7)), ((-1, 5), (7, 3)), ((-9, 30), (2, 2))):
        args = (rings, ids, offsets, rows)
        same(ops.gather_windows(*args), ops.gather_windows_ref(*args))
        if 0 not in shape:
            same(ops.gather_windows(*args)[:1], [by_hand(rings[0], ids, offsets[0], rows[0])])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_as_numbers_between_0_and_1(variant, shape, dtype):
    rings = [ring(2, 9, shape, torch.uint8), ring(2, 9, (5,), torch.uint8)]
    args = (rings, ids_of(3, 2), (0, -1), (9, 2))
    (image, as_stored) = ops.gather_windows(*args, dtypes=(dtype, None))
    stored = ops.gather_windows_ref(*args)
    assert torch.equal(image, (stored[0].float() / 255).to(dtype)) and image.dtype == dtype
    same([as_stored], stored[1:])


def test_every_byte_is_rounded_as_by_torch(variant):
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 2, 128)
    ids = torch.tensor([[0, 0]])
    for dtype in (torch.float32, torch.bfloat16):
        (out,) = ops.gather_windows([every], ids, [0], [2], [dtype])
        assert torch.equal(out, (every.float() / 255).to(dtype))


def test_more_rings_than_a_launch_takes(variant):
    rings = [ring(2, 5, (k % 4,), torch.uint8) for k in range(70)]
    args = (rings, ids_of(3, 2), list(range(70)), [1 + k % 5 for k in range(70)])
    same(ops.gather_windows(*args), ops.gather_windows_ref(*args))


def test_rings_that_begin_anywhere(variant):
    """Rows of 16 bytes at an odd address: no wide load may touch them."""
    for start in (1, 4, 8):
        memory = torch.randint(256, (start + 2 * 5 * 16,), dtype=torch.uint8)
        odd = memory[start:].view(2, 5, 16)
        args = ([odd], ids_of(6, 2), [0], [4])
        for dtypes in (None, [torch.float32]):
            same(ops.gather_windows(*args, dtypes), ops.gather_windows_ref(*args, dtypes))


def test_no_windows_and_any_stride_of_ids(variant):
    rings = [ring(2, 5, (3,), torch.float32)]
    (none,) = ops.gather_windows(rings, torch.zeros(0, 2, dtype=torch.int64), [0], [3])
    assert none.shape == (0, 3, 3)
    ids = ids_of(4, 2).t().contiguous().t()
    same(ops.gather_windows(rings, ids, [0], [3]), ops.gather_windows_ref(rings, ids, [0], [3]))


def test_results_carry_no_gradient(variant):
    leaf = torch.randn(2, 5, requires_grad=True)
    (out,) = ops.gather_windows([leaf], ids_of(3, 2), [0], [3])
    assert not out.requires_grad


def test_rows_before_the_first_count_from_the_end(variant):
    rings, ids = [torch.arange(10).view(2, 5)], torch.tensor([[1, 0], [0, -7]])
    (out,) = ops.gather_windows(rings, ids, [-1], [2])
    assert out.tolist() == [[9, 5], [2, 3]]


@pytest.mark.parametrize("env", [-1, 2, 2**40, -(2**62)])
def test_an_env_that_is_not_there(variant, env):
    """On a GPU nobody can say so without waiting: the nearest env is read, never other memory."""
    rings, ids = [torch.arange(10).view(2, 5)], torch.tensor([[env, 3]])
    if variant == "cuda":
        (out,) = ops.gather_windows(rings, ids, [0], [1])
        assert out.tolist() == [[3 if env < 0 else 8]]
        return
    with pytest.raises((RuntimeError, IndexError)):
        ops.gather_windows(rings, ids, [0], [1])


@pytest.mark.skipif(not ops.available("cpu"), reason="no compiled kernels")
def test_opcheck():
    rings = [ring(2, 5, (3,), torch.uint8), ring(2, 5, (), torch.bool)]
    args = (rings, ids_of(4, 2), [0, -1], [3, 5], [2, 0])
    torch.library.opcheck(raw.gather_windows.default, args)


def test_fullgraph_compile(variant):
    torch._dynamo.reset()
    compiled = torch.compile(ops.gather_windows, fullgraph=True, backend="aot_eager")
    rings = [ring(2, 5, (3,), torch.uint8), ring(2, 5, (), torch.float32)]
    args = (rings, ids_of(4, 2), [0, -1], [3, 5], [torch.float32, None])
    same(compiled(*args), ops.gather_windows_ref(*args))


def test_bad_input_messages(variant):
    rings, ids = [torch.zeros(2, 5, 3), torch.zeros(2, 5)], ids_of(4, 2)

    def call(rings=rings, ids=ids, offsets=(0, 0), rows=(2, 2), dtypes=None):
        return ops.gather_windows(rings, ids, offsets, rows, dtypes)

    for settings, error, message in [
        ({"offsets": (0,)}, ValueError, "one entry of offsets, rows and dtypes for each of 2"),
        ({"ids": ids[:, :1]}, ValueError, r"expected ids of shape \(B, 2\) = \(4, 2\), got \(4, 1"),
        ({"ids": ids.int()}, TypeError, "expected ids of dtype int64, got int32"),
        ({"rings": [rings[0], torch.zeros(2, 4)]}, ValueError, r"rings\[1\] of shape \(N, L"),
        ({"rings": [rings[0][..., :2], rings[1]]}, ValueError, r"rings\[0\] contiguous, got str"),
        ({"rings": [rings[0].to("meta"), rings[1]]}, TypeError, r"expected rings\[0\] on cpu"),
        ({"rows": (2, 6)}, ValueError, r"expected rows\[1\] in \[1, L = 5\], got 6"),
        ({"rows": (0, 2)}, ValueError, r"expected rows\[0\] in \[1, L = 5\], got 0"),
        ({"dtypes": (torch.float16, None)}, TypeError, r"dtypes\[0\] None, float32 or bfloat16"),
        ({"dtypes": (torch.float32, None)}, TypeError, r"rings\[0\] of dtype uint8, got float32"),
    ]:
        with pytest.raises(error, match=message):
            call(**settings)
