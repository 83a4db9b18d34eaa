"""Every backend of attention against softmax attention written out in float64: values, gradients, heads, lengths, documents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.common.errors import UserError
from model import attention_blocks
from model.attention import Documents, attend, attend_cached, choose

HEADS = [(4, 4), (4, 2), (6, 1)]  # query heads, key heads
LENGTHS = [1, 7, 64, 65, 131, 300]  # 300 tokens are several blocks


def written_out(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Softmax attention in the dtype of q, one key head of one sequence at a time."""
    length, kv_heads = k.shape[1:3]
    rows = []
    for b in range(q.shape[0]):
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        if documents is not None:
            hidden |= documents[b][:, None] != documents[b][None, :]
        outs = []
        for h, queries in enumerate(q[b].unflatten(1, (kv_heads, -1)).unbind(1)):  # (S, query heads of h, E)
            flat = queries.transpose(0, 1).flatten(0, 1)
            scores = (flat @ k[b, :, h].T / q.shape[3] ** 0.5).unflatten(0, (-1, length))
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outs.append((p.flatten(0, 1) @ v[b, :, h]).unflatten(0, (-1, length)).transpose(0, 1))
        rows.append(torch.cat(outs, 1))
    return torch.stack(rows)


def inputs(heads: tuple[int, int], length: int, batch: int = 2, dim: int = 8) -> list[Tensor]:
    """Return q, k, v and the gradient of the output, in float64 on values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(length)
    counts = (heads[0], heads[1], heads[1], heads[0])
    sizes = [(batch, length, count, dim) for count in counts]
    return [torch.randn(size, generator=generator).bfloat16().double() for size in sizes]


def documents_of(batch: int, length: int) -> Tensor:
    """Return document numbers (B, S) whose cuts differ from row to row."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.1
    return starts.cumsum(1)


def with_gradients(function, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the three gradients of `function` computed in `dtype`, in float64."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(grad.to(dtype))
    return [x.detach().double() for x in (out, *(leaf.grad for leaf in leaves))]


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, documents: Tensor | None = None) -> None:
    """In float64 equal but for rounding; blocks in fp32 and bf16 at most twice as far from it as attention written out is.

    How torch's own kernel rounds in fp32 and bf16 is torch's affair.
    """

    def backend_of(*qkv: Tensor) -> Tensor:
        return attend(*qkv, backend, None if documents is None else Documents(documents))

    def plain(*qkv: Tensor) -> Tensor:
        return written_out(*qkv, documents)

    exact = with_gradients(plain, q, k, v, grad, torch.float64)
    # A sum has a rounding a term; a score's own rounding is a relative error of its probability.
    largest_score = (q.norm(dim=-1).max() * k.norm(dim=-1).max() / q.shape[3] ** 0.5).item()
    roundings = 4 * (q.shape[1] + largest_score)
    for actual, expected in zip(with_gradients(backend_of, q, k, v, grad, torch.float64), exact, strict=True):
        bound = roundings * torch.finfo(torch.float64).eps * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound)
    for dtype in (torch.float32, torch.bfloat16) if backend == "blocks" else ():
        ours = with_gradients(backend_of, q, k, v, grad, dtype)
        theirs = with_gradients(plain, q, k, v, grad, dtype)
        for actual, other, expected, name in zip(ours, theirs, exact, ("out", "dq", "dk", "dv"), strict=True):
            # One rounding of the result on top: for one token, attention written out may have no error at all.
            bound = 2 * (other - expected).norm() + torch.finfo(dtype).eps / 2 * expected.norm()
            assert (actual - expected).norm() <= bound, (name, dtype)


@pytest.mark.parametrize("backend", ["blocks", "sdpa"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_attention(backend, heads, length):
    check(backend, *inputs(heads, length))


@pytest.mark.parametrize("backend", ["blocks", "sdpa"])
@pytest.mark.parametrize("heads", HEADS[:2], ids=str)
@pytest.mark.parametrize("length", [7, 65, 300])
def test_attention_within_documents(backend, heads, length):
    check(backend, *inputs(heads, length), documents=documents_of(2, length))


@pytest.mark.parametrize("keep", [0, 2**24], ids=["recomputed", "kept"])
@pytest.mark.parametrize("block", [1, 2**22], ids=["row by row", "whole batch"])
@pytest.mark.parametrize("masked", [False, True], ids=["one document", "documents"])
def test_blocks_of_any_size_give_the_same(monkeypatch, keep, block, masked):
    monkeypatch.setattr(attention_blocks, "_SAVED_ELEMENTS", keep)
    monkeypatch.setattr(attention_blocks, "_BLOCK_ELEMENTS", block)
    check("blocks", *inputs((4, 2), 131, batch=3), documents=documents_of(3, 131) if masked else None)


@pytest.mark.parametrize("backend", ["blocks", "sdpa"])
def test_large_scores(backend):
    q, k, v, grad = inputs((4, 2), 65, dim=16)  # scaled by 1/4, exactly: any rounding of a score would show here
    check(backend, q * 64, k * 64, v, grad)


@pytest.mark.parametrize("backend", ["blocks", "sdpa"])
def test_inputs_may_be_views(backend):
    """q, k and v are slices of one product in the decoder."""
    q, k, v, _ = inputs((4, 2), 37)
    packed = torch.cat((q, k, v), 2)
    actual = attend(*packed.split((4, 2, 2), 2), backend)
    assert torch.equal(actual, attend(q, k, v, backend))


@pytest.mark.parametrize("backend", ["blocks", "sdpa"])
def test_one_document_is_no_mask(backend):
    q, k, v, _ = inputs((4, 2), 65)
    one = attend(q, k, v, backend, Documents(torch.full((2, 65), 3)))
    torch.testing.assert_close(one, attend(q, k, v, backend), rtol=0, atol=65 * torch.finfo(torch.float64).eps * 8)


def test_the_newest_tokens_attend_to_all_before():
    q, k, v, _ = inputs((4, 2), 37)
    exact = written_out(q, k, v)
    for new in (1, 5, 37):
        actual = attend_cached(q[:, -new:], k, v)
        torch.testing.assert_close(actual, exact[:, -new:], rtol=0, atol=4 * 37 * torch.finfo(torch.float64).eps)


def test_blocks_refuse_shapes_that_do_not_fit():
    q, k, v, _ = inputs((4, 2), 7)
    for wrong in ((q, k[:, :5], v), (q, k, v[:, :5]), (q[:, :, :3], k, v), (q[..., :4], k, v)):
        with pytest.raises(ValueError, match="shapes do not match"):
            attend(*wrong, "blocks")
    with pytest.raises(ValueError, match="document_ids"):
        attend(q, k, v, "blocks", Documents(documents_of(2, 6)))


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_choice_on_a_cpu():
    assert choose("auto", CPU, torch.bfloat16, 8192).backend == "blocks"
    assert choose("auto", CPU, torch.float32, 512).backend == "blocks"
    assert choose("auto", CPU, torch.float32, 8192).backend == "sdpa"
    for named in ("sdpa", "blocks"):
        assert choose(named, CPU, torch.float32, 512) == choose(named, GPU, torch.bfloat16, 512) == (named, ())
    for named in ("flash", "flex"):
        with pytest.raises(UserError, match=f"model.attention={named} needs a GPU"):
            choose(named, CPU, torch.bfloat16, 512)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash, flex and SDPA's own kernels need a GPU")
@pytest.mark.parametrize("backend", ["sdpa", "flex", "flash"])
@pytest.mark.parametrize("masked", [False, True], ids=["one document", "documents"])
def test_attention_on_a_gpu(backend, masked):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    q, k, v, grad = inputs((4, 2), 300, dim=64)
    documents = documents_of(2, 300) if masked else None
    exact = with_gradients(lambda *qkv: written_out(*qkv, documents), q, k, v, grad, torch.float64)
    plain = with_gradients(lambda *qkv: written_out(*qkv, documents), q, k, v, grad, torch.bfloat16)
    on_gpu = [x.cuda() for x in (q, k, v, grad)]
    numbers = None if documents is None else Documents(documents.cuda())
    actual = with_gradients(lambda *qkv: attend(*qkv, backend, numbers), *on_gpu, torch.bfloat16)
    for ours, theirs, expected in zip(actual, plain, exact, strict=True):
        assert (ours.cpu() - expected).norm() <= 1.2 * (theirs - expected).norm()
