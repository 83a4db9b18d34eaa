"""What attention would do on a GPU, seen without one: the packages that are found, and the kernels that are asked for."""

from __future__ import annotations

import itertools
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from conf.load import load
from conf.shape import shape_of
from kernels.common.errors import UserError
from model import attention
from model.attention import Documents, attend, attend_cached, choose
from model.decoder import Decoder
from model.flash_attention import FlashAttention, find_flash_attention
from tests.model.test_attention import documents_of, inputs, written_out

GPU = torch.device("cuda")
AMPERE, HOPPER, BLACKWELL, WORKSTATION = (8, 0), (9, 0), (10, 0), (12, 0)
FUNCTIONS = "flash_attn_func = flash_attn_varlen_func = lambda *_, **__: None\n"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that writes modules into a folder of sys.path; no real flash-attn is seen."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("flash_attn", "flash_attn_interface"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**modules: str) -> None:
        for name, text in modules.items():
            path = tmp_path / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    find_flash_attention.cache_clear()
    yield write
    find_flash_attention.cache_clear()
    for name in list(sys.modules):
        if name.split(".")[0] in ("flash_attn", "flash_attn_interface"):
            del sys.modules[name]


def versions(monkeypatch, version: tuple[int, int]) -> None:
    monkeypatch.setattr(attention, "_torch_version", lambda: version)


def test_flash_attn_4_alone_is_a_namespace_without_functions(packages, monkeypatch):
    packages(flash_attn__cute="", flash_attn__cute__interface="")
    versions(monkeypatch, (2, 11))
    assert choose("auto", GPU, torch.bfloat16, 512, AMPERE) == ("sdpa", ())
    with pytest.raises(UserError, match="flash-attn, which is not installed; auto uses SDPA"):
        choose("flash", GPU, torch.bfloat16, 512, AMPERE)


@pytest.mark.parametrize(
    ("installed", "capability", "found"),
    [
        ({"flash_attn": FUNCTIONS}, AMPERE, "flash_attn"),
        ({"flash_attn": FUNCTIONS}, HOPPER, "flash_attn"),
        ({"flash_attn__cute": FUNCTIONS}, HOPPER, "flash_attn.cute"),
        ({"flash_attn__cute": FUNCTIONS}, BLACKWELL, "flash_attn.cute"),
        ({"flash_attn__cute": FUNCTIONS}, AMPERE, None),
        ({"flash_attn_interface": FUNCTIONS, "flash_attn": FUNCTIONS}, HOPPER, "flash_attn_interface"),
        ({"flash_attn_interface": FUNCTIONS, "flash_attn": FUNCTIONS}, BLACKWELL, "flash_attn"),
        ({"flash_attn_interface": FUNCTIONS}, AMPERE, None),
        ({}, HOPPER, None),
    ],
)
def test_the_newest_package_that_serves_the_gpu_is_taken(packages, installed, capability, found):
    packages(**installed)
    package, why = find_flash_attention(capability)
    assert (None if package is None else package.module) == found
    assert why == ("" if found else "is not installed")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "raise ImportError('undefined symbol: _ZN3c10')",
            r"cannot be imported \(flash_attn: undefined symbol: _ZN3c10\)",
        ),
        ("import cutlass_of_another_name", r"cannot be imported \(flash_attn needs cutlass_of_another_name\)"),
        ("raise OSError('x' * 500)", r"cannot be imported \(flash_attn: x{117}\.\.\.\)"),
    ],
)
def test_a_package_that_cannot_be_imported_is_told_and_passed_over(packages, monkeypatch, text, why):
    packages(flash_attn=text)
    versions(monkeypatch, (2, 11))
    backend, (warning,) = choose("auto", GPU, torch.bfloat16, 512, AMPERE)
    assert backend == "sdpa"
    assert re.fullmatch(f"flash-attn is installed and {why}: attention is SDPA's", warning)
    with pytest.raises(UserError, match=f"needs the package flash-attn, which {why}"):
        choose("flash", GPU, torch.bfloat16, 512, AMPERE)


def test_auto_takes_cudnn_through_sdpa_where_it_leads(packages, monkeypatch):
    packages(flash_attn=FUNCTIONS)
    versions(monkeypatch, (2, 13))
    by_gpu = {c: choose("auto", GPU, torch.bfloat16, 4096, c).backend for c in (AMPERE, HOPPER, BLACKWELL, WORKSTATION)}
    assert by_gpu == {AMPERE: "flash", HOPPER: "sdpa", BLACKWELL: "sdpa", WORKSTATION: "flash"}
    versions(monkeypatch, (2, 12))
    assert choose("auto", GPU, torch.bfloat16, 4096, HOPPER).backend == "flash"
    assert choose("auto", GPU, torch.float32, 4096, HOPPER).backend == "sdpa"  # flash-attn has no fp32
    with pytest.raises(UserError, match="flash computes in bf16"):
        choose("flash", GPU, torch.float32, 512, HOPPER)


def test_amds_numbers_are_not_nvidias(packages, monkeypatch):
    """An MI300X calls itself (9, 4)."""
    packages(flash_attn=FUNCTIONS)
    versions(monkeypatch, (2, 13))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose("auto", GPU, torch.bfloat16, 4096, (9, 4)).backend == "flash"


class Asked:
    """What SDPA was asked for: `kernels` that it may use, in order, and the shapes and options of the call."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[dict] = []
        real = F.scaled_dot_product_attention

        def record(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            kernels = _cur_sdpa_kernel_backends(with_priority=True)
            self.calls.append({"kernels": kernels, "heads": (q.shape[1], k.shape[1]), **options})
            return real(q, k, v, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", record)


@pytest.fixture
def asked(monkeypatch):
    """Record SDPA's calls, on a pretended Hopper with torch 2.13."""
    versions(monkeypatch, (2, 13))
    monkeypatch.setattr(attention, "capability_of", lambda _: HOPPER)
    return Asked(monkeypatch)


def on_device(dtype: torch.dtype, heads: int = 2, length: int = 64) -> list[Tensor]:
    return [torch.empty(2, length, count, 64, dtype=dtype, device="cuda") for count in (4, heads, heads)]


OWN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def test_bf16_without_a_mask_asks_cudnn_first_and_groups_heads(asked):
    with FakeTensorMode():
        assert attend(*on_device(torch.bfloat16), "sdpa").shape == (2, 64, 4, 64)
    (call,) = asked.calls
    assert call["kernels"] == [SDPBackend.CUDNN_ATTENTION, *OWN]
    assert call["heads"] == (4, 2)
    assert call["enable_gqa"]
    assert call["is_causal"]


def test_fp32_repeats_grouped_heads(asked):
    """No kernel of torch takes grouped heads in fp32, so that its matrix products would hold all probabilities."""
    with FakeTensorMode():
        attend(*on_device(torch.float32), "sdpa")
    (call,) = asked.calls
    assert call["heads"] == (4, 4)
    assert not call["enable_gqa"]
    assert call["kernels"] == OWN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_never_reaches_cudnn_and_repeats_grouped_heads(asked, monkeypatch, dtype):
    monkeypatch.setattr(attention, "_varlen_attn", lambda: None)
    with FakeTensorMode():
        attend(*on_device(dtype), "sdpa", Documents(torch.zeros(2, 64, dtype=torch.long, device="cuda")))
    (call,) = asked.calls
    assert call["attn_mask"].shape == (2, 1, 64, 64)
    assert call["heads"] == (4, 4)
    assert call["kernels"] == OWN


@pytest.mark.usefixtures("deterministic")
def test_deterministic_runs_never_reach_cudnn(asked):
    with FakeTensorMode():
        attend(*on_device(torch.bfloat16), "sdpa")
    assert asked.calls[0]["kernels"] == OWN


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_decoding_builds_no_plan_for_each_length(asked):
    with FakeTensorMode():
        q, k, v = on_device(torch.bfloat16)
        attend_cached(q.narrow(1, 63, 1), k, v)
        attend_cached(q.narrow(1, 59, 5), k, v)
    one, several = asked.calls
    assert one["kernels"] == several["kernels"] == OWN
    assert one["attn_mask"] is None
    assert one["heads"] == (4, 2)  # the flash kernel takes them
    assert several["attn_mask"].shape == (5, 64)


def test_other_gpus_keep_the_order_of_torch(asked, monkeypatch):
    monkeypatch.setattr(attention, "capability_of", lambda _: AMPERE)
    with FakeTensorMode():
        attend(*on_device(torch.bfloat16), "sdpa")
    assert asked.calls[0]["kernels"] == OWN


def by_document(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Attention over a packed sequence, one document at a time."""
    cuts = bounds.tolist()
    assert longest == max(stop - start for start, stop in itertools.pairwise(cuts))
    pieces = [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
    return torch.cat([written_out(q[None, p], k[None, p], v[None, p])[0] for p in pieces])


class FakeFlash:
    """Functions with the keywords that the generations of flash-attn share; `calls` has the options of each call."""

    def __init__(self, with_lse: bool = False) -> None:
        self.calls: list[dict] = []
        self.with_lse = with_lse

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> object:
        self.calls.append(options)
        out = written_out(q, k, v)
        return (out, out) if self.with_lse else out

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> object:
        self.calls.append(options)
        assert options["cu_seqlens_q"] is options["cu_seqlens_k"]
        assert options["max_seqlen_q"] == options["max_seqlen_k"]
        out = by_document(q, k, v, options["cu_seqlens_q"], options["max_seqlen_q"])
        return (out, out) if self.with_lse else out


@pytest.fixture(params=[False, True], ids=["output alone", "log-sum-exp beside it"])
def fake_flash(request, monkeypatch):
    fake = FakeFlash(request.param)
    package = FlashAttention("flash_attn", fake.dense, fake.varlen)
    monkeypatch.setattr(attention, "find_flash_attention", lambda _: (package, ""))
    monkeypatch.setattr(attention, "capability_of", lambda _: AMPERE)
    return fake


@pytest.mark.parametrize("masked", [False, True], ids=["one document", "documents"])
def test_flash_attn_is_called_with_what_it_takes(fake_flash, masked):
    q, k, v, _ = inputs((4, 2), 37)
    numbers = documents_of(2, 37) if masked else None
    actual = attend(q, k, v, "flash", None if numbers is None else Documents(numbers))
    torch.testing.assert_close(actual, written_out(q, k, v, numbers), rtol=0, atol=37 * 8 * torch.finfo(q.dtype).eps)
    assert [(call["causal"], call["deterministic"]) for call in fake_flash.calls] == [(True, False)]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("masked", [False, True], ids=["one document", "documents"])
def test_deterministic_reaches_flash_attn(fake_flash, masked):
    q, k, v, _ = inputs((4, 2), 7)
    attend(q, k, v, "flash", Documents(documents_of(2, 7)) if masked else None)
    assert fake_flash.calls[0]["deterministic"] is True


def test_the_bounds_of_documents_are_computed_once_per_batch(fake_flash, monkeypatch):
    computed = []
    bounds = Documents.bounds.func
    monkeypatch.setattr(Documents.bounds, "func", lambda self: computed.append(1) or bounds(self))
    config = load(["model=nano", "model.n_layers=3", "model.d_model=16", "model.n_heads=2", "model.d_ff=16"])
    decoder = Decoder(shape_of(config, 64), config.model, "flash", document_start=1).double()
    tokens = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
    decoder(tokens, tokens)
    assert len(fake_flash.calls) == 3
    assert len(computed) == 1


def varlen_of_now(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """Stands for torch's function: causal by its window, with grouped heads."""
    assert window_size == (-1, 0)
    assert enable_gqa
    assert (cu_seq_q is cu_seq_k, max_q == max_k) == (True, True)
    return by_document(q, k, v, cu_seq_q, max_q)


def varlen_of_2_10(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    """The same of an older torch, which takes equal heads only."""
    assert is_causal
    assert (cu_seq_q is cu_seq_k, max_q == max_k) == (True, True)
    assert q.shape == k.shape == v.shape
    return by_document(q, k, v, cu_seq_q, max_q)


@pytest.mark.parametrize("varlen_attn", [varlen_of_now, varlen_of_2_10])
def test_packed_documents_are_given_to_torch_as_it_takes_them(monkeypatch, varlen_attn):
    q, k, v, _ = inputs((4, 2), 37)
    numbers = documents_of(2, 37)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    attention._varlen_attn.cache_clear()
    packed = attention._varlen_attn()
    attention._varlen_attn.cache_clear()
    out = packed(*(x.flatten(0, 1) for x in (q, k, v)), *Documents(numbers).bounds).view_as(q)
    torch.testing.assert_close(out, written_out(q, k, v, numbers), rtol=0, atol=37 * 8 * torch.finfo(q.dtype).eps)


def test_the_bounds_are_those_of_all_sequences():
    bounds, longest = Documents(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])).bounds
    assert bounds.tolist() == [0, 2, 5, 6, 8, 10]
    assert bounds.dtype == torch.int32
    assert longest == 3
