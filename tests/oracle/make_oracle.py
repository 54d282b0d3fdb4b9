"""Make the oracle again: what TRL 0.11.4's PPOTrainer.step computes on a tiny fp32 Llama.

In an environment of its own (TRL 0.11.4 needs an older transformers than this course), with Python 3.11:

    python -m venv oracle-env
    oracle-env/bin/pip install trl==0.11.4 transformers==4.46.3 peft==0.13.2 accelerate==1.1.1 torch==2.13.0 rich==15.0.0
    oracle-env/bin/python tests/oracle/make_oracle.py FOLDER

Models and inputs are read from the files beside this script; a CASE.json and a CASE.safetensors for each case are written to
FOLDER. No network is needed. Where files with these names lie beside the script, the largest difference is printed."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

HERE = Path(__file__).parent
COMMON = dict(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-3, log_with=None, seed=0, init_kl_coef=0.2)
CASES = {  # what a case changes in COMMON; "side", "lora" and "steps" are of the run, not of PPOConfig
    "base": {},
    "epochs4_mb1": dict(ppo_epochs=4, mini_batch_size=1),
    "two_steps": dict(ppo_epochs=4, mini_batch_size=2, steps=2),
    "seed_like": dict(ppo_epochs=4, mini_batch_size=1, learning_rate=1e-5),
    "left_pad": dict(ppo_epochs=2, mini_batch_size=2, side="left"),
    "lora": dict(ppo_epochs=4, mini_batch_size=2, lora=True, steps=2),
    "kl_full": dict(kl_penalty="full"),
    "whiten_rewards_left": dict(whiten_rewards=True, side="left"),
    "adaptive_kl_short_horizon": dict(horizon=100.0, target=0.1, steps=2),
    "whiten_rewards": dict(whiten_rewards=True),
    "epochs4_mb2_ga2": dict(ppo_epochs=4, mini_batch_size=1, gradient_accumulation_steps=2),
    "max_grad_norm": dict(ppo_epochs=4, max_grad_norm=0.05),
}


def tokenizer(side):
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t3"))
    special = dict(pad_token="t0", eos_token="t1", bos_token="t2", unk_token="t3")
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side=side, **special)


def model(weights, lora=False):
    lm = LlamaForCausalLM(LlamaConfig(**json.loads((HERE / "config.json").read_text()))).float()
    lm.load_state_dict(load_file(HERE / f"{weights}.safetensors"), strict=False)  # the head is tied
    if lora:
        targets = ["q_proj", "v_proj"]
        lm = get_peft_model(lm, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"))
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(lm)
    parameters = dict(wrapped.named_parameters())
    for file in ["vhead", *(["lora_init"] if lora else [])]:
        for name, tensor in load_file(HERE / f"{file}.safetensors").items():
            parameters[name].data.copy_(tensor)
    return wrapped


class Recorder:
    """A PPOTrainer whose methods leave what they return in `tensors` and in the notes of the current step."""

    def __init__(self, trainer):
        self.trainer, self.tensors, self.number = trainer, {}, -1
        for name in ("batched_forward_pass", "compute_rewards", "compute_advantages", "loss"):
            setattr(trainer, name, self.watched(getattr(trainer, name), getattr(self, "after_" + name)))
        self.optimizer_step, trainer.optimizer.step = trainer.optimizer.step, self.on_optimizer_step
        self.permutation = np.random.permutation

    @staticmethod
    def watched(method, after):
        def call(*args, **kwargs):
            result = method(*args, **kwargs)
            after(args, result)
            return result

        return call

    def keep(self, names, tensors, place=""):
        for name, tensor in zip(names.split(), tensors):
            self.tensors[f"step{self.number}/{place}{name}"] = tensor.detach().clone().contiguous()

    def after_batched_forward_pass(self, args, result):
        logprobs, _, values, mask = result
        self.passes += 1
        if self.passes == 1:
            self.keep("input_ids attention_mask", [args[3]["input_ids"], args[3]["attention_mask"]])
            self.keep("old_logprobs old_values old_mask", [logprobs, values, mask])
        elif self.passes == 2:  # the reference; after it come the passes of training
            self.keep("ref_logprobs", [logprobs])

    def after_compute_rewards(self, args, result):
        self.keep("rewards non_score_rewards kls", result)

    def after_compute_advantages(self, args, result):
        self.keep("advantages returns", result[1:])

    def after_loss(self, args, result):
        old_logprobs, values, _, predicted, logprobs, mask, advantages, returns = args
        place = f"mb{len(self.notes['minibatch_losses'])}/"
        self.keep("logprobs old_logprobs mask", [logprobs, old_logprobs, mask], place)
        self.notes["minibatch_losses"].append({key: x.item() for key, x in result[2].items() if x.numel() == 1})

    def on_optimizer_step(self, *args, **kwargs):
        if self.trainer.accelerator.sync_gradients:  # else accelerate makes this call a no-op
            gradients = {name: p.grad for name, p in self.trainer.model.named_parameters() if p.grad is not None}
            minibatch = len(self.notes["minibatch_losses"]) - 1
            if minibatch <= 1:
                self.keep(" ".join(gradients), gradients.values(), f"opt_after_mb{minibatch}/grad/")
            self.notes["grad_norms_at_optimizer_step"].append(
                sum(float(g.double().pow(2).sum()) for g in gradients.values()) ** 0.5
            )
        return self.optimizer_step(*args, **kwargs)

    def step(self, queries, responses, scores):
        self.number, self.passes = self.number + 1, 0
        self.notes = dict(permutations=[], minibatch_losses=[], grad_norms_at_optimizer_step=[])
        np.random.permutation = lambda n: (
            self.notes["permutations"].append(self.permutation(n)) or self.notes["permutations"][-1]
        )
        try:
            stats = self.trainer.step(*([torch.tensor(x) for x in given] for given in (queries, responses, scores)))
        finally:
            np.random.permutation = self.permutation
        self.notes["permutations"] = [order.tolist() for order in self.notes["permutations"]]
        stats = {key: np.asarray(value).tolist() for key, value in stats.items() if not key.startswith("time/")}
        return self.notes | dict(stats=stats, kl_coef_after=float(self.trainer.kl_ctl.value))


def make(name, steps=1, side="right", lora=False, **changes):
    config = PPOConfig(**COMMON | changes)
    recorder = Recorder(PPOTrainer(config, model("policy", lora), None if lora else model("ref"), tokenizer(side)))
    inputs = json.loads((HERE / "inputs.json").read_text())
    done = [recorder.step(inputs["queries"], inputs["responses"][i], inputs["scores"][i]) for i in range(steps)]
    final = {f"final/{n}": p.detach().clone() for n, p in recorder.trainer.model.named_parameters()}
    kept = {key: value for key, value in vars(config).items() if isinstance(value, (int, float, str, bool, type(None)))}
    return dict(name=name, config=kept, padding_side=side, lora=lora, steps=done), recorder.tensors | final


def difference(name, case, tensors):
    """Largest difference to the files beside this script, over tensors and scalars that both have."""
    old, old_tensors = json.loads((HERE / f"{name}.json").read_text()), load_file(HERE / f"{name}.safetensors")
    apart = [
        (tensors[key].double() - old_tensors[key].double()).abs().max().item() for key in tensors.keys() & old_tensors.keys()
    ]
    for new, was in zip(case["steps"], old["steps"]):
        assert new["permutations"] == was["permutations"]
        apart += [abs(new["stats"][key] - was["stats"][key]) for key in was["stats"] if isinstance(was["stats"][key], float)]
    return max(apart)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in CASES.items():
        case, tensors = make(name, **changes)
        save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(case, indent=1) + "\n")
        print(f"{name:28s} {len(tensors):4d} tensors, largest difference {difference(name, case, tensors):.1e}")
