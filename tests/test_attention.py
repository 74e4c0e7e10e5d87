"""The backend table and the sampler's cache against plain attention in float64."""

import pytest
import torch

from cream import attention
from cream.log import UserError


def plain(q, k, v, scale, visible):
    """softmax(q k^T) v with a kv head for every group of query heads; visible is (S, T, U)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~visible[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def problem(S=3, H=6, K=2, T=7, E=8):
    torch.manual_seed(0)
    return (torch.randn(S, n, T, E, dtype=torch.float64) for n in (H, K, K))


@pytest.mark.parametrize("backend", attention.BACKENDS, ids=lambda b: b.name)
def test_every_backend_that_runs_is_causal_attention(backend):
    if reason := backend.why_not():
        pytest.skip(reason)
    q, k, v = problem()
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None]
    out = backend.run(q.float(), k.float(), v.float(), 0.3)
    torch.testing.assert_close(out.double(), plain(q, k, v, 0.3, causal), rtol=0, atol=1e-6)


def test_auto_says_what_it_passed_over(capsys):
    attention._say_once.cache_clear()
    assert attention.choose("auto").why_not() is attention.choose("auto").why_not() is None
    if not torch.cuda.is_available():
        assert capsys.readouterr().err.count("xformers: needs a CUDA device") == 1


def test_a_named_backend_that_cannot_run_is_an_error_with_its_reason():
    if torch.cuda.is_available():
        pytest.skip("every backend may run here")
    with pytest.raises(UserError, match="flash-attn-2 cannot run here: needs a CUDA device"):
        attention.choose("flash-attn-2")
    with pytest.raises(UserError, match="no backend called 'flash'.*sdpa"):
        attention.choose("flash")


def test_an_empty_namespace_is_no_flash_attention(monkeypatch, tmp_path):
    """flash-attn-4 leaves a folder `flash_attn` behind that find_spec takes for flash-attn 2."""
    import importlib.util
    import sys

    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert importlib.util.find_spec("flash_attn") is not None
    two = next(b for b in attention.BACKENDS if b.name == "flash-attn-2")
    assert two.why_not() == "flash_attn cannot be imported (no flash_attn_func in it)"


def test_float32_takes_no_half_precision_kernel(monkeypatch):
    able = tuple(attention.Backend(b.name, lambda: None, b.run) for b in attention.BACKENDS)
    monkeypatch.setattr(attention, "BACKENDS", able)
    assert attention.choose("auto", torch.float32).name == "sdpa"
    assert attention.choose("auto", torch.bfloat16).name == able[0].name


@pytest.mark.parametrize("steps", [(5, 1, 1), (3, 4), (1, 1, 5), (7,)])
def test_cache_is_attention_over_what_came_before(steps):
    q, k, v = problem()
    first = torch.tensor([0, 2, 1])
    column = torch.arange(7)
    visible = (column[None] <= column[:, None])[None] & (column >= first[:, None])[:, None]
    real = column >= first[:, None]  # (S, T)
    truth = plain(q, k, v, 0.3, visible | torch.eye(7, dtype=torch.bool))
    kv, at = attention.KeyValues(first, 7), 0
    for n in steps:
        kv.begin(n)
        part = slice(at, at + n)
        out = kv.attend(0, q[:, :, part].float(), k[:, :, part].float(), v[:, :, part].float(), 0.3).double()
        keep = real[:, part]
        torch.testing.assert_close(out[keep], truth[:, part][keep], rtol=0, atol=1e-6)
        assert torch.isfinite(out).all()
        at += n


def test_selected_rows_go_on_as_if_they_had_been_alone():
    q, k, v = problem()

    def last(rows):
        kv = attention.KeyValues(torch.tensor([0, 2, 1]), 6)
        kv.begin(6)
        kv.attend(0, q[:, :, :6], k[:, :, :6], v[:, :, :6], 0.3)
        picked = kv.select(rows, 7)
        assert not kv.keys and not kv.values  # handed over, not held twice
        picked.begin(1)
        return picked.attend(0, *(x[rows, :, 6:] for x in (q, k, v)), 0.3)

    rows = torch.tensor([2, 2, 0])
    torch.testing.assert_close(last(rows), last(torch.arange(3))[rows])


def test_a_full_cache_is_refused():
    kv = attention.KeyValues(torch.zeros(1, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="2 columns cannot hold 3"):
        kv.begin(3)


@pytest.mark.parametrize("option", ["sliding_window", "softcap"])
def test_what_would_be_computed_wrongly_is_refused(loaded, option):
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(UserError, match=f"wants {option}"):
        loaded.base_model(input_ids=ids, use_cache=False, **{option: 4})
