"""What TRL 0.11's PPOTrainer and PPOConfig took or had, and these do not: each name with what stands in its place here."""

from rlhf_helpers.errors import InputError

PROMPTS = "train(prompts, reward_fn) takes a list of str and draws its batches by itself; step takes any batch of yours"
TRAINER = {
    "dataset": PROMPTS,
    "dataloader": PROMPTS,
    "data_collator": PROMPTS,
    "training_data_collator": PROMPTS,
    "prepare_dataloader": PROMPTS,
    "optimizer": "it is Adam, at PPOConfig.learning_rate and value_learning_rate; afterwards it is trainer.optimizer",
    "lr_scheduler": "set the lr of trainer.optimizer.param_groups between steps",
    "num_shared_layers": "ref_model=None shares every layer: the reference is the policy with its adapters off",
    "response_masks": "every token of a response counts, to its end",
    "log_stats": "PPOConfig.log_with logs every step, and trainer.history has the stats",
    "save_pretrained": "save(folder) keeps adapters that PEFT loads, the value head, Adam and the history",
    "push_to_hub": "trainer.model.pretrained_model.push_to_hub is PEFT's own",
    "kl_ctl": "the coefficient is trainer.kl_coef",
    "current_device": "it is trainer.device",
    "compute_rewards": "trainer.rollout.rewards has them, ppo.token_rewards makes them",
    "compute_advantages": "trainer.rollout.advantages has them, rollout.gae_advantages makes them",
    "batched_forward_pass": "inspect(queries, responses) gives log-probs and values, without learning",
}
MODEL = "the model is given to PPOTrainer"
SCORES = "the reward model standardises its scores, once"
TRACKING = "PPOConfig.log_with names an Accelerate tracker, with its own settings"
CONFIG = {
    "model_name": MODEL,
    "is_encoder_decoder": MODEL,
    "is_peft_model": MODEL,
    "reward_model": "it is a function, given to train",
    "query_dataset": PROMPTS,
    "remove_unused_columns": PROMPTS,
    "steps": "train(prompts, reward_fn, steps=...)",
    "forward_batch_size": "it is mini_batch_size",
    "backward_batch_size": "it is mini_batch_size x gradient_accumulation_steps",
    "use_score_scaling": SCORES,
    "use_score_norm": SCORES,
    "optimize_cuda_cache": "nothing needs it",
    "optimize_device_cache": "nothing needs it",
    "tracker_kwargs": TRACKING,
    "tracker_project_name": TRACKING,
    "accelerator_kwargs": TRACKING,
    "project_kwargs": TRACKING,
    "exp_name": TRACKING,
    "task_name": TRACKING,
}


def refuse(owner, given):
    """Raises InputError for the first of `given`, a dict of arguments that `owner` does not take."""
    for name, value in given.items():
        raise InputError(f"{owner} does not take {name} (given as {value!r:.80}){instead(name, TRAINER)}")


def instead(name, table):
    """ ": " and what stands in a name's place, or nothing where none is known."""
    return f": {table[name]}" if name in table else ""
