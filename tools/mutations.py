"""Would the tests notice? `python tools/mutations.py` puts one fault at a time into a copy of the package, runs the fast unit
tests there, and prints which one failed first. A fault that none of them notices is named, and the exit status is 1.

The table of faults is worth reading by itself: none of them raises an error, and most of them still train something.
`--list` prints it, `--only NAME` tries one fault. The working tree is never touched. About ten minutes on one thread."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("rlhf_helpers", "tests", "pyproject.toml", "conftest.py")
TESTS = ("ppo", "rollout", "sampling", "models", "faults", "oracle", "trainer", "fast", "checkpoint", "files", "reward",
         "evaluation", "interrupts", "neighbours", "refusals", "slips", "processes")  # fmt: skip

# A file of rlhf_helpers; what stands there, exactly once; what is put in its place; the tests/test_*.py to try first.
Fault = namedtuple("Fault", "name file old new tests")
FAULTS = [
    # masks: which tokens count
    Fault("mask off by one", "ppo.py", "< lengths[:, None]", "<= lengths[:, None]", "ppo"),
    Fault("mean over pads", "ppo.py", "/ total(mask.sum()).clamp(min=1)", "/ mask.numel()", "ppo"),
    Fault("whitening without mask", "rollout.py", "ppo.whiten(raw, mask,", "ppo.whiten(raw, torch.ones_like(mask),", "rollout"),
    Fault("EOS masked out", "rollout.py",
          "mask = ppo.response_mask(torch.tensor([len(r) for r in responses]), response_ids.shape[1])",
          "mask = response_ids != pad_id", "rollout"),
    # sampling and the forward pass: what is sampled is what is scored
    Fault("EOS of the prompt ends the response", "sampling.py",
          "ended = torch.zeros(len(queries), 1, dtype=torch.bool, device=device)",
          "ended = torch.isin(tokens[: len(queries)], ends).any(1, keepdim=True)", "sampling"),
    Fault("positions count left padding", "models.py", "return (attention_mask.cumsum(1) - 1).clamp(min=0)",
          "return torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)", "models"),
    Fault("values read one position late", "models.py", "self.v_head(hidden[-1])", "self.v_head(hidden[-1].roll(-1, 1))", "models"),
    Fault("dropout left on", "models.py", "self.eval()", "pass", "models"),
    Fault("4-bit layers unprotected", "models.py", "keep_gradients(causal_lm)", "pass", "faults"),
    Fault("4-bit reference unprotected", "parts.py", "    keep_gradients(lm)  #", "    pass  #", "trainer"),
    Fault("reference that moves with the policy", "parts.py", "        check_stays_as_reference(model)\n", "        pass\n", "refusals"),
    Fault("reference with adapters on", "trainer.py", "with self.model.adapters_off():",
          "with torch.no_grad():", "oracle"),
    Fault("log-probs at another temperature", "trainer.py", "rollout.response_ids[rows], mask, config.temperature)",
          "rollout.response_ids[rows], mask)", "trainer"),
    Fault("reference at another temperature", "trainer.py", "token_logprobs(ref_logits, ids, mask, temperature)",
          "token_logprobs(ref_logits, ids, mask)", "faults"),
    Fault("samples of former weights believed", "sampling.py", "note.temperature == temperature and note.weights == weights",
          "note.temperature == temperature", "fast"),
    Fault("sampler believed before it was compared", "trainer.py",
          'self.sampler_is_exact = stats["objective/sampler_max_diff"] == 0', "self.sampler_is_exact = True", "fast"),
    # rewards and advantages
    Fault("score on the pad", "ppo.py", "last = mask.sum(1) - 1", "last = torch.full((len(mask),), mask.shape[1] - 1)", "ppo"),
    Fault("k3 in the reward", "ppo.py", 'if kind == "kl":\n        return difference',
          'if kind == "kl":\n        return torch.exp(-difference) - 1 + difference', "ppo"),
    Fault("lam and gamma swapped", "rollout.py", "config.gamma, config.lam", "config.lam, config.gamma", "oracle"),
    Fault("a value after the last token", "ppo.py", "next_value = next_advantage = torch.zeros_like(rewards[:, 0])",
          "next_value, next_advantage = values[:, -1], torch.zeros_like(rewards[:, 0])", "ppo"),
    # losses and the optimizer step
    Fault("ratio upside down", "ppo.py", "(logprobs - old_logprobs).clamp(", "(old_logprobs - logprobs).clamp(", "ppo"),
    Fault("min for max in the policy loss", "ppo.py", "return torch.max(unclipped, clipped)",
          "return torch.min(unclipped, clipped)", "ppo"),
    Fault("old log-probs taken anew", "trainer.py", "new.logprobs, rollout.logprobs[rows], rollout.advantages[rows]",
          "new.logprobs, new.logprobs.detach(), rollout.advantages[rows]", "oracle"),
    Fault("value clip dropped", "ppo.py",
          "near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)", "near = values", "ppo"),
    Fault("accumulation unweighted", "trainer.py", "loss * rollout.mask[rows].sum() / tokens_per_process",
          "loss / self.config.gradient_accumulation_steps", "oracle"),
    Fault("gradient clip skipped", "trainer.py", "self.config.max_grad_norm or math.inf", "math.inf", "oracle"),
    Fault("an update that is not finite is made", "trainer.py", "        if usable:\n", "        if True:\n",
          "trainer"),
    Fault("a good minibatch makes up for one above the ratio threshold", "trainer.py", "usable &= math.isfinite", "usable = math.isfinite",
          "trainer"),
    # the fast sampler: the plain one's bits, sooner
    Fault("sampling without the adapters", "fast.py", "    if adapters:\n        downs", "    if False:\n        downs", "fast"),
    Fault("a gate without its up on the way back", "fast.py", "silu_backward(gradient * up, gate)", "silu_backward(gradient, gate)", "fast"),
    Fault("LoRA's scaling forgotten", "fast.py", "(F.linear(narrow, up) * scaling)", "F.linear(narrow, up)", "fast"),
    Fault("LoRA in bf16", "fast.py", "for down in downs], -1)", "for down in downs], -1).bfloat16().float()", "fast"),
    Fault("left padding is looked at", "fast.py", "F.pad(attention.bool(),", "F.pad(torch.ones_like(attention).bool(),", "fast"),
    Fault("attention's scores in fp32", "fast.py", "torch.matmul(query, keys.transpose(2, 3))",
          "torch.matmul(query.float(), keys.float().transpose(2, 3))", "fast"),
    Fault("rotated one place on", "fast.py", "lm.model.rotary_emb(x, positions)", "lm.model.rotary_emb(x, positions + 1)", "fast"),
    Fault("a prompt that sees its future", "fast.py", "device=seen.device).tril(attention.shape[1] - width)", "device=seen.device)", "fast"),
    Fault("rows that were not compared count as equal", "stats.py", "difference = torch.where(rollout.mask, rollout.sampler_logprobs - logprobs, 0.0)[rows]",
          "difference = torch.where(rollout.mask, rollout.sampler_logprobs - logprobs, 0.0).nan_to_num()", "fast"),
    Fault("gradient at another temperature", "fast.py", "slope.div_(ctx.temperature)", "slope", "fast"),
    # stats: what everything is judged by
    Fault("KL a token for KL a response", "stats.py", "kl = torch.where(mask, rollout.kl, 0.0).sum(1)",
          "kl = torch.where(mask, rollout.kl, 0.0).mean(1)", "oracle"),
    Fault("sampler's KL the other way round", "stats.py", "rollout.sampler_logprobs - logprobs", "logprobs - rollout.sampler_logprobs",
          "fast"),
    Fault("unexplained variance for explained", "stats.py", '1 - stats["ppo/val/error"] / returns_var',
          'stats["ppo/val/error"] / returns_var', "oracle"),
    Fault("clipped values for clipped tokens", "stats.py", '"policy/clipfrac": mean(new.policy_clipped.float())',
          '"policy/clipfrac": mean(new.value_clipped.float())', "oracle"),
    Fault("every response counts as ended", "sampling.py", "torch.tensor(list(map(has, responses, ends)))", "torch.tensor([True] * len(ends))", "trainer"),
    # the reward model
    Fault("label 0 is the good one", "reward.py", "logits.softmax(-1)[:, 1]", "logits.softmax(-1)[:, 0]", "reward"),
    Fault("scores not centred", "reward.py", "(self.raw(prompts, responses) - self.mean) / self.std",
          "self.raw(prompts, responses) / self.std", "reward"),
    Fault("a long response loses its end first", "reward.py", 'truncation="only_first"', 'truncation="longest_first"', "reward"),
    Fault("the rejected answer is taught", "pairwise.py", "-F.logsigmoid(chosen - rejected)", "-F.logsigmoid(rejected - chosen)",
          "reward"),
    # checkpoints: all comes back, or nothing
    Fault("merged adapters written over", "checkpoint.py", "if trainer.model.adapters_merged():", "if False:", "checkpoint"),
    Fault("somebody's files lost by a save", "files.py", "                    _keep_others(place)\n", "", "checkpoint"),
    Fault("Adam begins anew", "checkpoint.py", 'load_state_dict({"state": moments,', 'load_state_dict({"state": {},', "checkpoint"),
    Fault("random numbers begin anew", "checkpoint.py", "_set_random(state.random, trainer.generator.device, trainer.generator)",
          "_set_random(state.random, trainer.generator.device)", "checkpoint"),
    Fault("the KL coefficient stays", "checkpoint.py", "= state.steps_done, state.kl_coef, state.history",
          "= state.steps_done, trainer.kl_coef, state.history", "checkpoint"),
    Fault("a refused load leaves half of it", "checkpoint.py", "        _put(trainer, before)\n", "", "checkpoint"),
    Fault("a flipped bit is not seen", "files.py", 'if sha256 != about["sha256"]:', "if False:", "files"),
    Fault("the old folder goes before the new one stands", "files.py", "            place.rename(old)\n",
          "            shutil.rmtree(place)\n", "files"),
    Fault("renamed before it is on the disk", "files.py", "                flush(beside)\n", "", "files"),
    # several processes: one update, as of one
    Fault("whitened by each process alone", "trainer.py", "self.advantages)(rollout, config, total)",
          "self.advantages)(rollout, config)", "processes"),
    Fault("the sampler's KL summed over processes", "stats.py", '"objective/sampler_kl": (total / count)',
          '"objective/sampler_kl": (total / len(per_response))', "processes"),
    Fault("the batch's mean of each process alone", "advantages.py", "total(returns.sum()) / total(torch.ones_like(returns).sum())",
          "returns.mean()", "processes"),
    Fault("a process weighs its own tokens", "trainer.py", "self.total(rollout.mask[group].sum()) / self.accelerator.num_processes",
          "rollout.mask[group].sum()", "processes"),
    Fault("stats of one process", "trainer.py", "new, config.vf_coef, self.total)", "new, config.vf_coef, ppo.alone)", "processes"),
    Fault("another trainer's accumulation reaches ours", "trainer.py", "with half, accumulating_alone(self.accelerator):", "with half:",
          "neighbours"),
    Fault("a query changed after the drawing keeps its log-probs", "loop.py", "Drawn(query.clone(), ", "Drawn(query, ", "neighbours"),
    Fault("another adapter's draw counts as the policy's", "loop.py", " or model.active_adapters() != self.adapters", "", "neighbours"),
    Fault("saved though it cannot be resumed", "checkpoint.py", """    checked_history(lambda number: f"{folder}: not saved""",
          """    (lambda number: f"{folder}: not saved""", "neighbours"),
    Fault("an update that broke off leaves its gradient", "trainer.py",
          "        self.optimizer.zero_grad()  # an update before this one may have been interrupted\n", "", "trainer"),
    Fault("merged adapters are switched off", "models.py", "if self.has_adapters and self.adapters_merged():", "if False:", "trainer"),
    Fault("adapters that the optimizer does not have", "parts.py", '    check_still_there("step", model, parameters)\n', "", "slips"),
    Fault("half a step is kept", "interrupts.py", "raise AtOnce(signum)", "raise Interrupted(signum)", "interrupts"),
    Fault("adapters that are off are sampled with", "sampling.py", "not model.adapters_are_off())", "not reference)", "fast"),
    Fault("the same prompts for all processes", "loop.py", "num_processes + self.accelerator.process_index",
          "num_processes", "processes"),
    Fault("the same random numbers for all processes", "trainer.py", "config.seed + 1000 * self.accelerator.process_index",
          "config.seed", "processes"),
    Fault("random states of the first process for all", "checkpoint.py", "everyones[trainer.accelerator.process_index]",
          "everyones[0]", "processes"),
]  # fmt: skip

# pytest, once it is sure which package it tests: an editable install points to the working tree.
PYTEST = """import sys, pytest, rlhf_helpers
assert rlhf_helpers.__file__.startswith(sys.argv[1]), rlhf_helpers.__file__
sys.exit(pytest.main(sys.argv[2:]))"""


def broken(text, fault):
    """The text of the fault's file with the fault in it."""
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has {text.count(fault.old)} times, expected once: {fault.old!r}")
    return text.replace(fault.old, fault.new)


def first_failure(source, fault=None):
    """The first test that fails in a copy of `source` with the fault in it, or None if all pass. Returns (test, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "copy"
        shutil.copytree(source, copy)
        if fault:
            path = copy / "rlhf_helpers" / fault.file
            path.write_text(broken(path.read_text(encoding="utf-8"), fault), encoding="utf-8")
        order = dict.fromkeys([*(fault.tests.split() if fault else ()), *TESTS])
        options = ["-o", "addopts=", "-p", "no:nbval", "-p", "no:cacheprovider", "-m", "not slow", "-x", "-q"]
        command = [sys.executable, "-c", PYTEST, str(copy), *options, *(f"tests/test_{name}.py" for name in order)]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of ours
        environment = alone | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
        seconds = time.perf_counter() - started
    failed = re.search(r"^FAILED tests/(.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if run.returncode == 0 or (run.returncode == 1 and failed):
        return failed and failed[1], seconds
    what = fault.name if fault else "without a fault"  # an import error or a broken fixture proves nothing about the tests
    raise RuntimeError(f"{what}: no test failed, but pytest ended with {run.returncode}:\n{(run.stdout + run.stderr)[-3000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the faults and try none")
    parser.add_argument("--only", metavar="NAME", choices=[fault.name for fault in FAULTS], help="try this fault alone")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in (None, fault.name)]
    if options.list:
        for fault in faults:
            print(f"{fault.name} ({fault.file})\n  - {fault.old}\n  + {fault.new}".replace("\n   ", "\n     "))
        return 0
    survivors, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"  # of one moment: the working tree may go on changing
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / name)
        test, seconds = first_failure(source)
        if test:
            sys.exit(f"without a fault, {test} fails")
        print(f"without a fault, all tests pass ({seconds:.0f} s)\n")
        print("| fault | file | caught by | seconds |\n|---|---|---|---|", flush=True)
        for fault in faults:
            test, seconds = first_failure(source, fault)
            survivors += [] if test else [fault.name]
            print(f"| {fault.name} | {fault.file} | {test or 'NO TEST'} | {seconds:.0f} |", flush=True)
    caught = len(faults) - len(survivors)
    print(f"\n{caught} of {len(faults)} faults caught in {(time.perf_counter() - started) / 60:.1f} minutes")
    if survivors:
        print(f"no test catches: {', '.join(survivors)}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
