"""What TRL 1.12's own trainers need around the parts of this course (notebooks 06 and 08). The only module that imports trl; TRL itself
is used as it is.

TRL's PPOTrainer expects a reward model that reads the policy's token ids, and a value model of its own. Ours read text, and
share the policy's body. Two small modules stand between: `RewardOnText` and `ValueOnPolicy`."""

import contextlib
import functools
import importlib
import importlib.metadata
import json
import math
import sys
import tempfile
import time
import warnings
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    GenerationConfig,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

from rlhf_helpers.config import CPU, project_root
from rlhf_helpers.data import load_prompts, save_jsonl
from rlhf_helpers.machine import device_and_dtype, has_fast_bf16, peak_megabytes
from rlhf_helpers.models import encode_prompt, load_policy, resolve
from rlhf_helpers.pairwise import ShowProgress
from rlhf_helpers.parts import adam
from rlhf_helpers.quirks import keep_gradients
from rlhf_helpers.reward import RewardModel, base_samples, ensure_reward_model
from rlhf_helpers.trainer import PPOTrainer

VERSION = "1.12.0"
PPO = "trl.experimental.ppo"
MODULES = {"PPOTrainer": PPO, "PPOConfig": PPO} | dict.fromkeys(
    ("RewardTrainer", "RewardConfig", "DPOTrainer", "DPOConfig", "GRPOTrainer", "GRPOConfig", "RLOOTrainer", "RLOOConfig"),
    "trl",
)
EXPECTED = f"expected trl=={VERSION}: pip install trl=={VERSION}"


def trl_part(name):
    """A class of TRL. Raises ImportError, with one sentence, where the installed TRL has none of that name."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"TRL is not installed; {EXPECTED}") from None
    try:
        with quiet():
            return getattr(importlib.import_module(MODULES[name]), name)
    except (ImportError, AttributeError) as error:
        newer = tuple(map(int, version.split(".")[:2])) >= (1, 13)
        why = "removed in 1.13" if newer and "PPO" in name else str(error).splitlines()[0]
        raise ImportError(f"TRL {version} has no {name} ({why}); {EXPECTED}") from error


def missing(name="PPOTrainer"):
    """None where TRL has this class, else the sentence that says what to install."""
    try:
        trl_part(name)
    except ImportError as error:
        return str(error)


@contextlib.contextmanager
def quiet():
    """Without TRL's and transformers' warnings of what they mean to rename."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextlib.contextmanager
def own_adapters(lm):
    """While TRL builds a trainer on the PEFT model `lm`: it rounds the adapters of 4-bit models to bf16, where small steps vanish,
    and afterwards they are as they were. (TRL 1.12.0; can go when its GRPOTrainer leaves the adapters' dtype alone.)"""
    keep_gradients(lm)
    kept = {name: parameter.data.clone() for name, parameter in lm.named_parameters() if parameter.requires_grad}
    try:
        with quiet():
            yield
    finally:
        for name, parameter in lm.named_parameters():
            if name in kept:
                parameter.data = kept[name]


def train_quietly(trainer):
    """`trainer.train()` of any of TRL's trainers, without a line of thirty numbers for every update."""
    trainer.remove_callback(PrinterCallback)
    with quiet():
        trainer.train()


# ---------------------------------------------------------------- what PPOTrainer is given


class RewardOnText(nn.Module):
    """Any reward function of (prompts, responses) in the shape that TRL scores with: a backbone over the policy's token ids,
    and `score` on its last hidden state.

    The backbone finds out which of the known `prompts` a row begins with, decodes the rest, and gives the score of the pair
    at every position, as TRL reads it at the last. Raises ValueError if one prompt's ids begin with another's: then nobody
    could say where the response begins."""

    base_model_prefix = "backbone"

    def __init__(self, reward_fn, tokenizer, prompts, system=None):
        super().__init__()
        self.reward_fn, self.tokenizer, self.score = reward_fn, tokenizer, nn.Identity()
        self.prompts = {tuple(encode_prompt(tokenizer, prompt, system).tolist()): prompt for prompt in prompts}
        self.lengths = sorted({len(query) for query in self.prompts})
        for query, prompt in self.prompts.items():
            for start in (query[:length] for length in self.lengths if length < len(query)):
                if start in self.prompts:
                    raise ValueError(f"prompt {prompt!r} begins with prompt {self.prompts[start]!r}; expected one of the two")

    def split(self, ids):
        """(prompt, ids of the response) of one row without its pads."""
        for length in self.lengths:
            if tuple(ids[:length]) in self.prompts:
                return self.prompts[tuple(ids[:length])], ids[length:]
        raise ValueError(f"a row that begins with none of the {len(self.prompts)} prompts: {self.tokenizer.decode(ids)!r}")

    def backbone(self, input_ids, attention_mask, **_):
        rows = [ids[real].tolist() for ids, real in zip(input_ids, attention_mask.bool())]
        prompts, responses = zip(*map(self.split, rows))
        texts = self.tokenizer.batch_decode(list(responses), skip_special_tokens=True)
        scores = torch.as_tensor(self.reward_fn(list(prompts), texts), dtype=torch.float32, device=input_ids.device)
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])


class ValueOnPolicy(nn.Module):
    """TRL's value model without a second model: the policy's own body with its adapters off, which never changes and needs no
    gradient, and the policy's value head, which is all that trains."""

    base_model_prefix = "backbone"

    def __init__(self, policy):
        super().__init__()
        self.score = policy.v_head.summary
        object.__setattr__(self, "policy", policy)  # not a submodule: its weights are counted, and moved, as the policy's

    @torch.no_grad()
    def backbone(self, input_ids, attention_mask, position_ids, **_):
        lm = self.policy.pretrained_model
        body = (lm.get_base_model() if self.policy.has_adapters else lm).base_model
        with self.policy.adapters_off():
            out = body(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return SimpleNamespace(hidden_states=[out.last_hidden_state.float()])


def trl_arguments(config, steps, folder):
    """TRL's PPOConfig for `steps` updates like those of our PPOConfig. Raises ValueError for what TRL cannot do; it has no
    gradient clipping, ratio threshold or KL budget, and does without."""
    only = dict(kl_penalty="kl", adap_kl_ctrl=False, score_clip=None, early_stopping=False)
    for name, value in only.items():
        if getattr(config, name) != value:
            raise ValueError(f"TRL {VERSION} cannot do PPOConfig.{name} = {getattr(config, name)!r}; expected {value!r}")
    accumulation = config.gradient_accumulation_steps
    updates = config.batch_size // (config.mini_batch_size * accumulation)
    if accumulation > 1 and updates > 1:
        raise ValueError(
            f"TRL {VERSION} makes one optimizer step an epoch where it accumulates gradients; "
            "expected mini_batch_size x gradient_accumulation_steps = batch_size, or gradient_accumulation_steps = 1"
        )
    alike = ("gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "whiten_rewards", "seed")
    return trl_part("PPOConfig")(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size // accumulation,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=updates,
        num_ppo_epochs=config.ppo_epochs,
        total_episodes=steps * config.batch_size,
        response_length=config.max_new_tokens,
        stop_token="eos",  # by default TRL never stops
        missing_eos_penalty=config.missing_eos_penalty,
        temperature=config.temperature,
        kl_coef=config.init_kl_coef,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",  # TRL's own falls to 0
        **{name: getattr(config, name) for name in alike},
        bf16=False,  # autocast: our models bring their dtypes along
        gradient_checkpointing=False,  # the profile's policy brings it along, too
        use_cpu=device_and_dtype()[0].type == "cpu",
        num_sample_generations=0,
        disable_tqdm=True,
        save_strategy="no",
        report_to=config.log_with or "none",
        logging_steps=1,
    )


# ---------------------------------------------------------------- PPO


# Our key for what TRL logs; what means another thing (its non_score_reward, its shares over pads) is left out.
KEYS = {
    "ppo/mean_scores": "objective/scores",
    "objective/kl": "objective/kl",
    "objective/entropy": "objective/entropy",
    "ppo/loss/policy": "loss/policy_avg",
    "ppo/loss/value": "loss/value_avg",
    "ppo/learning_rate": "lr",
}


class History(TrainerCallback):
    """Keeps TRL's logs in `history`, under the keys of our stats, and calls `on_step(self, stats)` as our trainer does."""

    def __init__(self, on_step=None):
        self.on_step, self.history = on_step, []

    def on_train_begin(self, args, state, control, **_):
        self.clock = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        now = time.perf_counter()
        row = {ours: logs[theirs] for ours, theirs in KEYS.items()}
        self.history.append(row := {"step": state.global_step, **row, "time/total": now - self.clock})
        self.clock = now
        if self.on_step:
            self.on_step(self, row)


def ppo_trainer(policy, tokenizer, prompts, reward_fn, config, steps, folder, on_step=None):
    """TRL's PPOTrainer on our parts: `trainer.train()` trains `policy`, a PolicyWithValueHead, in place. The policy keeps its
    adapters, and is its own reference; `config` is our PPOConfig, `folder` where TRL may write."""
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError("tokenizer: pad is EOS, which TRL takes for padding, so EOS is never learnt; expected another pad")
    lm = policy.pretrained_model
    keep_gradients(lm)
    # What `generate` falls back to where TRL says nothing: no penalties and no cuts from the checkpoint.
    lm.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    with quiet():
        trainer = trl_part("PPOTrainer")(
            args=trl_arguments(config, steps, folder),
            processing_class=tokenizer,
            model=lm,
            ref_model=None,
            reward_model=RewardOnText(reward_fn, tokenizer, prompts, config.system),
            train_dataset=[{"input_ids": encode_prompt(tokenizer, prompt, config.system).tolist()} for prompt in prompts],
            value_model=ValueOnPolicy(policy),
            data_collator=DataCollatorWithPadding(tokenizer),
            optimizers=(adam(policy, config), None),
            callbacks=[History(on_step)],
        )
    trainer.remove_callback(PrinterCallback)  # a line of 17 numbers for every update
    return trainer


def train_with_trl(policy, tokenizer, prompts, reward_fn, config, steps, on_step=None):
    """`steps` updates by TRL's PPOTrainer. Returns the history: a list of dicts, under the keys of our stats."""
    with tempfile.TemporaryDirectory(prefix="trl-") as folder, quiet():
        trainer = ppo_trainer(policy, tokenizer, prompts, reward_fn, config, steps, folder, on_step)
        trainer.accelerator.print = lambda *_, **__: None  # "===training policy==="
        trainer.train()
    return next(c.history for c in trainer.callback_handler.callbacks if isinstance(c, History))


# ---------------------------------------------------------------- the reward model


@contextlib.contextmanager
def bf16_products(model):
    """While this lasts, a classifier's products are taken in bf16 on a CPU that can; its logits are fp32. So does PairwiseTrainer."""
    forward = model.forward

    @functools.wraps(forward)  # Trainer reads its parameters
    def cast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
            output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = cast
    try:
        yield
    finally:
        del model.forward


def train_reward_model_with_trl(pairs, encoder="minilm-l6-v2", epochs=2, batch_size=16, learning_rate=2e-4, seed=0, steps=-1):
    """(RewardModel, log), as `reward.train_reward_model` gives them, by TRL's RewardTrainer; not saved.

    By itself TRL would end each text in EOS, which an encoder lacks, and join prompt and answer without a sign between. So it
    is given ready ids: the tokenizer's own sentence pair. Its batches know no token types; this tokenizer leaves them out, when
    it scores, too."""
    from datasets import Dataset

    torch.manual_seed(seed)  # the new score layer is random
    source = resolve(encoder)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(source, num_labels=1))
    model.base_model.load_state_dict(AutoModel.from_pretrained(source, dtype=torch.float32).state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, model_input_names=["input_ids", "attention_mask"])
    rm = RewardModel(model, tokenizer)
    model.requires_grad_(True)
    prompts, ids = [pair["prompt"] for pair in pairs], {}
    for side in ("chosen", "rejected"):
        encoded = tokenizer(prompts, [pair[side] for pair in pairs], truncation=True, max_length=rm.max_length)
        ids[f"{side}_ids"] = encoded["input_ids"]
    with tempfile.TemporaryDirectory(prefix="trl-") as folder, quiet():
        arguments = trl_part("RewardConfig")(
            output_dir=folder,
            num_train_epochs=epochs,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=0.01,
            warmup_steps=5,
            logging_steps=5,
            max_length=None,  # cut already
            disable_dropout=False,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=device_and_dtype()[0].type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = trl_part("RewardTrainer")(model, arguments, train_dataset=Dataset.from_dict(ids), processing_class=tokenizer)
        trainer.add_callback(ShowProgress("TRL's reward model"))
        with bf16_products(model):
            train_quietly(trainer)
    rm.model.eval().requires_grad_(False)
    rm.standardise(*base_samples(pairs))
    return rm, [dict(step=row["step"], loss=float(row["loss"])) for row in trainer.state.log_history if "loss" in row]


# ---------------------------------------------------------------- side by side

WORK = dict(  # what differs from the profile: half its batch, and one gentle pass over it
    batch_size=8, mini_batch_size=8, gradient_accumulation_steps=1, ppo_epochs=1, learning_rate=5e-4, kl_budget=math.inf
)


def seconds_of(row):
    """Seconds of an update, sampling and scoring included, from a row of either trainer's history."""
    return row.get("time/total") or row["time/generate"] + row["time/reward"] + row["time/ppo/total"]


def run_alone(which, steps):
    """(history, peak memory in MB) of WORK by "trl" or "ours". The peak is the process's, so give each one of its own."""
    policy, tokenizer = load_policy(CPU)
    prompts, reward = load_prompts(project_root() / "data" / "prompts_train.jsonl"), ensure_reward_model()
    config = CPU.ppo_config(**WORK)
    if which == "trl":
        history = train_with_trl(policy, tokenizer, prompts, reward, config, steps)
    else:
        history = PPOTrainer(config=config, model=policy, tokenizer=tokenizer).train(prompts, reward, steps)
    return history, peak_megabytes()


if __name__ == "__main__":  # python -m rlhf_helpers.trl_bridge trl|ours STEPS [HISTORY.jsonl]
    history, peak = run_alone(sys.argv[1], int(sys.argv[2]))
    if len(sys.argv) > 3:
        save_jsonl(sys.argv[3], [{"step": row["step"], **{key: round(row[key], 5) for key in KEYS}} for row in history])
    print(json.dumps(dict(trainer=sys.argv[1], seconds=[seconds_of(row) for row in history], peak_megabytes=peak)))
