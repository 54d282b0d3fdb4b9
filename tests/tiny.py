"""Models small enough for a unit test: made from a config with a fixed seed, in fp32 unless the name says otherwise."""

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf_helpers.config import PPOConfig
from rlhf_helpers.models import PolicyWithValueHead, quantization_config
from rlhf_helpers.shard import shard
from rlhf_helpers.trainer import PPOTrainer

V, PAD, EOS, BOS, UNK = 128, 0, 1, 2, 3


def tokenizer(padding_side="left", special=("<pad>", "<eos>", "<bos>", "<unk>")):
    """Four special tokens, then the words t4 .. t127: id n is the word tn."""
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *(f"t{i}" for i in range(4, V))])}, unk_token=special[3])
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side=padding_side, **names)


def llama(seed=0, **options):
    """A Llama of two layers; its logits are far from uniform."""
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.2)
    torch.manual_seed(seed)
    return (
        LlamaForCausalLM(LlamaConfig(**sizes | dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS) | options))
        .float()
        .eval()
    )


def gpt2(seed=0, **options):
    """A GPT-2 of two layers: learned absolute positions, where Llama has rotary ones."""
    sizes = dict(vocab_size=V, n_positions=128, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    torch.manual_seed(seed)
    return (
        GPT2LMHeadModel(GPT2Config(**sizes | dict(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD) | options))
        .float()
        .eval()
    )


def nf4_llama(folder, storage=torch.uint8):
    """The Llama of a folder in 4-bit NF4, as bitsandbytes gives it: not yet wrapped, not yet protected."""
    lm = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=quantization_config(storage=storage),
        device_map={"": "cpu"},
        attn_implementation="eager",
    )
    return lm.requires_grad_(False).eval()


def with_lora(lm, targets=("q_proj", "v_proj"), b_scale=0.0, seed=0, dropout=0.0):
    """`lm` with LoRA adapters; B is zero, as at the start of a run, or normal with deviation `b_scale`."""
    targets = targets if isinstance(targets, str) else list(targets)
    torch.manual_seed(seed)
    lm = get_peft_model(lm, LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM"))
    for name, parameter in lm.named_parameters():
        if "lora_B" in name and b_scale:
            parameter.data.normal_(0, b_scale)
    return lm


def trainer(lm=None, ref_model=None, value_head=0.1, tokenizer=tokenizer(), sharded=False, **config):
    """A PPOTrainer on a tiny model (a Llama with LoRA by default), whole or in shards. The value head is random, so that values
    matter."""
    settings = dict(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-2, max_new_tokens=8) | config
    policy = PolicyWithValueHead(with_lora(llama()) if lm is None else lm)
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.v_head.summary.weight, 0, value_head)
    policy = shard(policy) if sharded else policy
    return PPOTrainer(config=PPOConfig(**settings), model=policy, ref_model=ref_model, tokenizer=tokenizer)


def batch(n=4, seed=0, lengths=(6, 3, 8, 5)):
    """(queries, responses, scores) of unequal lengths, without EOS; the scores have mean about 0."""
    g = torch.Generator().manual_seed(seed)
    ids = lambda length: torch.randint(4, V, (length,), generator=g)
    queries = [ids(2 + i % 4) for i in range(n)]
    responses = [ids(lengths[i % len(lengths)]) for i in range(n)]
    return queries, responses, torch.randn(n, generator=g).tolist()


def state(trainer):
    """Everything that a step changes: all weights, Adam's state, the KL coefficient, the count of steps."""
    tensors = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for index, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{key}": value.clone() for key, value in moments.items()}
    return tensors | {"kl_coef": torch.tensor(trainer.kl_coef), "steps": torch.tensor(trainer.steps_done)}


def same(first, second):
    """Whether two dicts of tensors are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def adapters(trainer, part="lora_B"):
    """The adapters' parameters by name."""
    return {name: p for name, p in trainer.model.named_parameters() if part in name}


# Mistral's first template: turns must alternate, and there is none for a system.
INST = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def mistral_tokenizer(texts, size=1000):
    """Byte-pair encoding with bytes for what it does not know, BOS in front, no pad token, and Mistral's template; learnt from `texts`."""
    special = ["<unk>", "<s>", "</s>"]
    pairs = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pairs.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pairs.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581"), "merged_with_next")
    pairs.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    known = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    pairs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=known, show_progress=False))
    pairs.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=pairs, chat_template=INST, **names)


def mistral(vocabulary, layers=21, seed=0):
    """A Mistral in the proportions of the 7B model, a thirty-second as wide: grouped keys, a sliding window, a head of its own."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocabulary, hidden_size=128, intermediate_size=448, num_hidden_layers=layers, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=32768, sliding_window=4096, tie_word_embeddings=False)
    return MistralForCausalLM(MistralConfig(**sizes, bos_token_id=1, eos_token_id=2, initializer_range=0.1)).eval()


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a cat dog likes the sun warm cold rain and is lovely good bad very write about".split()


def bert(labels=1, seed=0):
    """A BERT classifier of one layer."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    options = dict(max_position_embeddings=64, num_labels=labels, pad_token_id=0, initializer_range=0.3)
    options |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(BertConfig(**sizes, **options)).eval()


def bert_tokenizer(padding_side="right"):
    """One token a word; a pair becomes [CLS] first [SEP] second [SEP]."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        padding_side=padding_side,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    )
