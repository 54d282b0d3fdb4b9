"""On-policy to the last bit: what samples on a CPU has the log-probs of what learns, whatever the adapters, the batch, the
padding, the minibatches. bf16 is exact; in fp32 a product depends on the number of its rows, by some 1e-7."""

import contextlib
import copy
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaMLP

from rlhf_helpers import fast, ppo, quirks
from rlhf_helpers.config import CPU, project_root
from rlhf_helpers.data import load_prompts
from rlhf_helpers.models import load_policy
from rlhf_helpers.quirks import keep_gradients
from rlhf_helpers.sampling import sample
from rlhf_helpers.stats import sampler_stats
from rlhf_helpers.trainer import PPOTrainer
from tests import tiny
from tests.tiny import EOS, PAD

onednn = pytest.mark.skipif(
    not fast.has_onednn(), reason="no oneDNN here that multiplies in bf16: all is sampled the plain way"
)

SIZES = (1, 2, 3, 5, 8, 16)


def prompts(n):
    """Token ids of n prompts of 11 to 17 tokens: padded on the left, and wide enough. Over fewer than 16 keys torch's softmax adds
    in another order than over more, and no chat template is that short."""
    g = torch.Generator().manual_seed(7)
    return [torch.randint(16, tiny.V, (17 - 3 * i % 7,), generator=g) for i in range(n)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bf16_trainer(lm, size=4, mini=None, **config):
    settings = dict(batch_size=size, mini_batch_size=mini or size, max_new_tokens=12, temperature=0.7) | config
    trainer = tiny.trainer(lm, **settings)
    trainer.eos_ids = (EOS, *range(4, 16))  # some responses end early
    return trainer


def eager(lm):
    lm.set_attn_implementation("eager")
    return lm


@pytest.fixture(params=["4-bit", "bf16"])
def policy(request, nf4):
    """Makes a tiny Llama, in 4 bits or in plain bf16, with adapters that have moved."""
    plain = lambda b_scale: tiny.with_lora(eager(tiny.llama(hidden_size=64).to(torch.bfloat16)), b_scale=b_scale)
    return (lambda b_scale: nf4(b_scale=b_scale)) if request.param == "4-bit" else plain


def stepped(trainer, queries, scores=None):
    """Stats of one step on the trainer's own samples."""
    responses = trainer.generate(queries)
    return responses, trainer.step(queries, responses, scores or [float(i % 3) for i in range(len(queries))])


@pytest.mark.parametrize("size", range(1, 17))
def test_sampler_and_trainer_agree_to_the_last_bit(policy, size):
    """At the first step, when the trainer makes a pass of its own, and at the next, when it need not."""
    for b_scale in (0.002, 0.2):
        trainer = bf16_trainer(policy(b_scale), size, learning_rate=1e-2)
        queries = prompts(size)
        for _ in range(2):
            responses, stats = stepped(trainer, queries)
            assert stats["objective/sampler_kl"] == stats["objective/sampler_max_diff"] == 0
            assert stats["ppo/policy/first_ratio_error"] == 0
        assert trainer.sampler_is_exact
        assert size < 8 or len({len(response) for response in responses}) > 1  # some end early


ROWS_AGREE = """
import sys
if sys.argv[1] == "imported":
    import rlhf_helpers
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
x, weight = (torch.randn(rows, 576, generator=g).bfloat16() for rows in (1024, 1536))
print(all(torch.equal(F.linear(x[:rows], weight), F.linear(x, weight)[:rows]) for rows in (2, 8, 16, 32, 64, 256)))
"""


def rows_agree(how, **environment):
    """Whether rows of a bf16 product have the same bits alone and among a thousand, in a process of its own."""
    ours = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    command = [sys.executable, "-c", ROWS_AGREE, how]
    made = subprocess.run(command, env=ours | environment, cwd=project_root(), capture_output=True, text=True, check=True)
    return made.stdout.strip() == "True"


@onednn
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says whether there is AMX")
def test_a_row_of_a_bf16_product_knows_no_other_rows():
    assert rows_agree("imported")


@pytest.mark.skipif(not quirks.has_amx(), reason="this CPU has no AMX")
def test_with_amx_a_row_depends_on_its_neighbours():
    """What `quirks.same_bits_for_any_rows` is there for; and who wants AMX can have it."""
    assert not rows_agree("not imported")
    assert not rows_agree("imported", ONEDNN_MAX_CPU_ISA="ALL")


def test_amx_is_known_by_the_flags_of_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(quirks, "CPUINFO", tmp_path / "cpuinfo")
    assert not quirks.has_amx()  # no such file: another system
    for flags, known in ("fpu avx512_bf16 amx_bf16 amx_tile", True), ("fpu avx512_bf16", False):
        quirks.CPUINFO.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="utf-8")
        assert quirks.has_amx() == known


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@onednn
@pytest.mark.parametrize("size", [1, 3, 8, 13])
def test_on_two_threads_sampler_and_trainer_agree_as_well(nf4, two_threads, size):
    """As `make run` has them: more threads take more rows before an fp32 product, LoRA's, is the same for each."""
    trainer = bf16_trainer(nf4(b_scale=0.2), size, learning_rate=1e-2)
    for _ in range(2):
        _, stats = stepped(trainer, prompts(size))
        assert stats["objective/sampler_kl"] == stats["objective/sampler_max_diff"] == 0


@pytest.mark.slow
@onednn
def test_the_course_s_own_policy_samples_what_it_scores_on_two_threads(two_threads):
    """SmolLM2 in 4 bits at the profile's settings, adapters moved: the shapes of `make run`, at its second step."""
    policy, tokenizer = load_policy(CPU)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.01, generator=generator())
    trainer = PPOTrainer(CPU.ppo_config(max_new_tokens=16, ppo_epochs=1), policy, tokenizer=tokenizer)
    _, queries = trainer.encode(load_prompts(project_root() / CPU.prompts)[: trainer.config.batch_size])
    for _ in range(2):
        _, stats = stepped(trainer, queries)
        assert stats["objective/sampler_kl"] == stats["objective/sampler_max_diff"] == 0


@pytest.mark.parametrize("mini", [1, 2, 4, 8])
def test_minibatches_of_another_size_change_no_bit(policy, mini):
    trainer = bf16_trainer(policy(0.1), 8, mini, gradient_accumulation_steps=8 // mini)
    for _ in range(2):
        assert stepped(trainer, prompts(8))[1]["objective/sampler_max_diff"] == 0


def test_a_step_is_the_same_whether_or_not_the_policy_scores_its_own_samples(nf4):
    """Adapters, value head, Adam and every stat but the seconds: bit for bit."""
    ends = []
    for trusts in (False, True):
        trainer = bf16_trainer(nf4(b_scale=0.1), 8, 4, gradient_accumulation_steps=2, ppo_epochs=2)
        for _ in range(3):
            trainer.sampler_is_exact = trusts
            _, stats = stepped(trainer, prompts(8))
        assert stats["objective/sampler_max_diff"] == 0
        ends.append((tiny.state(trainer), {k: v for k, v in trainer.history[-1].items() if not k.startswith("time/")}))
    assert tiny.same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


@onednn
def test_where_the_first_update_sees_half_of_the_responses_that_half_is_compared(nf4):
    """The policy makes no pass before it at the second step; at the third, a sampler that is merely close is noticed."""
    trainer = bf16_trainer(nf4(b_scale=0.1), 8, 4)  # two optimizer steps an epoch
    passes = []
    score = trainer._score_tokens
    trainer._score_tokens = lambda rollout, rows, hidden=None: passes.append(hidden is None) or score(rollout, rows, hidden)
    for _ in range(2):
        _, stats = stepped(trainer, prompts(8))
        assert stats["objective/sampler_kl"] == stats["objective/sampler_max_diff"] == 0
    assert passes == [True] * 2 + [False] * 2
    assert trainer.rollout.first_logprobs.isnan().all(1).sum() == 4
    trainer.unpacked.layers[0].weights[3] = fast.in_layout(trainer.unpacked.layers[0].weights[3].to_dense() * 1.01)
    _, stats = stepped(trainer, prompts(8))
    assert stats["objective/sampler_kl"] > 0 and not trainer.sampler_is_exact
    stepped(trainer, prompts(8))
    assert passes[4:] == [False] * 2 + [True] * 2  # and from then on the pass is made


def test_responses_from_elsewhere_are_scored_and_their_sampler_is_not_known(nf4):
    trainer = bf16_trainer(nf4(b_scale=0.1))
    stepped(trainer, prompts(4))
    stats = trainer.step(*tiny.batch())
    assert stats["objective/sampler_kl"] != stats["objective/sampler_kl"]  # NaN
    assert not trainer.sampler_is_exact


def test_a_response_drawn_before_the_weights_moved_is_not_taken_for_a_new_one(nf4):
    trainer = bf16_trainer(nf4(b_scale=0.1))
    queries = prompts(4)
    responses, _ = stepped(trainer, queries)
    assert torch.isnan(torch.tensor(trainer.step(queries, responses, [1.0] * 4)["objective/sampler_kl"]))


@onednn
def test_a_sampler_that_is_merely_close_shows_in_the_stats_and_is_scored_again(nf4):
    """One value of the unpacked weights is off by a rounding."""
    trainer = bf16_trainer(nf4(b_scale=0.1))
    stepped(trainer, prompts(4))
    assert trainer.sampler_is_exact
    layer = trainer.unpacked.layers[0]
    layer.weights[3] = fast.in_layout(layer.weights[3].to_dense() * 1.01)
    _, stats = stepped(trainer, prompts(4))
    assert stats["objective/sampler_kl"] > 0 and stats["objective/sampler_max_diff"] > 1e-3
    assert stats["ppo/policy/first_ratio_error"] > 1e-3  # the sampler's log-probs were believed once more
    assert not trainer.sampler_is_exact
    _, stats = stepped(trainer, prompts(4))
    assert stats["objective/sampler_kl"] > 0 and stats["ppo/policy/first_ratio_error"] == 0  # and now no longer


def test_the_sampler_s_kl_is_k3_over_its_own_tokens_summed_over_a_response():
    """With d = the sampler's log-prob of a token minus the trainer's: e^-d - 1 + d, and 0 on pads."""
    mask = torch.tensor([[True, True], [True, False]])
    rollout = SimpleNamespace(mask=mask, sampler_logprobs=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]))
    stats = sampler_stats(rollout, SimpleNamespace(gather=lambda x: x), torch.tensor([[-1.5, -2.0], [-2.0, 9.0]]))
    k3 = lambda d: math.exp(-d) - 1 + d
    assert stats["objective/sampler_kl"] == pytest.approx((k3(0.5) + k3(-1.0)) / 2, rel=1e-6)
    assert stats["objective/sampler_max_diff"] == 1
    nan = math.nan  # a row that was not compared
    stats = sampler_stats(
        rollout, SimpleNamespace(gather=lambda x: x), torch.tensor([[-1.5, -2.0], [nan, nan]]), torch.tensor([0])
    )
    assert stats["objective/sampler_kl"] == pytest.approx(k3(0.5), rel=1e-6) and stats["objective/sampler_max_diff"] == 0.5


def test_fp32_agrees_to_a_hundred_thousandth():
    for make in (tiny.llama, lambda: tiny.gpt2()):
        targets = ("q_proj", "v_proj") if make is tiny.llama else ("c_attn",)
        trainer = tiny.trainer(tiny.with_lora(make(), targets=targets, b_scale=0.1), temperature=0.7)
        _, stats = stepped(trainer, prompts(4))
        assert 0 <= stats["objective/sampler_max_diff"] < 1e-5


# ---------------------------------------------------------------- the fast reader against the plain one


def both(lm, queries, **options):
    """Samples by the plain way and by the fast one."""
    keep_gradients(lm)  # as in every policy
    unpacked = fast.Unpacked(lm)
    reader = lambda most: fast.Reader(unpacked, True, most)
    make = lambda reader: sample(lm, queries, 12, EOS, PAD, 0.7, generator(3), reader=reader, **options)
    return make(None), make(reader)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj"), "all-linear"])
def test_the_fast_way_gives_the_bits_of_the_plain_one(nf4, size, targets):
    lm = nf4(targets, b_scale=0.2) if targets else nf4(None)
    plain, quick = both(lm, prompts(size))
    for name in ("responses", "logprobs", "hidden"):
        assert all(torch.equal(*pair) for pair in zip(getattr(plain, name), getattr(quick, name))), name


def test_without_adapters_the_fast_way_is_the_reference(nf4):
    lm = nf4(b_scale=0.2)
    trainer = bf16_trainer(lm)
    quick = trainer.generate(prompts(4), reference=True, generator=generator())
    with lm.disable_adapter(), trainer.model.without_dropout():
        plain = sample(lm, prompts(4), 12, trainer.eos_ids, PAD, 0.7, generator()).responses
    assert all(torch.equal(*pair) for pair in zip(quick, plain))


def test_the_fast_way_follows_the_adapters(nf4):
    lm = nf4(b_scale=0.2)
    unpacked = fast.Unpacked(lm)
    read = lambda: (
        sample(lm, prompts(4), 3, EOS, PAD, 0.7, generator(), reader=lambda n: fast.Reader(unpacked, True, n)).logprobs
    )
    before = read()
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data *= -1
    assert not torch.equal(torch.cat(before), torch.cat(read()))


def test_unpacking_changes_nothing_in_the_policy(nf4):
    lm = nf4("all-linear", b_scale=0.2)
    keep_gradients(lm)
    ids = tiny.batch(lengths=(6,))[1][0][None]
    before = lm(input_ids=ids).logits
    fast.Unpacked(lm)
    assert torch.equal(lm(input_ids=ids).logits, before)


@onednn
def test_only_what_the_fast_way_knows_takes_it(nf4, tmp_path):
    plain = nf4()
    assert fast.can_unpack(plain) and fast.can_unpack(nf4(None))
    for change in (dict(use_dora=True), dict(modules_to_save=["lm_head"]), dict(peft_type="IA3")):
        other = copy.deepcopy(plain)
        vars(other.active_peft_config).update(change)
        assert not fast.can_unpack(other)
    computes_in_fp32 = copy.deepcopy(plain)
    computes_in_fp32.get_base_model().model.layers[0].mlp.down_proj.compute_dtype = torch.float32
    head_in_fp32 = copy.deepcopy(plain)
    head_in_fp32.get_base_model().lm_head.float()
    assert not fast.can_unpack(computes_in_fp32) and not fast.can_unpack(head_in_fp32)
    plain.set_attn_implementation("sdpa")
    assert not fast.can_unpack(plain)
    assert not fast.can_unpack(tiny.llama().to(torch.bfloat16)) and not fast.can_unpack(tiny.gpt2())
    biased = tiny.llama(hidden_size=64, attention_bias=True)
    biased.bfloat16().save_pretrained(tmp_path)
    assert not fast.can_unpack(tiny.nf4_llama(tmp_path))
    single_tokens = dict(target_modules=["q_proj"], trainable_token_indices=[5, 6])
    assert not fast.can_unpack(get_peft_model(nf4(None), LoraConfig(task_type="CAUSAL_LM", **single_tokens)))


def test_without_onednn_a_4_bit_model_is_sampled_the_plain_way(nf4, monkeypatch):
    """As on a Mac, where PyTorch has not even the operations."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    trainer = tiny.trainer(nf4())
    assert trainer.unpacked is None and len(trainer.generate(prompts(4))) == 4


def test_a_model_that_the_fast_way_does_not_know_is_sampled_the_plain_way():
    trainer = PPOTrainer(tiny.trainer().config, tiny.trainer(tiny.gpt2()).model, tokenizer=tiny.tokenizer())
    assert trainer.unpacked is None and len(trainer.generate(prompts(4))) == 4


# ---------------------------------------------------------------- log-probs in less memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_entropies_and_gradients_are_those_of_the_plain_functions(dtype, temperature):
    g = generator()
    ids = torch.randint(0, 50, (3, 7), generator=g)
    mask = ppo.response_mask(torch.tensor([7, 1, 4]), 7)
    weights = torch.randn(3, 7, generator=g)
    results = []
    for chunk in (None, 5, 128):
        logits = (3 * torch.randn(3, 7, 50, generator=generator(1))).to(dtype)
        logits[1, 3] = torch.nan  # on a pad
        logits.requires_grad_()
        if chunk:
            logprobs, entropy = fast.token_logprobs(logits, ids, mask, temperature, chunk)
        else:
            logprobs = ppo.logprobs_from_logits(logits, ids, mask, temperature)
            entropy = ppo.entropy_from_logits(logits, mask, temperature)
        (logprobs * weights).sum().backward()
        results.append((logprobs.detach(), entropy, logits.grad))
    plain, few, many = results
    assert all(torch.equal(a, b) for a, b in zip(few, many))
    assert torch.equal(plain[0], few[0]) and torch.equal(plain[1], few[1])
    assert torch.equal(plain[2], few[2])
    assert not few[1].requires_grad


def test_nothing_of_the_size_of_the_logits_is_kept_in_fp32():
    kept = []
    logits = torch.randn(2, 40, 3000, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fast.token_logprobs(logits, torch.zeros(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.bool))
    assert sum(t.nbytes for t in kept if t.data_ptr() != logits.data_ptr()) < 10 * 2 * 40


def learnt(lm):
    """Logits and gradients of a pass over some tokens, and the bytes that autograd kept of it."""
    kept = {}
    pack = lambda t: kept.setdefault(t.data_ptr(), t)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = lm(torch.randint(16, tiny.V, (3, 12), generator=generator())).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits, [p.grad for p in lm.parameters() if p.requires_grad], sum(t.nbytes for t in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlps_that_keep_less_give_the_same_gradients(dtype):
    lm = tiny.with_lora(tiny.llama().to(dtype), ("q_proj", "gate_proj", "up_proj", "down_proj"), b_scale=0.2)
    logits, gradients, bytes_kept = learnt(lm)
    gradients = [gradient.clone() for gradient in gradients]
    lm.zero_grad()
    with fast.keeping_less(lm):
        ours, our_gradients, fewer = learnt(lm)
    assert torch.equal(logits, ours) and len(gradients) == 2 * 2 * 4
    assert all(torch.equal(a, b) and a.any() for a, b in zip(gradients, our_gradients))
    layers, tokens, width = 2, 3 * 12, 64
    assert bytes_kept - fewer == layers * tokens * width * dtype.itemsize
    assert learnt(lm)[2] == bytes_kept  # outside, all is as it was


def mlps(lm):
    return {type(layer.mlp) for layer in getattr(lm, "get_base_model", lambda: lm)().model.layers}


def test_updates_keep_less_and_give_the_same_weights(nf4, monkeypatch):
    trained, kinds = [], []
    for less in (True, False):
        with monkeypatch.context() as now:
            seen = fast.keeping_less if less else lambda lm: contextlib.nullcontext()
            now.setattr(fast, "keeping_less", seen)
            trainer = bf16_trainer(nf4(b_scale=0.2), mini=2, ppo_epochs=3, learning_rate=1e-2)
            minibatch, lm = trainer._minibatch, trainer.model.pretrained_model
            trainer._minibatch = lambda *args: kinds.append(mlps(lm)) or minibatch(*args)
            for _ in range(2):
                stepped(trainer, prompts(4))
        trained.append([p.detach().clone() for p in trainer.parameters])
        assert mlps(lm) == {LlamaMLP}
    assert all(torch.equal(a, b) for a, b in zip(*trained))
    half = len(kinds) // 2
    assert kinds == [{fast.GatedMLP}] * half + [{LlamaMLP}] * half and half == 2 * 3 * 2


def quieter(lm):
    """Another activation in the place of silu."""
    for layer in lm.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


def listened(lm):
    for layer in lm.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [quieter, listened, lambda lm: lm.to("meta")], ids=["other", "listened to", "not on a CPU"])
def test_an_mlp_that_is_not_the_plain_one_on_a_cpu_stays_as_it_is(change):
    lm = tiny.llama()
    change(lm)
    with fast.keeping_less(lm):
        assert mlps(lm) == {LlamaMLP}


@onednn
@pytest.mark.parametrize("how", ["off", "merged"])
def test_adapters_that_are_off_or_merged_are_so_for_the_fast_sampler_too(nf4, how):
    trainer = bf16_trainer(nf4(b_scale=0.5))
    queries, lm = prompts(4), trainer.model.pretrained_model
    ordinary = trainer.generate(queries, generator=generator())
    assert trainer.unpacked and all(response.drawn.weights for response in ordinary)
    if how == "merged":
        lm.merge_adapter()
    with trainer.model.adapters_off() if how == "off" else contextlib.nullcontext():
        fast_way = trainer.generate(queries, generator=generator())
        trainer.unpacked, kept = None, trainer.unpacked
        plain_way = trainer.generate(queries, generator=generator())
        trainer.unpacked = kept
    assert all(map(torch.equal, fast_way, plain_way)) and not all(map(torch.equal, fast_way, ordinary))
    assert all(response.drawn.weights is None for response in fast_way + plain_way)


@onednn
@pytest.mark.parametrize("unpacked_before", [False, True], ids=["first sampled merged", "first sampled before"])
def test_after_merging_and_taking_it_back_sampler_and_trainer_agree_again(nf4, unpacked_before):
    """PEFT puts other weights in place, and taking the adapters out again rounds once more."""
    trainer = bf16_trainer(nf4(b_scale=0.5))
    queries, lm = prompts(4), trainer.model.pretrained_model
    if unpacked_before:
        trainer.generate(queries)
    lm.merge_adapter()
    trainer.generate(queries)
    lm.unmerge_adapter()
    keep_gradients(lm)
    stats = trainer.step(queries, trainer.generate(queries), [0.5, -0.5, 1.0, 0.0])
    assert stats["objective/sampler_max_diff"] == 0
