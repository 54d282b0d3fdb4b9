"""The course computes in fp16 on cards without native bf16: the same code, tried in fp16 on the CPU."""

import pytest
import torch

from benchmarks import half_precision
from tests import tiny
from tests.test_cuda import make_trainer


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_step_in_each_dtype_starts_at_ratio_1_and_kl_0_and_moves_every_adapter(dtype, llama_folder):
    trainer = make_trainer(llama_folder, dtype=dtype)
    logits, values = trainer.model(torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.long), 1)
    assert logits.dtype == getattr(torch, dtype) and values.dtype == torch.float32
    for step in range(2):
        queries, _, scores = tiny.batch(seed=step)
        stats = trainer.step(queries, trainer.generate(queries), scores)
        assert stats["ppo/policy/first_ratio_error"] == 0 and stats["ppo/skipped_updates"] == 0
        if step == 0:
            assert stats["objective/kl"] == 0
    assert all(p.dtype == torch.float32 and p.any() for p in tiny.adapters(trainer).values())


def test_fp16_gradients_are_nearer_to_fp32_than_those_of_bf16_without_loss_scaling(llama_folder):
    queries, responses, _ = tiny.batch(8)

    def find(dtype):
        trainer = make_trainer(llama_folder, dtype=dtype)
        half_precision.as_after_some_training(trainer.model, 0.1)
        return half_precision.gradients(trainer, queries, responses)

    exact, in_bf16, in_fp16 = map(find, ("float32", "bfloat16", "float16"))
    assert len(exact) == 10 and all(gradient.any() for gradient in exact.values())
    error, _, _, _, finite = half_precision.compare(in_fp16, exact)
    assert finite and error < 0.02 and error < half_precision.compare(in_bf16, exact)[0] / 2


def test_the_comparison_of_gradients_sees_what_it_is_for():
    exact = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    lost = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([1.0])}
    total, median, worst, zeros, finite = half_precision.compare(lost, exact)
    assert total == pytest.approx(4 / 26**0.5) and worst == pytest.approx(0.8) and zeros == pytest.approx(1 / 3) and finite
    lost["b"] = torch.tensor([float("inf")])
    assert half_precision.compare(lost, exact)[4] is False
