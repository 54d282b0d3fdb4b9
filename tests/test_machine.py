"""Which device and dtype a process computes with, of the cards that it sees."""

import pytest
import torch

from rlhf_helpers.machine import device_and_dtype


@pytest.fixture
def cards(monkeypatch):
    """A function that makes torch see so many cards, of this compute capability."""

    def see(count, capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)

    return see


@pytest.mark.parametrize("rank, card", [(None, 0), ("0", 0), ("3", 3), ("5", 1)])
def test_each_process_of_one_machine_has_a_card_of_its_own_as_far_as_they_go(rank, card, cards, monkeypatch):
    cards(4, (8, 0))
    monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_and_dtype() == (torch.device("cuda", card), torch.bfloat16)


def test_a_card_without_native_bf16_computes_in_fp16_and_a_cpu_in_bf16(cards):
    cards(1, (7, 5))
    assert device_and_dtype()[1] == torch.float16
    cards(0, None)
    assert device_and_dtype() == (torch.device("cpu"), torch.bfloat16)
