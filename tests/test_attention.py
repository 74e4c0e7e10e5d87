"""The backend table on packed, prompt-sharing batches and the sampler's cache, against plain attention in float64."""

import sys
import types

import pytest
import torch

from cream import attention
from cream.attention import Segments
from cream.config import ModelConfig
from cream.log import UserError
from cream.model import load

CPU = torch.device("cpu")


def plain(q, k, v, scale, visible):
    """softmax(q k^T) v with a kv head for every group of query heads; visible is (S, T, U)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~visible[:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def problem(S=3, H=6, K=2, T=7, E=8):
    torch.manual_seed(0)
    return (torch.randn(S, n, T, E, dtype=torch.float64) for n in (H, K, K))


# (prompt, answers): lengths in tokens. One answer and five, answers of one token, a prompt longer than all the rest.
GROUPS = [(5, [3]), (4, [2, 6, 1, 3, 1]), (90, [7, 11]), (1, [1, 1]), (2, [4, 3, 9])]


def layout(device=CPU) -> Segments:
    lengths, owner, shared = [], [], []
    for prompt, answers in GROUPS:
        first = len(lengths)
        lengths += [prompt + answers[0], *answers[1:]]
        owner += [first] * len(answers)
        shared += [0] + [prompt] * (len(answers) - 1)
    return Segments.of(lengths, owner, shared, device)


def packed_problem(H, K, E=16, dtype=torch.float64):
    torch.manual_seed(0)
    T = sum(layout().lengths)
    return [torch.randn(T, n, E, dtype=dtype) for n in (H, K, K)]


def one_by_one(q, k, v, scale):
    """Each answer with a copy of its prompt, alone: what packing must not be told from. (T, H, E) as packed."""
    out, at = [], 0
    for prompt, answers in GROUPS:
        for n, answer in enumerate(answers):
            here = at + prompt + sum(answers[:n])
            tokens = torch.tensor([*range(at, at + prompt), *range(here, here + answer)], device=q.device)
            qs, ks, vs = (x[tokens].transpose(0, 1)[None] for x in (q, k, v))
            causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=q.device).tril()[None]
            found = plain(qs, ks, vs, scale, causal)[0]
            out.append(found if n == 0 else found[prompt:])
        at += prompt + sum(answers)
    return torch.cat(out)


def loss_and_gradients(run, tensors):
    """The output, and gradients of a sum in which every element has a weight of its own."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = run(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("H, K", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("backend", attention.BACKENDS, ids=lambda b: b.name)
def test_every_backend_that_runs_is_each_sequence_alone(backend, H, K):
    if reason := backend.why_not():
        pytest.skip(reason)
    only_half = backend.name != "sdpa"
    device = torch.device("cuda" if only_half else "cpu")
    tensors = [x.to(device) for x in packed_problem(H, K, E=64 if only_half else 16)]
    truth = loss_and_gradients(lambda q, k, v: one_by_one(q, k, v, 0.3), tensors)
    for dtype in (torch.bfloat16,) if only_half else (torch.float64, torch.float32, torch.bfloat16):
        given = [x.to(dtype) for x in tensors]
        found = loss_and_gradients(lambda q, k, v: backend.run(q, k, v, layout(device), 0.3), given)
        usual = loss_and_gradients(lambda q, k, v: one_by_one(q, k, v, 0.3), given)
        for ours, theirs, exact in zip(found, usual, truth, strict=True):
            floor = 1e-12 if dtype == torch.float64 else torch.finfo(torch.float32).eps * exact.abs().max()
            allowed = 2 * (theirs.double() - exact).abs().max() + floor
            assert (ours.double() - exact).abs().max() <= allowed, dtype


@pytest.mark.parametrize("H, K", [(6, 2), (4, 4)])
def test_the_calls_that_other_libraries_get(monkeypatch, H, K):
    """Stand-ins with the libraries' own signatures and what their documentation says, in float64: the arguments are
    right, whoever cannot run here."""

    def varlen(q, k, v, cu_q, cu_k, scale):
        assert cu_q.dtype == cu_k.dtype == torch.int32
        out = []
        for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            n, m = int(b - a), int(d - c)
            qs, ks, vs = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            out.append(plain(qs, ks, vs, scale, torch.ones(n, m, dtype=torch.bool).tril(m - n)[None])[0])
        return torch.cat(out)

    def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                causal=False):  # fmt: skip
        assert causal and max_seqlen_q == int(cu_seqlens_q.diff().max()) and max_seqlen_k == cu_seqlens_k.diff().max()
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

    def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                softmax_scale=None, causal=False):  # fmt: skip
        assert causal and seqused_q is None
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

    def flash_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                min_seqlen_k=None, softmax_scale=None, causal=False):  # fmt: skip
        assert causal and qv is None
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), None

    def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1)):  # fmt: skip
        assert window_size == (-1, 0) and query.shape[1] == key.shape[1] == value.shape[1]
        return varlen(query, key, value, cu_seq_q, cu_seq_k, scale)

    def torch_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                   window_size=(-1, -1), enable_gqa=False, seqused_k=None):  # fmt: skip
        assert window_size == (-1, 0) and (enable_gqa or query.shape[1] == key.shape[1])
        return varlen(query, key, value, cu_seq_q, cu_seq_k, scale)

    class Bias:
        def from_seqlens(q_seqlen, kv_seqlen):
            bias = Bias()
            bias.q, bias.k = (torch.tensor([0, *n]).cumsum(0).int() for n in (q_seqlen, kv_seqlen))
            return bias

        def to(self, device):
            return self

    def xformers(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.shape[0] == 1 and query.shape[2] == key.shape[2]
        return varlen(query[0], key[0], value[0], attn_bias.q, attn_bias.k, scale)[None]

    calls = [
        ("flash-attn-2", "flash_attn", {"flash_attn_varlen_func": flash_2}),
        ("flash-attn-3", "flash_attn_interface", {"flash_attn_varlen_func": flash_3}),
        ("flash-attn-4", "flash_attn.cute.interface", {"flash_attn_varlen_func": flash_4}),
        ("torch-varlen", "torch.nn.attention.varlen", {"varlen_attn": torch_2_11}),
        ("torch-varlen", "torch.nn.attention.varlen", {"varlen_attn": torch_2_13}),
        ("xformers", "xformers.ops", {"memory_efficient_attention": xformers}),
    ]
    tensors = packed_problem(H, K)
    truth = one_by_one(*tensors, 0.3)
    bias = types.SimpleNamespace(BlockDiagonalCausalFromBottomRightMask=Bias)
    for name, module, functions in calls:
        with monkeypatch.context() as patch:
            parts = module.split(".")
            for n in range(1, len(parts)):
                if not module.startswith("torch"):
                    patch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(parts[n - 1]))
            patch.setitem(sys.modules, module, types.SimpleNamespace(**functions))
            patch.setitem(sys.modules, "xformers.ops.fmha", types.ModuleType("fmha"))
            patch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)
            backend = next(b for b in attention.BACKENDS if b.name == name)
            torch.testing.assert_close(backend.run(*tensors, layout(), 0.3), truth, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("owner, shared", [(1, 1), (0, 4), (0, 0), (1, 0), (2, 1)])
def test_segments_share_what_stands_before_them(owner, shared):
    lengths, owners = (3, 2, 1), (0, owner, 2)
    if (owner, shared) == (1, 0):
        assert Segments.of(lengths, owners, (0, 0, 0), CPU).kv_index is None
        return
    with pytest.raises(ValueError, match="segment 1 of 2 tokens cannot share"):
        Segments.of(lengths, owners, (0, shared, 0), CPU)


def test_a_plain_batch_is_segments_side_by_side(loaded):
    ids = torch.randint(3, 250, (3, 11), generator=torch.Generator().manual_seed(0))
    together = loaded(ids, use_cache=False).logits
    for row, logits in zip(ids, together, strict=True):
        torch.testing.assert_close(loaded(row[None], use_cache=False).logits[0], logits, rtol=0, atol=1e-5)


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

    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert importlib.util.find_spec("flash_attn") is not None
    two = next(b for b in attention.BACKENDS if b.name == "flash-attn-2")
    assert two.why_not() == "flash_attn cannot be imported (no flash_attn_varlen_func in it)"


def test_a_kernel_for_other_cards_is_passed_over(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert attention.choose("auto").name == "sdpa"
    with pytest.raises(UserError, match="torch-varlen cannot run here: is not for compute capability 7.5"):
        attention.choose("torch-varlen")


def test_float32_takes_no_half_precision_kernel(monkeypatch):
    able = tuple(attention.Backend(b.name, lambda: None, b.run) for b in attention.BACKENDS)
    monkeypatch.setattr(attention, "BACKENDS", able)
    assert attention.choose("auto", torch.float32).name == "sdpa"
    assert attention.choose("auto", torch.bfloat16).name == able[0].name


@pytest.mark.parametrize("option", ["sliding_window", "softcap"])
def test_what_would_be_computed_wrongly_is_refused(loaded, option):
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(UserError, match=f"wants {option}"):
        loaded.base_model(input_ids=ids, use_cache=False, **{option: 4})


@pytest.mark.parametrize("name", [backend.name for backend in attention.BACKENDS])
def test_transformers_loads_a_model_under_every_name(name, tiny, monkeypatch):
    """A name with "flash" in it sends transformers to look for a package or a kernel on the hub."""
    stand_in = attention.Backend(name, lambda: None, attention._sdpa)
    monkeypatch.setattr(attention, "choose", lambda *_: stand_in)
    config = ModelConfig(path=str(tiny), dtype="float32")
    for model in (load(tiny, config), load(tiny, config)):
        assert model.config._attn_implementation == stand_in.transformers_name
        assert model(torch.arange(5)[None]).logits.isfinite().all()
