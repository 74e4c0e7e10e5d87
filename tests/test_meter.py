"""Operations counted as torch counts them; rows of a step that wait on a GPU and are written together."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cream import meter
from cream.config import ModelConfig
from cream.log import Metrics, UserError
from cream.meter import FETCH_EVERY, Meter, forward_flops
from cream.model import head, load
from cream.packing import pack, read
from tests.conftest import write_model


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_of_the_products(tokenizer, tmp_path, tied):
    model = load(write_model(tmp_path / "model", tokenizer, 0, tie_word_embeddings=tied), ModelConfig(dtype="float32"))
    packed = pack([([5] * 20, [[6] * 8, [7] * 3]), ([8] * 4, [[9] * 6])], torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        read(model, packed) @ head(model).T
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    # torch counts attention as if nothing were masked: by hand, 2 layers of 4 heads of 8, 27 + 2 + 9 tokens
    seen = 27 * 28 // 2 + (21 + 22) + 9 * 10 // 2
    assert packed.segments.seen == seen
    assert forward_flops(model, packed) == products + 4 * 2 * 4 * 8 * seen


@pytest.fixture
def waiting(loaded, tmp_path) -> Meter:
    """A meter that believes its values to be on a GPU."""
    made = Meter(loaded, "sft", Metrics(tmp_path / "metrics.jsonl"))
    made.at_once = False
    return made


def run(made: Meter, steps: int, bad: int | None = None, due: int | None = None) -> None:
    for step in range(1, steps + 1):
        made.begin()
        for share in (0.25, 0.5):
            value = float("nan") if step == bad else share * step
            made.add(torch.tensor(value), {"flops": 1e6, "sequence_forwards_per_prompt": 1.0}, 10)
        made.check(step - 1)
        made.end(step, due=step == due, lr=0.1, grad_norm=torch.tensor(2.0))


def test_nothing_is_read_before_rows_are_due(waiting, monkeypatch):
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x, tolist=torch.Tensor.tolist: reads.append(1) or tolist(x))
    for name in ("item", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a value was read in a step"))
    run(waiting, FETCH_EVERY - 1)
    assert not reads and not waiting.metrics.rows()
    run(waiting, 1)
    assert len(reads) == 1 and len(waiting.metrics.rows()) == FETCH_EVERY


def test_rows_are_the_steps_sums(waiting):
    run(waiting, 3, due=3)
    rows = waiting.metrics.rows()
    assert [(row["step"], row["loss"], row["tokens"], row["grad_norm"]) for row in rows] == [
        (1, 0.75, 20, 2.0), (2, 1.5, 20, 2.0), (3, 2.25, 20, 2.0)
    ]  # fmt: skip
    assert all(row["sequence_forwards_per_prompt"] == 2.0 and row["lr"] == 0.1 and row["mfu"] > 0 for row in rows)
    assert len({row["tokens_per_second"] for row in rows}) == 1  # one time for all three
    facts = waiting.facts()
    assert facts["tokens"] == 60 and facts["sequence_forwards_per_prompt"] == 2.0
    assert facts["tokens_per_second"] == pytest.approx(rows[0]["tokens_per_second"])
    assert facts["mfu"] == pytest.approx(rows[0]["mfu"]) and facts["memory_gb"] > 0.01


def test_what_is_not_finite_is_found_with_its_step_before_anything_is_saved(waiting):
    with pytest.raises(UserError, match="sft: the loss of step 1 is nan; nothing of it is saved"):
        run(waiting, 3, bad=2, due=3)
    assert [row["step"] for row in waiting.metrics.rows()] == [1]


def test_a_known_cards_peak_is_its_data_sheets(monkeypatch):
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
                       ("NVIDIA A100-SXM4-40GB", 312e12)):  # fmt: skip
        meter._peak.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert meter._peak(torch.device("cuda"), torch.bfloat16) == peak
    meter._peak.cache_clear()
    assert meter._peak(torch.device("cpu"), torch.float32) > 1e8


def test_a_step_without_numbers_has_no_mfu(loaded, tmp_path):
    made = Meter(loaded, "sft", Metrics(tmp_path / "m.jsonl"))
    made.begin()
    made.add(torch.tensor(1.0), {}, 7)
    made.end(1, due=False, grad_norm=torch.tensor(1.0))
    [row] = made.metrics.rows()
    assert row["mfu"] is None and row["tokens"] == 7 and made.facts()["mfu"] is None
    assert Meter(loaded, "sft", made.metrics).facts() == {"tokens": 0, "tokens_per_second": None}
