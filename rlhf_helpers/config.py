"""Settings: `PPOConfig` (one PPO run) and the two profiles, `CPU` and `GPU`. Plain data, no torch."""

import math
import os
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from rlhf_helpers.classic import CONFIG, instead
from rlhf_helpers.errors import InputError, MissingInput
from rlhf_helpers.files import is_whole_unicode, shown

REPOSITORY = "https://github.com/OWNER/rlhf-ppo-notebooks"  # the one place that knows the repository's address
DATA_FILE = "data/pairwise_prefs_part_1.jsonl"
HELDOUT_FILE = "data/prompts_heldout.jsonl"  # "dev": recipes are chosen on these
TEST_FILE = "data/prompts_test.jsonl"  # what a finished recipe is judged on, once


LARGEST = 1e30  # of a setting: in fp32 numbers end at 3.4e38, and some are multiplied
COMPARED = ("ratio_threshold", "target_kl", "kl_budget", "target", "horizon")  # these never meet a tensor


def project_root():
    """The folder with `data/` and `output/`: the nearest one above the working directory that holds the preference file,
    else the one this package was cloned with, else (installed from a wheel) the working directory. The variable RLHF_HOME
    overrides all."""
    if home := os.environ.get("RLHF_HOME"):
        return Path(home)
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / DATA_FILE).is_file():
            return folder
    return Path.cwd()


def course_file(name):
    """The path of a file of the course's own data. Raises MissingInput where there is none, as outside a clone."""
    path = project_root() / name
    if not path.is_file():
        raise MissingInput(
            f"{path}: no such file; expected the course's data: work in a clone of {REPOSITORY}, or name files of your own "
            "(--prompts, --heldout, --reward-model)"
        )
    return path


def setting(default, meaning):
    """A field with its default and one line on what it is, which `--help` prints."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class PPOConfig:
    """One PPO run. Names and defaults are TRL 0.11's where TRL had the field; the last block is ours.

    Raises InputError that names the field, its value and what is expected. Numbers are Python's own: no strings, no numpy."""

    batch_size: int = setting(128, "responses per step, per process")
    mini_batch_size: int = setting(128, "responses per forward and backward pass")
    gradient_accumulation_steps: int = setting(1, "minibatches per optimizer step, weighted by their tokens")
    ppo_epochs: int = setting(4, "passes over the batch in one step")
    learning_rate: float = setting(1.41e-5, "Adam, constant")
    gamma: float = setting(1.0, "discount per token")
    lam: float = setting(0.95, "GAE's lambda: 0 is one-step TD, 1 is reward-to-go minus the value")
    cliprange: float = setting(0.2, "the ratio counts within 1 - cliprange .. 1 + cliprange")
    cliprange_value: float = setting(0.2, "the value may move this far from the old one per step")
    vf_coef: float = setting(0.1, "weight of the value loss")
    init_kl_coef: float = setting(0.2, "price of one nat of KL, in units of the score")
    adap_kl_ctrl: bool = setting(True, "move the coefficient towards `target` (Ziegler et al. 2019)")
    target: float = setting(6.0, "nats of KL per response that the controller aims at")
    horizon: float = setting(10000.0, "responses over which the controller moves")
    kl_penalty: str = setting(
        "kl", '"kl" (log-ratio), "full" (whole vocabulary); "abs", "mse": no nats, and target and kl_budget count in these'
    )
    whiten_rewards: bool = setting(False, "give the per-token rewards variance 1, keep their mean")
    score_clip: float | None = setting(None, "keep scores within -score_clip .. score_clip")
    early_stopping: bool = setting(False, "end a step's epochs when policykl of the last minibatch passes 1.5 x target_kl")
    target_kl: float = setting(1.0, "nats per token, for early_stopping")
    max_grad_norm: float | None = setting(None, "clip the gradient's norm at every optimizer step")
    ratio_threshold: float = setting(10.0, "leave out an update if a minibatch of it has a mean ratio above this")
    seed: int = setting(0, "of sampling, of the order of minibatches and of the prompts")
    log_with: str | None = setting(None, 'an Accelerate tracker: "tensorboard", "trackio" or "wandb"')

    value_learning_rate: float | None = setting(None, "of the value head; None: learning_rate")
    temperature: float = setting(1.0, "divides the logits, when sampling and when scoring alike")
    max_new_tokens: int = setting(50, "longest response, in tokens")
    system: str | None = setting(None, "the system's turn before every prompt that has none of its own")
    num_generations: int = setting(
        1, "responses to each prompt of a step (PPO takes them as any others; groups need an advantage of their own, in Python)"
    )
    missing_eos_penalty: float | None = setting(None, "taken from the score of a response without EOS")
    kl_budget: float | None = setting(
        None, "objective/kl per response, mean of 4 steps, past which train() ends (Gao et al. 2023)"
    )

    def __new__(cls, *_, **settings):
        for name, value in settings.items():
            if name not in cls.__dataclass_fields__:
                known = instead(name, CONFIG) or f"; expected one of {', '.join(cls.__dataclass_fields__)}"
                raise InputError(f"PPOConfig has no setting {name} (given as {shown(value)}){known}")
        return super().__new__(cls)

    def __post_init__(self):
        def need(name, ok, expected):
            if not ok(getattr(self, name)):
                raise InputError(f"PPOConfig.{name} is {getattr(self, name)!r:.80}; expected {expected}")

        whole = lambda value: type(value) is int  # not True, which is 1 too
        number = lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max
        numbers = [field.name for field in fields(PPOConfig) if "float" in str(field.type)]
        numbers = [name for name in numbers if type(getattr(self, name)) in (int, float)]
        for name in numbers:
            if name not in COMPARED:
                need(name, lambda value: not LARGEST < abs(value) < math.inf, f"no more than {LARGEST:g} either way")
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "max_new_tokens",
                     "num_generations"):  # fmt: skip
            need(name, lambda value: whole(value) and 1 <= value < 2**31, "a whole number from 1")
        for name in ("learning_rate", "cliprange", "cliprange_value", "vf_coef", "init_kl_coef"):
            need(name, lambda value: number(value) and value >= 0, "a number from 0")
        for name in ("target", "horizon", "target_kl", "ratio_threshold", "temperature"):
            need(name, lambda value: number(value) and value > 0, "a number above 0")
        for name in ("gamma", "lam"):
            need(name, lambda value: number(value) and 0 <= value <= 1, "a number from 0 to 1")
        for name in ("score_clip", "max_grad_norm", "value_learning_rate", "missing_eos_penalty"):
            need(name, lambda value: value is None or (number(value) and value > 0), "None or a number above 0")
        for name in ("adap_kl_ctrl", "whiten_rewards", "early_stopping"):
            need(name, lambda value: type(value) is bool, "True or False")
        budget = lambda value: value is None or (number(value) and value > 0) or (type(value) is float and value == math.inf)
        need("kl_budget", budget, "None, inf or a number above 0")
        text = lambda value: value is None or (type(value) is str and value.strip() and is_whole_unicode(value))
        kinds = ("kl", "abs", "mse", "full")
        need("kl_penalty", lambda value: type(value) is str and value in kinds, '"kl", "abs", "mse" or "full"')
        need("system", text, "None or some text")
        need("log_with", lambda value: value is None or (type(value) is str and value), "None or a tracker's name")
        need("seed", lambda value: whole(value) and 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
        if self.adap_kl_ctrl and self.horizon <= 0.2 * self.batch_size:
            raise InputError(
                f"PPOConfig.horizon is {self.horizon}; expected above 0.2 x batch_size = {0.2 * self.batch_size:g}: a step far below "
                "the target would turn the coefficient negative"
            )
        group = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % group:
            raise InputError(
                f"PPOConfig.batch_size is {self.batch_size}; expected a multiple of mini_batch_size x "
                f"gradient_accumulation_steps = {self.mini_batch_size} x {self.gradient_accumulation_steps} = {group}"
            )
        if self.batch_size % self.num_generations:
            raise InputError(
                f"PPOConfig.batch_size is {self.batch_size}; expected a multiple of num_generations = {self.num_generations}"
            )
        for name in numbers:
            setattr(self, name, float(getattr(self, name)))  # torch takes no whole number of more than 64 bits


def steps_of_this_run(full, fast):
    """What a notebook takes of steps, prompts, pairs, answers or tokens: `full`, or `fast` where RLHF_FAST=1 is set, as it is when
    notebooks run as tests. It is the only thing that the short setting changes."""
    return fast if os.environ.get("RLHF_FAST") == "1" else full


@dataclass(frozen=True)
class Profile:
    """Where a run happens and with what. `ppo` holds what differs from PPOConfig's defaults."""

    name: str
    model: str  # a name that `models.resolve` knows, a folder, or org/model on a hub
    reward_model: str = "output/reward_model_pairwise"
    prompts: str = DATA_FILE
    heldout_prompts: str = HELDOUT_FILE
    system: str | None = "Answer in one or two short sentences."  # before every prompt; None: no such turn
    steps: int = 32  # PPO steps of the main job, at most: the KL budget may end it earlier
    lora_r: int = 8
    lora_alpha: int = 16
    lora_targets: tuple = ("q_proj", "v_proj")
    gradient_checkpointing: bool = False
    ppo: dict = field(default_factory=dict)

    def ppo_config(self, **overrides):
        """The profile's PPOConfig with `overrides` as they are given, None included: kl_budget=None is a run without a budget."""
        return PPOConfig(**{"system": self.system, **self.ppo, **overrides})


CPU = Profile(
    name="cpu",
    model="smollm2-135m-instruct",
    ppo=dict(
        batch_size=steps_of_this_run(16, 8),  # enough for a steady advantage, few enough for 9 seconds a step on two slow cores
        mini_batch_size=steps_of_this_run(8, 4),  # half of it at a time, which keeps the run under 3 GB
        gradient_accumulation_steps=2,  # both halves make one optimizer step
        ppo_epochs=1,  # a second pass sees the same 16 scores, and was not shown to bring more in the same minutes
        learning_rate=2e-3,  # chosen on dev prompts; LoRA wants some ten times the rate of full fine-tuning
        value_learning_rate=1e-3,
        lam=1.0,  # the score comes last: with 0.95 it hardly reaches the first of 50 tokens until the value head is good
        init_kl_coef=0.05,  # a nat costs a twentieth of a deviation of the scores
        adap_kl_ctrl=False,  # at TRL's horizon of 10,000 responses a run of 500 would hardly move it
        kl_budget=9.0,  # the run ends past this mean of four steps; on test prompts the policies were then at 8.6 to 12.2 nats
        max_grad_norm=1.0,
        temperature=0.7,  # at 1.0 a model this small rambles
        max_new_tokens=steps_of_this_run(64, 16),  # 6 of 10 answers of the untrained model end within 64
    ),
)

GPU = replace(
    CPU,
    name="gpu",
    model="mistralai/Mistral-7B-Instruct-v0.1",
    gradient_checkpointing=True,  # a 16 GB card
    ppo={**CPU.ppo, "mini_batch_size": 4, "gradient_accumulation_steps": steps_of_this_run(4, 2), "learning_rate": 2e-4},
)

PROFILES = {"cpu": CPU, "gpu": GPU}


def profile_named(name):
    """The profile of that name. Raises InputError for an unknown one."""
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}; expected one of: {', '.join(PROFILES)}")
    return PROFILES[name]


PPO_FIELDS = fields(PPOConfig)
