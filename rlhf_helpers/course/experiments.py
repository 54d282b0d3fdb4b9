"""The experiments of the course: what is run, with which seeds, in the order in which they are made (data/make_runs.py)."""

from dataclasses import dataclass, field

from rlhf_helpers.config import project_root


@dataclass(frozen=True)
class Run:
    """One run of PPO with the CPU profile, but for `settings`; or of DPO on the course's pairs, where `beta` is given."""

    experiment: str
    condition: str
    seed: int
    settings: dict = field(default_factory=dict)  # of PPOConfig
    profile: dict = field(default_factory=dict)  # of Profile
    steps: int | None = None  # None: the profile's
    reward: str = "model"  # of `variants.reward_named`
    advantages: str = "gae"  # of `variants.ADVANTAGES`
    change: str | None = None  # of `variants.CHANGES`
    beta: float | None = None
    split: str = "test"  # whose prompts the last evaluation takes
    samples: int = 2  # a prompt, in the last evaluation
    minutes: float = 6.0  # about, on two CPU cores

    @property
    def name(self):
        return f"{self.experiment}/{self.condition}_seed{self.seed}"


def log_file(run):
    return project_root() / "data" / "runs" / f"{run.name}.jsonl.gz"


def missing(experiment, part=1, parts=1):
    """The runs of an experiment without a log; of `parts` parts of all its runs the `part`-th."""
    every = (EXPERIMENTS | SCORED)[experiment]
    return [run for run in every[part - 1 :: parts] if not log_file(run).exists()]


def each(experiment, conditions, seeds, **common):
    """A run for every seed and condition, seed by seed, so that what is there can be compared at any time."""
    return [Run(experiment, name, seed, **{**common, **how}) for seed in seeds for name, how in conditions.items()]


# Tried on dev prompts before the profile was frozen, in this order. All settings that differ are said: the profile has changed since.
ONE = dict(ppo_epochs=1, learning_rate=2e-3, gradient_accumulation_steps=2, init_kl_coef=0.05, kl_budget=None)
TWO = dict(ppo_epochs=2, learning_rate=1e-3, gradient_accumulation_steps=2, init_kl_coef=0.05, kl_budget=None)
HALVES = dict(gradient_accumulation_steps=1)  # two optimizer steps a pass
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FOUR = dict(num_generations=4)

RECIPES = {
    "e2_halves_lr1e-3": dict(settings=TWO | HALVES, steps=24),
    "e1_lr2e-3": dict(settings=ONE, steps=32),
    "e2_lr1e-3": dict(settings=TWO, steps=24),
    "e2_halves_lr1e-3_price.1": dict(settings=TWO | HALVES | dict(init_kl_coef=0.1), steps=24),
}
MORE_RECIPES = {
    "e1_lr1e-3_lora_everywhere": dict(
        settings=ONE | dict(learning_rate=1e-3), profile=dict(lora_targets=LINEAR), steps=32, samples=4
    ),
    "e1_halves_lr1.5e-3": dict(settings=ONE | HALVES | dict(learning_rate=1.5e-3), steps=32, samples=4),
}
LONGER = {
    "e1_halves_lr1e-3_48": dict(settings=ONE | HALVES | dict(learning_rate=1e-3, kl_budget=9.0), steps=48, samples=4),
}
ON_A_CARD = {
    "e1_lr2e-3": RECIPES["e1_lr2e-3"],
    "e1_lr2e-3_leave_one_out": dict(settings=ONE | FOUR, advantages="leave_one_out", steps=32),
    "e2_halves_lr1e-3_leave_one_out": dict(settings=TWO | HALVES | FOUR, advantages="leave_one_out", steps=24),
    "e2_halves_lr1e-3_price.1": RECIPES["e2_halves_lr1e-3_price.1"],
    "e1_halves_lr1e-3": dict(settings=ONE | HALVES | dict(learning_rate=1e-3), steps=32),
    "e1_lr2e-3_value_lr1e-4": dict(settings=ONE | dict(value_learning_rate=1e-4), steps=32),
}

PRICES = {
    f"price_{price:g}_lr_{rate:g}": dict(settings=dict(init_kl_coef=price, learning_rate=rate, kl_budget=None))
    for rate in (1e-3, 2e-3)
    for price in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
}

ADVANTAGES = {  # where the advantage comes from; "value head" with an answer a prompt is the headline's
    "value_head_four_answers": dict(settings=FOUR),
    "no_baseline": dict(advantages="no_baseline"),
    "batch_mean": dict(advantages="batch_mean"),
    "leave_one_out": dict(settings=FOUR, advantages="leave_one_out"),
    "group_mean": dict(settings=FOUR, advantages="group_mean"),
    "group_normalised": dict(settings=FOUR, advantages="group_normalised"),
}

CHANGES = {  # one at a time; where a batch makes more steps, each is half as long
    "two_epochs_of_halves_lr1e-3": dict(
        settings=dict(learning_rate=1e-3, ppo_epochs=2, gradient_accumulation_steps=1), minutes=9
    ),
    "four_epochs_lr1e-3": dict(settings=dict(learning_rate=1e-3, ppo_epochs=4), minutes=13),
    "four_epochs_lr1e-3_without_clipping": dict(settings=dict(learning_rate=1e-3, ppo_epochs=4, cliprange=1e6), minutes=13),
    "lambda_0.95": dict(settings=dict(lam=0.95)),
    "no_whitening": dict(advantages="unwhitened"),
    "value_loss_detached": dict(change="detach_value_loss"),
    "k3_in_the_loss": dict(advantages="k3_in_the_loss"),
    "temperature_1": dict(settings=dict(temperature=1.0)),
}

DPO = {f"beta_{beta:g}": dict(beta=beta, minutes=12) for beta in (0.03, 0.1, 0.3, 1.0)}

SIZES = {f"pairs_{pairs}": dict(reward=f"pairs_{pairs}", minutes=10) for pairs in (75, 150, 300, 600)}

SAMPLERS = {  # "exact" is the headline's
    "merged": dict(change="sample_merged"),
    "merged_truncated": dict(change="sample_merged", advantages="truncated"),
    "int8": dict(change="sample_int8"),
    "int8_truncated": dict(change="sample_int8", advantages="truncated"),
}

ENSEMBLES = {f"{how}_of_five": dict(reward=f"ensemble_{how}", minutes=10) for how in ("mean", "min")}

COUNTING = {  # a proxy that never reads the prompt, with and without what is there to keep a policy in bounds
    "frozen": dict(reward="warm_words"),
    "no_price": dict(reward="warm_words", settings=dict(init_kl_coef=0.0, kl_budget=None), steps=48, minutes=9),
}

# A limit that nine of ten answers of the untrained model pass, with and without points off for that.
SHORT = dict(max_new_tokens=16, kl_budget=None)
ENDLESS = {"penalty_2": dict(settings=SHORT | dict(missing_eos_penalty=2.0)), "no_penalty": dict(settings=SHORT)}

# The blind runs of notebook 09 (the healthy one is a headline run), and one of them three times as long. "labelled" is a reward
# model from 50 pairs.
FREE = dict(init_kl_coef=0.0, kl_budget=None, gradient_accumulation_steps=1)
CAPSTONE = {
    "fifty_pairs_no_price": dict(reward="labelled", settings=FREE, steps=24),
    "fifty_pairs_no_price_72": dict(reward="labelled", settings=FREE, steps=72, minutes=20),
    "score_on_the_first_token": dict(advantages="score_on_the_first_token", steps=20),
}

EXPERIMENTS = {
    "base": [Run("base", "dev", 0, split="dev", samples=16, minutes=3), Run("base", "test", 0, samples=16, minutes=6)],
    "recipes": [
        *each("recipes", RECIPES, [100], split="dev"),
        *each("recipes", MORE_RECIPES, [100, 101], split="dev"),
        *each("recipes", LONGER, [100], split="dev"),
    ],
    "recipes_on_a_card": each("recipes_on_a_card", ON_A_CARD, [100, 101], split="dev", samples=4),
    "headline": each("headline", {"frozen": {}}, range(10)),
    "placebo": each("placebo", {"random_scores": dict(reward="random")}, range(3)),
    "prices": each("prices", PRICES, range(3)),
    "counting": each("counting", COUNTING, range(3)),
    "advantages": each("advantages", ADVANTAGES, range(5)),
    "dpo": each("dpo", DPO, range(3)),
    "changes": each("changes", CHANGES, range(3)),
    "sizes": each("sizes", SIZES, range(3)),
    "ensembles": each("ensembles", ENSEMBLES, range(3)),
    "samplers": each("samplers", SAMPLERS, range(3)),
    "endless": each("endless", ENDLESS, range(3), steps=24, minutes=3),
    "capstone": each("capstone", CAPSTONE, [0]),
}

# No policy is trained here: what each reward model says of the untrained model's answers to the test prompts, and of the test pairs.
SCORED = {
    "reward_models": [
        Run("reward_models", "course", 0, minutes=1),
        *each("reward_models", {name: dict(reward=name) for name in SIZES}, range(3), minutes=4),
        *each("reward_models", {"resampled": dict(reward="resampled")}, range(5), minutes=4),
    ]
}
