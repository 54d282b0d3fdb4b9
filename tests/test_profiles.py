"""One word at the top of a page chooses the model: where it stands, what the page says about Mistral-7B, and that a 16 GB card has
room for it. `test_pretend_cuda.py` runs the pages with it."""

import gc
import math
import re
import weakref

import pytest

from rlhf_helpers.config import CPU, GPU
from rlhf_helpers.memory import BF16, SIZES, linears, memory_by_part, peak
from rlhf_helpers.models import as_chat, encode_prompt, load_causal_lm, load_tokenizer
from tests import tiny
from tests.test_notebooks import NOTEBOOKS, cells, markdown

WORD = "profile = CPU  # GPU: Mistral-7B, on a card of 16 GB"
LOADS = re.compile(r"\b(?:load_policy|load_causal_lm|AutoModelForCausalLM\.from_pretrained)\(")
PAGES = [path for path in NOTEBOOKS if any(LOADS.search(cell["source"]) for _, cell in cells(path, "code"))]
# Language models in memory at once, at most; the runs on the pretended card count them.
AT_ONCE = {"01": 3, "03": 1, "04": 2, "05": 3, "06": 2, "07": 1, "08": 2, "09": 1}
# Code that is about the CPU profile as such: its recorded runs, exercises with numbers of it, the two profiles side by side.
OF_THE_CPU = {
    "05": ("for example CPU.ppo_config(", "CPU.ppo_config().kl_budget", "CPU.ppo_config().max_new_tokens"),
    "06": ("for example CPU.ppo_config(", "getattr(CPU, name)", "CPU.ppo.get(name)"),
    "09": ("# CPU.ppo_config(init_kl_coef=0.0, kl_budget=None, gradient_accumulation_steps=1)",),
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


@each_page
def test_the_word_stands_once_below_the_imports(page):
    (cell,) = [cell["source"] for _, cell in cells(page, "code") if re.search(r"^profile = ", cell["source"], re.MULTILINE)]
    assert cell.splitlines().count(WORD) == 1 and len(re.findall(r"^profile = ", cell, re.MULTILINE)) == 1
    assert re.search(r"^from rlhf_helpers\.config import CPU, GPU\b", cell, re.MULTILINE)
    assert not re.search(r"\bprofile\b", "".join(other["source"] for _, other in cells(page, "code")).split(WORD)[0])


@each_page
def test_every_cell_asks_the_profile(page):
    """But for a comparison with CPU (`profile is CPU`), and for what is about the CPU profile as such."""
    for i, cell in cells(page, "code"):
        code = cell["source"]
        for known in OF_THE_CPU.get(page.name[:2], ()):
            code = code.replace(known, "")
        assert not re.search(r"\bCPU\.|\(CPU\b|smollm2-135m", code), f"cell {i}"


def test_the_head_of_every_page_says_the_same_about_a_card():
    """And, where the page makes PPO steps, how long one took."""
    said = {True: set(), False: set()}
    for page in PAGES:
        trains = any(re.search(r"\.train\(\w", cell["source"]) for _, cell in cells(page, "code"))
        head = re.search(r"^\*\*On a card:.*?(?=\n\n|\Z)", cells(page)[0][1]["source"], re.MULTILINE | re.DOTALL)[0]
        said[trains].add(head.strip())
    (words,), (shorter,) = said[True], said[False]
    assert words.startswith(shorter) and shorter.endswith("Outputs and figures quoted are those of the CPU profile.")
    assert "was not timed" in words
    bench = (NOTEBOOKS[0].parents[1] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (step,) = re.findall(r"^\| seconds a step \| [^|]* \| \*\*(\d\.\d)\d?\*\* \|$", bench, re.MULTILINE)
    assert f"a PPO step of 16 answers took {step} s on an H100, with random weights" in words


def seven(name="peak", **options):
    """Bytes of Mistral-7B at the GPU profile's settings, on prompts of 50 tokens: in all, or what a policy holds at rest."""
    config = GPU.ppo_config()
    settings = dict(batch_size=config.batch_size, mini_batch_size=config.mini_batch_size, new_tokens=config.max_new_tokens)
    parts = memory_by_part(SIZES["Mistral-7B"], **settings | dict(lora_r=GPU.lora_r, lora_targets=GPU.lora_targets) | options)
    at_rest = ("linear layers", "embeddings, head, norms", "LoRA and Adam", "value head")
    return peak(parts) if name == "peak" else sum(parts[part] for part in at_rest)


def four_bytes_formats():
    """01: four layers in 16 bits beside the model in NF4, with 32-bit scales and with quantized ones."""
    layers, others = linears(SIZES["Mistral-7B"])
    weights = sum(layer.weight.numel() for layer in layers.values())
    return 4 * BF16 * weights / 32 + 3 * BF16 * others + weights / 2 + 4 * weights / 64 + seven("rest") - BF16 * others


def needed(page):
    """Bytes of a card that a page needs with the GPU profile: its models, the largest thing done with one of them, the reward model,
    and CUDA itself."""
    around = 0.6e9
    if page == "01":
        return four_bytes_formats() + around
    others = (AT_ONCE[page] - 1) * seven("rest")
    eights = dict(mini_batch_size=8)
    if page == "04":  # its own pass keeps all activations, before there is a second model
        return max(seven(**eights, checkpointing=False), others + seven(**eights)) + around
    return others + seven(**eights) + around


@each_page
def test_the_page_says_how_much_of_a_card_it_needs_and_a_t4_has_it(page):
    head = cells(page)[0][1]["source"]
    (said,) = re.findall(r"\| not timed yet; (\d+) GB of the card with Mistral-7B \(computed, not measured\) \|", head)
    assert int(said) == math.ceil(needed(page.name[:2]) / 1e9) <= 15


def test_the_page_of_the_chat_template_says_what_becomes_of_the_system_s_turn_with_mistral():
    (page,) = [page for page in PAGES if page.name.startswith("03")]
    assert "[INST]" in markdown(page) and "before the first question" in markdown(page)


# ---------------------------------------------------------------- the small Mistral


def test_the_small_mistral_has_the_traits_of_the_large_one(mistral_folder):
    tokenizer, lm = load_tokenizer(mistral_folder), load_causal_lm(mistral_folder)
    assert (lm.config.model_type, lm.config.sliding_window, lm.config.tie_word_embeddings) == ("mistral", 4096, False)
    assert lm.config.num_key_value_heads < lm.config.num_attention_heads
    large = SIZES["Mistral-7B"]
    for name in ("intermediate_size", "num_key_value_heads"):
        part = "hidden_size" if name == "intermediate_size" else "num_attention_heads"
        assert getattr(lm.config, name) * getattr(large, part) == getattr(large, name) * getattr(lm.config, part)
    assert "pad_token" not in (mistral_folder / "tokenizer_config.json").read_text() and tokenizer.pad_token == "<unk>"
    text = "Tell me about tea, \u00dcbung, \U0001f31f."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text and tokenizer.unk_token_id not in ids


def test_mistral_reads_the_system_s_words_before_the_first_question(mistral_folder):
    tokenizer = load_tokenizer(mistral_folder)
    text = tokenizer.decode(encode_prompt(tokenizer, "What is tea?", "Be brief."))
    assert text.replace(" ", "") == "<s>[INST]Bebrief.\n\nWhatistea?[/INST]"
    assert as_chat(tokenizer, "What is tea?", "Be brief.") == [{"role": "user", "content": "Be brief.\n\nWhat is tea?"}]
    assert as_chat(tokenizer, "What is tea?") == [{"role": "user", "content": "What is tea?"}]
    tokenizer.chat_template = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    assert [turn["role"] for turn in as_chat(tokenizer, "What is tea?", CPU.system)] == ["system", "user"]


def test_a_template_that_drops_the_system_s_words_gets_them_before_the_first_question(mistral_folder):
    tokenizer = load_tokenizer(mistral_folder)
    tokenizer.chat_template = (  # as Phi-3-mini's in 2024
        "{% for message in messages %}{% if message['role'] == 'user' %}<{{ message['content'] }}>{% endif %}{% endfor %}"
    )
    assert as_chat(tokenizer, "What is tea?", "Be brief.") == [{"role": "user", "content": "Be brief.\n\nWhat is tea?"}]
    greeted = as_chat(tokenizer, "Assistant: Hi!\n\nHuman: Is tea good?\n\nAssistant:", "Be brief.")
    assert [(turn["role"], turn["content"]) for turn in greeted] == [
        ("user", "Be brief."), ("assistant", "Hi!"), ("user", "Is tea good?")
    ]  # fmt: skip
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | tojson }}{% endfor %}"
    )
    assert as_chat(tokenizer, "What is tea?", 'Say "tea".')[0] == {"role": "system", "content": 'Say "tea".'}


def test_loading_a_model_first_gives_back_that_of_a_deleted_trainer(nf4, llama_folder):
    """A trainer's functions refer to it, so it waits for Python's collector; on a card that would be another 4 GB."""
    trainer = tiny.trainer(nf4())
    model = weakref.ref(trainer.model)
    gc.disable()
    try:
        del trainer
        assert model() is not None  # else nothing is shown
        load_causal_lm(llama_folder)
        assert model() is None
    finally:
        gc.enable()
