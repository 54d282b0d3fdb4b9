"""DPO by TRL 1.12's trainer on the parts of this course: offline, on the pairs alone, where PPO asks the reward model."""

import tempfile

import torch

from rlhf_helpers.errors import InputError
from rlhf_helpers.machine import device_and_dtype
from rlhf_helpers.models import encode_prompt
from rlhf_helpers.pairwise import ShowProgress
from rlhf_helpers.sampling import check_whole
from rlhf_helpers.trl_bridge import own_adapters, quiet, train_quietly, trl_part


def dpo_rows(pairs, tokenizer, ended, system=None):
    """Pairs as DPOTrainer's collator takes them: dicts of prompt_ids, chosen_ids and rejected_ids. EOS follows a response for which
    `ended(text)` is true: TRL would end every one, also those that had broken off."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * bool(ended(text))
    return [
        dict(
            prompt_ids=encode_prompt(tokenizer, pair["prompt"], system).tolist(),
            chosen_ids=ids(pair["chosen"]),
            rejected_ids=ids(pair["rejected"]),
        )
        for pair in pairs
    ]


def train_with_dpo(
    policy, tokenizer, rows, beta, learning_rate=5e-4, epochs=1, batch_size=16, mini_batch_size=8, seed=0, steps=-1
):
    """TRL's DPOTrainer (Rafailov et al. 2023, arXiv:2305.18290) on the adapters of `policy`, in place; `rows` from `dpo_rows`, `beta`
    the price of KL that DPO's own reward has. Returns the history: a list of dicts with step, loss, accuracy and margin. Raises
    InputError, before anything is made, for sizes that do not fit each other or the rows."""
    check_whole("train_with_dpo", 1, batch_size=batch_size, mini_batch_size=mini_batch_size)
    if batch_size % mini_batch_size or mini_batch_size > len(rows):
        sizes = f"batch_size {batch_size}, mini_batch_size {mini_batch_size} and {len(rows)} pairs"
        raise InputError(f"train_with_dpo: {sizes}; expected a batch of whole minibatches, and the pairs for one at least")
    from datasets import Dataset

    trainer_class = trl_part("DPOTrainer")

    class Ready(trainer_class):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # it has ids already

    lm = policy.pretrained_model
    with tempfile.TemporaryDirectory(prefix="trl-") as folder, quiet():
        arguments = trl_part("DPOConfig")(
            output_dir=folder,
            beta=beta,
            num_train_epochs=epochs,
            max_steps=steps,
            per_device_train_batch_size=mini_batch_size,
            gradient_accumulation_steps=batch_size // mini_batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            max_length=None,
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
        with own_adapters(lm):
            trainer = Ready(lm, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.add_callback(ShowProgress("DPO"))
        try:
            train_quietly(trainer)
        finally:
            if "ref" in lm.peft_config:
                lm.delete_adapter("ref")  # TRL's copy of the adapters as they began
    names = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    log = [row for row in trainer.state.log_history if "loss" in row]
    return [dict(step=row["step"], **{ours: float(row[theirs]) for theirs, ours in names.items()}) for row in log]
