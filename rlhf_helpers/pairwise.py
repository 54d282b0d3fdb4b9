"""The reward model's training: preference pairs, a pairwise loss, and transformers' Trainer."""

import tempfile

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from rlhf_helpers import progress
from rlhf_helpers.data import load_preferences
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import check_own, checked_path, shown
from rlhf_helpers.machine import device_and_dtype, has_fast_bf16
from rlhf_helpers.models import resolve
from rlhf_helpers.reward import FORMAT_FILE, RewardModel, base_samples
from rlhf_helpers.sampling import check_whole


def pairwise_loss(chosen, rejected):
    """Bradley-Terry: -log sigmoid(chosen - rejected), averaged; chosen and rejected are scores (B,).
    Christiano et al. 2017 (arXiv:1706.03741), Stiennon et al. 2020 (arXiv:2009.01325), section 3.4."""
    return -F.logsigmoid(chosen - rejected).mean()


class ShowProgress(TrainerCallback):
    """How far a training of transformers' Trainer is: of `what`."""

    def __init__(self, what="reward model"):
        self.what = what

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress.bar(state.max_steps, self.what, "steps", state.is_world_process_zero)

    def on_step_end(self, args, state, control, **kwargs):
        losses = [f"loss {float(row['loss']):.2f}" for row in state.log_history if "loss" in row]
        self.bar.update(note=losses[-1] if losses else "")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class PairwiseTrainer(Trainer):
    """transformers' Trainer with pairwise_loss. A batch holds the chosen texts first, then the rejected ones. On a CPU that can,
    products are taken in bf16, weights and loss in fp32. (Trainer's own `bf16` would set it for every Accelerator to come.)"""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
            logits = model(**inputs).logits.float()
        scores = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        chosen, rejected = scores.chunk(2)
        loss = pairwise_loss(chosen, rejected)
        return (loss, {"logits": logits}) if return_outputs else loss


def train_reward_model(pairs, folder, encoder="minilm-l6-v2", num_labels=1, epochs=2, batch_size=16, learning_rate=2e-4, seed=0,
                       join="pair", max_length=256):  # fmt: skip
    """Train a reward model on preference pairs and save it in `folder`. Returns (RewardModel, log), log being a list of dicts
    with step and loss. Mean and deviation are taken over all responses in the pairs, samples of the base policy. `pairs`: what
    `load_preferences` takes or gives. Raises InputError, before it trains, for pairs, sizes or a folder that cannot be used."""
    check_whole("train_reward_model", 1, batch_size=batch_size, epochs=epochs)
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < 1e30:
        raise InputError(f"train_reward_model: learning_rate is {shown(learning_rate)}; expected a number above 0")
    check_own(checked_path("train_reward_model: folder", folder), FORMAT_FILE)  # before the minutes that training takes
    pairs = load_preferences(pairs)
    if len(pairs) < batch_size:
        raise InputError(
            f"train_reward_model: {len(pairs)} pairs and batch_size {batch_size}; expected the pairs for one batch at least"
        )
    torch.manual_seed(seed)  # the new score layer is random
    source = resolve(encoder)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(source, num_labels=num_labels))
    body = AutoModel.from_pretrained(source, dtype=torch.float32).state_dict()  # may have a pooler that the classifier lacks
    if lacking := model.base_model.load_state_dict(body, strict=False).missing_keys:
        raise InputError(f"{encoder}: no weights for {lacking[0]}; expected an encoder with all that its classifier has")
    rm = RewardModel(model, AutoTokenizer.from_pretrained(source), join, max_length=max_length)
    model.requires_grad_(True)

    def collate(batch):
        prompts = [pair["prompt"] for pair in batch]
        texts = [pair["chosen"] for pair in batch] + [pair["rejected"] for pair in batch]
        return dict(rm.encode(prompts + prompts, texts))

    with tempfile.TemporaryDirectory() as scratch:  # transformers wants a folder, and nothing is kept there
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=0.01,
            lr_scheduler_type="linear",
            warmup_steps=5,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=seed,
            dataloader_drop_last=True,
            dataloader_pin_memory=False,  # the batch is on the device already
            use_cpu=device_and_dtype()[0].type == "cpu",  # of a card that this course does not use (MPS), too
        )
        trainer = PairwiseTrainer(model, arguments, train_dataset=pairs, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ShowProgress)
        trainer.train()
    log = [dict(step=row["step"], loss=float(row["loss"])) for row in trainer.state.log_history if "loss" in row]
    rm.model.eval().requires_grad_(False)
    rm.standardise(*base_samples(pairs))
    rm.save(folder)
    return rm, log
