"""What is counted operator by operator, against sizes known by hand."""

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from longrope2.training.meter import LiveStorages, Meter


def test_storages_count_until_they_are_freed() -> None:
    with LiveStorages() as storages:
        kept = torch.ones(1000)
        view = kept[10:]  # shares its storage
        assert (storages.now, storages.peak) == (4000, 4000)
        torch.ones(500, dtype=torch.float64)  # freed at once
        assert (storages.now, storages.peak) == (4000, 8000)
        del kept
        assert storages.now == 4000
        del view
        assert (storages.now, storages.peak) == (0, 8000)


def test_phases_have_their_own_peaks_and_flops_of_fake_tensors() -> None:
    with FakeTensorMode(), Meter() as meter:
        meter.begin("products")
        left = torch.empty(100_000, 200_000, dtype=torch.bfloat16)  # 40 GB, of which none is there
        product = left @ torch.empty(200_000, 7, dtype=torch.bfloat16)
        del left
        meter.begin("attention")
        q_BHTD = torch.empty(1, 4, 64, 16)
        torch.ops.aten._scaled_dot_product_efficient_attention(
            q_BHTD, q_BHTD, q_BHTD, None, compute_log_sumexp=False, is_causal=True
        )
        meter.close()
    _, products, attention = meter.phases
    assert products.product_flops == 2 * 100_000 * 200_000 * 7 and products.attention_flops == 0
    assert products.peak_bytes == 2 * (100_000 * 200_000 + 200_000 * 7 + 100_000 * 7)
    assert attention.attention_flops == 2 * 2 * 4 * 64 * 64 * 16  # the whole square
    assert product.untyped_storage().nbytes() <= attention.peak_bytes < 2**21


def test_numbers_that_the_host_waits_for_are_answered_and_blamed_on_a_line() -> None:
    with FakeTensorMode(), Meter() as meter:
        assert float(torch.empty(())) == 1.0 and torch.empty((), dtype=torch.int64).item() == 1
        assert torch.allclose(torch.empty(3), torch.empty(3))
        assert torch.empty(2).tolist() == [1.0, 1.0]
        assert not torch.empty(2).isinf().any()
    assert meter.phases[0].host_reads == {"elsewhere": 6}  # tests own no line
    with Meter() as meter:
        assert torch.tensor(7.0).item() == 7.0  # a real one knows its number
    assert meter.phases[0].host_reads.total() == 1


def test_collectives_by_name_group_and_bytes() -> None:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        four = dist.new_group(range(4))
        with FakeTensorMode(), Meter() as meter:
            part, whole = torch.empty(10), torch.empty(80)
            dist.all_gather_into_tensor(whole, part)
            dist.reduce_scatter_tensor(part, whole)
            dist.all_reduce(part)
            dist.all_to_all_single(torch.empty(40), torch.empty(40), group=four)
        phase = meter.phases[0]
    finally:
        dist.destroy_process_group()
    assert phase.collective_bytes == {
        ("all_gather_into_tensor", 8): 320,
        ("reduce_scatter_tensor", 8): 320,
        ("all_reduce", 8): 40,
        ("all_to_all_single", 4): 160,
    }
    assert set(phase.collectives.values()) == {1}
