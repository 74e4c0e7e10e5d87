"""FSDP2: the head unsharded by the model that owns it, two processes over gloo against one process without sharding.

Run as a script this file is one of the two processes: python tests/test_fsdp.py RANK RENDEZVOUS_FILE
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from cream_kernels import IGNORE, linear_logp, linear_weighted_dpo, weighted_dpo

NUM_RANKS, BETA = 2, 0.2
P, S, V = 4, 10, 61  # pairs, positions of a sequence, vocabulary


def loss_in_one_pass(self, ids, targets, reference_logp, agreement):
    """Mean loss of these pairs by linear_weighted_dpo."""
    hidden = self.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    bounds = torch.arange(0, ids.numel() + 1, ids.shape[1])
    weight = self.lm_head.weight
    assert not isinstance(weight, DTensor)
    return linear_weighted_dpo(hidden, weight, targets.flatten(), bounds, reference_logp, agreement, beta=BETA)[
        0
    ].mean()


def loss_by_log_probs(self, ids, targets, reference_logp, agreement):
    """The same by linear_logp and weighted_dpo."""
    hidden = self.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    logp = linear_logp(hidden, self.lm_head.weight, targets.flatten()).view(ids.shape).sum(1)
    chosen, rejected = (logp - reference_logp).view(-1, 2).unbind(1)
    return weighted_dpo(BETA * (chosen - rejected), agreement).mean()


def tiny_llama(tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,  # odd, so that the shards of the head differ in size
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    )


def batch() -> tuple[torch.Tensor, ...]:
    """ids (2P, S) in order chosen, rejected, ...; their targets; reference_logp (2P,); agreement (P,)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (2 * P, S), generator=generator)
    targets = torch.cat((ids[:, 1:], torch.full((2 * P, 1), IGNORE)), dim=1)
    targets[:, :3] = IGNORE  # the prompt
    return ids, targets, torch.full((2 * P,), -25.0), torch.linspace(0, 1, P)


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def work(rank: int, rendezvous: str) -> None:
    """Compare, in float32, the loss and all gradients of half a batch a rank with those of the batch at once."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    ids, targets, reference_logp, agreement = batch()
    share = slice(rank * P // NUM_RANKS, (rank + 1) * P // NUM_RANKS)
    rows = slice(2 * share.start, 2 * share.stop)
    for function in (loss_in_one_pass, loss_by_log_probs):
        for tied, reshard in ((False, None), (False, True), (True, None)):
            single = tiny_llama(tied)
            expected = function(single, ids, targets, reference_logp, agreement)
            expected.backward()
            model = tiny_llama(tied)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
            model.loss = types.MethodType(function, model)
            register_fsdp_forward_method(model, "loss")
            loss = model.loss(ids[rows], targets[rows], reference_logp[rows], agreement[share])
            loss.backward()
            assert isinstance(model.lm_head.weight, DTensor)  # sharded again
            mean = loss.detach().clone()
            dist.all_reduce(mean, dist.ReduceOp.SUM)
            torch.testing.assert_close(mean / NUM_RANKS, expected.detach(), rtol=1e-5, atol=1e-6)
            for (name, ours), theirs in zip(model.named_parameters(), single.parameters(), strict=True):
                assert theirs.grad.abs().max() > 0, name
                assert ours.grad.to_local().shape != theirs.shape, name  # really sharded
                difference = (whole(ours.grad) - theirs.grad).norm()
                assert difference <= 1e-5 * theirs.grad.norm(), f"{function.__name__}: {name} is off by {difference}"
    dist.destroy_process_group()


def test_two_shards_equal_one_process(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),  # a host name need not resolve
    }
    command = [sys.executable, str(Path(__file__).resolve())]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * NUM_RANKS, "\n".join(outputs)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
