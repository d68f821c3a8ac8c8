"""Which kernels run where nobody asks, and what is said where they cannot be had; needs no GPU."""

from __future__ import annotations

import pytest
import torch

import synkern
from synkern import _library, backends

CUDA, XPU = torch.device("cuda:0"), torch.device("xpu:0")
NATIVE, TRITON = "synkern", "synkern_triton"


@pytest.mark.parametrize(
    ("missing", "preference", "chosen"),
    [
        ((), ("cuda", "triton"), NATIVE),
        (("triton",), ("cuda", "triton"), NATIVE),
        (("cuda",), ("cuda", "triton"), TRITON),
        ((), ("triton", "cuda"), TRITON),
        (("triton",), ("triton", "cuda"), NATIVE),
    ],
)
def test_the_first_that_can_be_had(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], preference: tuple[str, ...], chosen: str
) -> None:
    monkeypatch.setattr(backends, "_MISSING", dict.fromkeys(missing, "not built"))
    monkeypatch.setitem(backends.PREFERENCE, "cuda", preference)
    assert backends.choose("fused_x", None, CUDA) == chosen


def test_an_explicit_backend_is_that_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_MISSING", {})
    assert backends.choose("fused_x", "triton", CUDA) == TRITON
    assert backends.choose("fused_x", "triton", XPU) == TRITON
    assert backends.choose("fused_x", "cuda", CUDA) == NATIVE
    assert backends.choose("fused_x", None, torch.device("meta")) == NATIVE
    with pytest.raises(ValueError, match=r"'cuda' works on cuda tensors, got logits on xpu:0"):
        backends.choose("fused_x", "cuda", XPU)
    monkeypatch.setattr(backends, "_MISSING", {"cuda": "not built"})
    with pytest.raises(ValueError, match=r"fused_x: backend='cuda' cannot be had: not built"):
        backends.choose("fused_x", "cuda", CUDA)


def test_nothing_at_all_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_MISSING", {"cuda": "not built", "triton": "not installed"})
    with pytest.raises(ValueError, match=r"cuda:0 \(cuda: not built; triton: not installed\); use logits.cpu\(\)"):
        backends.choose("fused_x", None, CUDA)


@pytest.mark.skipif(_library.cuda_missing is None, reason="the CUDA library has these kernels")
@pytest.mark.parametrize("key", ["CUDA", "XPU"])
@pytest.mark.parametrize("name", ["row_loss", "row_loss_rescale", "row_loss_hvp", "linear_contraction"])
def test_triton_fills_the_place_of_a_missing_library(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"synkern::{name}", key)


def test_both_namespaces_have_the_same_schemas() -> None:
    for name in synkern._triton.OPERATORS:
        native, ours = (getattr(getattr(torch.ops, space), name).default._schema for space in (NATIVE, TRITON))
        assert str(native).removeprefix(NATIVE) == str(ours).removeprefix(TRITON)


def test_the_report_says_why_each_backend_is_missing() -> None:
    report = backends.report()["backends"]
    assert isinstance(report, dict)
    assert set(report) == set(backends.BACKENDS)
    assert {name for name, state in report.items() if state == "available"} == set(backends.available())
