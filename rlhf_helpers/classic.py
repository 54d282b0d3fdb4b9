"""What TRL 0.11.4's PPOTrainer and PPOConfig took or had, and these do not: each name with what stands in its place here."""

from rlhf_helpers.errors import InputError
from rlhf_helpers.files import shown

PROMPTS = "train(prompts, reward_fn) takes a list of str and draws its batches by itself; step takes a batch of yours"
ADAM = "it is Adam, at PPOConfig.learning_rate and value_learning_rate; afterwards it is trainer.optimizer"
STATS = "step returns its stats, those of all processes, and trainer.history keeps them"
DECODER = "a causal language model is all that is taken"
SCORES = "scores count as they are given; the course's RewardModel standardises its own"
HUB = "the model is PEFT's or transformers' own: trainer.model.pretrained_model.push_to_hub"
LEFT_OUT = "it is left out"
TRAINER = {
    "dataset": PROMPTS,
    "dataloader": PROMPTS,
    "data_collator": PROMPTS,
    "training_data_collator": PROMPTS,
    "prepare_dataloader": PROMPTS,
    "optimizer": ADAM,
    "lr_scheduler": "set the lr of trainer.optimizer.param_groups between steps",
    "model_params": "they are trainer.parameters",
    "num_shared_layers": "ref_model=None shares every layer of a model with adapters: the reference is that model without them",
    "optional_peft_ctx": "it is trainer.model.adapters_off()",
    "is_peft_model": "it is trainer.model.has_adapters",
    "is_encoder_decoder": DECODER,
    "is_using_text_environment": LEFT_OUT,
    "is_distributed": "it is trainer.accelerator.num_processes > 1",
    "current_device": "it is trainer.device",
    "current_step": "it is trainer.steps_done",
    "kl_ctl": "the coefficient is trainer.kl_coef",
    "running": SCORES,
    "response_masks": "every token of a response counts, to its end",
    "prepare_model_inputs": "trainer.rollout has input_ids and attention_mask",
    "batched_forward_pass": "inspect(queries, responses) gives log-probs and values, without learning",
    "compute_rewards": "trainer.rollout.rewards has them; they are made by ppo.token_rewards",
    "compute_advantages": "trainer.rollout.advantages has them; they are made by rlhf_helpers.rollout.gae_advantages",
    "loss": "ppo.policy_losses and ppo.value_losses are its two parts",
    "train_minibatch": "step makes the whole update",
    "gather_stats": STATS,
    "record_step_stats": STATS,
    "highest_reward": STATS,
    "compare_step": STATS,
    "log_stats": "PPOConfig.log_with logs every step; " + STATS,
    "save_pretrained": "save(folder) keeps the adapters, as PEFT loads them, the value head, Adam and the history (a whole model: "
    "trainer.model.pretrained_model.save_pretrained)",
    "push_to_hub": HUB,
    "push_to_hub_kwargs": HUB,
    "create_model_card": HUB,
}
GENERATE = {
    "length_sampler": "max_new_tokens is the length",
    "generate_ref_response": "another call with reference=True samples from the reference",
}
MODEL_NAMES = {  # of its models with a value head
    "save_pretrained": "PPOTrainer.save keeps the adapters, as PEFT loads them, and the value head (a whole model: "
    "policy.pretrained_model.save_pretrained)",
    "push_to_hub": "it is pretrained_model's: policy.pretrained_model.push_to_hub",
    "generate": "PPOTrainer.generate samples (transformers' own is policy.pretrained_model.generate)",
    "gradient_checkpointing_enable": "it is enable_gradient_checkpointing",
    "gradient_checkpointing_disable": "it is pretrained_model's",
    "is_peft_model": "it is has_adapters",
}
MODEL = "the model is given to PPOTrainer"
TRACKING = "PPOConfig.log_with names an Accelerate tracker; its project is rlhf-ppo"
PROCESSES = "accelerate launch says how many processes there are"
CONFIG = {
    "model_name": MODEL,
    "is_peft_model": MODEL,
    "is_encoder_decoder": DECODER,
    "reward_model": "it is a function, given to train",
    "query_dataset": PROMPTS,
    "remove_unused_columns": PROMPTS,
    "dataset_num_proc": PROMPTS,
    "steps": "train(prompts, reward_fn, steps=...)",
    "forward_batch_size": "it is mini_batch_size",
    "backward_batch_size": "it is mini_batch_size x gradient_accumulation_steps",
    "global_backward_batch_size": PROCESSES,
    "global_batch_size": PROCESSES,
    "world_size": PROCESSES,
    "gradient_checkpointing": "PolicyWithValueHead.enable_gradient_checkpointing switches it on, and the profile says whether load_policy does",
    "use_score_scaling": SCORES,
    "use_score_norm": SCORES,
    "optimize_cuda_cache": "nothing needs it",
    "optimize_device_cache": "nothing needs it",
    "tracker_kwargs": TRACKING,
    "tracker_project_name": TRACKING,
    "project_kwargs": TRACKING,
    "exp_name": TRACKING,
    "task_name": TRACKING,
    "accelerator_kwargs": LEFT_OUT,
    "compare_steps": LEFT_OUT,
    "push_to_hub_if_best_kwargs": HUB,
}


def refuse(owner, given):
    """Raises InputError for the first of `given`, a dict of arguments that `owner` does not take."""
    for name, value in given.items():
        raise InputError(f"{owner} does not take {name} (given as {shown(value)}){instead(name, TRAINER)}")


def instead(name, table):
    """ ": " and what stands in a name's place, or nothing where none is known."""
    return f": {table[name]}" if name in table else ""
