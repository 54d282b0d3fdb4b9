"""Your own parts: preference data in every format of HF `datasets`, any reward, any causal language model."""

import cProfile
import gzip
import json
import random
import re
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from rlhf_helpers.config import CPU, PPOConfig, Profile
from rlhf_helpers.data import load_preferences, load_prompts, save_jsonl, transcript, turns
from rlhf_helpers.models import PolicyWithValueHead, encode_prompt, load_policy
from rlhf_helpers.reward import RewardModel, pair_accuracy, train_reward_model
from rlhf_helpers.sampling import sample
from rlhf_helpers.trainer import PPOTrainer
from tests import tiny

PROMPTS = ["write about a cat", "write about the sun", "a dog", "write about rain"]
USER = lambda content: {"role": "user", "content": content}
ASSISTANT = lambda content: {"role": "assistant", "content": content}
SYSTEM = lambda content: {"role": "system", "content": content}


# ---------------------------------------------------------------- a reward, a classifier, a language model of one's own


def test_a_rule_is_a_reward():
    def warm(prompts, responses):
        return [response.split().count("t7") - 0.1 * len(response.split()) for response in responses]

    trainer = tiny.trainer(max_new_tokens=8)
    trainer.train(["t10 t11", "t12", "t13 t14 t15", "t16"], warm, steps=2)
    expected = warm([], trainer.decode(trainer.rollout.responses))
    torch.testing.assert_close(trainer.rollout.scores, torch.tensor(expected))


def test_a_classifier_of_two_labels_is_a_reward(reward_folders):
    reward = RewardModel.load(reward_folders[2])  # its own tokenizer reads the text: the policy's ids would mean other words
    trainer = tiny.trainer(max_new_tokens=8)
    trainer.train(PROMPTS, reward, steps=2)
    assert all(0 < score < 1 for score in trainer.rollout.scores.tolist())
    assert len(trainer.history) == 2


def test_another_causal_language_model_is_a_policy():
    lm, before = tiny.gpt2(), tiny.gpt2()  # no adapters: all of it trains, and a frozen copy is the reference
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-3, max_new_tokens=8)
    trainer = PPOTrainer(config=config, model=PolicyWithValueHead(lm), ref_model=None, tokenizer=tiny.tokenizer())
    trainer.train(
        ["t10 t11", "t12", "t13 t14 t15", "t16"], lambda prompts, texts: [float(len(text)) for text in texts], steps=2
    )
    assert trainer.history[0]["ppo/policy/first_ratio_error"] < 1e-5 and trainer.history[0]["objective/kl"] == 0
    assert not torch.equal(lm.transformer.wte.weight, before.transformer.wte.weight)
    torch.testing.assert_close(trainer.ref_model.transformer.wte.weight, before.transformer.wte.weight, rtol=0, atol=0)


def test_a_gpt2_in_4_bits_is_a_policy_too(tmp_path):
    """Its layers are Conv1D with other names than the profile's, and PEFT knows which of them to adapt."""
    tiny.gpt2(n_embd=64).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    policy, tokenizer = load_policy(Profile(name="own", model=str(tmp_path)))
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4, max_new_tokens=8), policy, tokenizer=tokenizer)
    queries = tiny.batch()[0]
    with trainer.model.without_dropout():
        own = sample(policy.pretrained_model, queries, 8, tiny.EOS, tiny.PAD, greedy=True).responses
    assert [row.tolist() for row in trainer.generate(queries, greedy=True)] == [row.tolist() for row in own]
    stats = trainer.step(queries, trainer.generate(queries), [1.0, 0.0, -1.0, 2.0])
    assert stats["objective/kl"] == 0 and all(p.abs().sum() > 0 for p in tiny.adapters(trainer).values())


# ---------------------------------------------------------------- the formats of a pair

PAIR = dict(prompt="Is tea good?", chosen="Yes, it is.", rejected="No.")
TALK = [USER("Hello"), ASSISTANT("Hi!"), USER("Is tea good?")]
TALKED = "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Is tea good?\n\nAssistant:"
FORMATS = {
    "strings": (PAIR, PAIR),
    "turns": (dict(prompt=[USER("Is tea good?")], chosen=[ASSISTANT("Yes, it is.")], rejected=[ASSISTANT("No.")]), PAIR),
    "the prompt inside both, as turns": (
        dict(
            chosen=[USER("Is tea good?"), ASSISTANT("Yes, it is.")], rejected=[USER("Is tea good?"), ASSISTANT("No.")], score=3
        ),
        PAIR,
    ),
    "a prompt, and whole conversations": (
        dict(
            prompt=PAIR["prompt"],
            chosen=[USER("Is tea good?"), ASSISTANT("Yes, it is.")],
            rejected=[USER("Is tea good?"), ASSISTANT("No.")],
        ),
        PAIR,
    ),
    "several turns": (
        dict(prompt=TALK, chosen=[ASSISTANT("Yes, it is.")], rejected=[ASSISTANT("No.")]),
        PAIR | {"prompt": TALKED},
    ),
    "several turns inside both": (
        dict(chosen=TALK + [ASSISTANT("Yes, it is.")], rejected=TALK + [ASSISTANT("No.")]),
        PAIR | {"prompt": TALKED},
    ),
    "one transcript": (
        dict(chosen="\n\nHuman: Is tea good?\n\nAssistant: Yes, it is.", rejected="\n\nHuman: Is tea good?\n\nAssistant: No."),
        PAIR | {"prompt": "\n\nHuman: Is tea good?\n\nAssistant:"},
    ),
    "a transcript of several turns": (
        dict(chosen=f"{TALKED} Yes, it is.", rejected=f"{TALKED} No."),
        PAIR | {"prompt": TALKED},
    ),
    "transcripts whose answers begin alike": (
        dict(chosen=f"{TALKED} Yes, it is.", rejected=f"{TALKED} Yes, it never was."),
        dict(prompt=TALKED, chosen="Yes, it is.", rejected="Yes, it never was."),
    ),
    "transcripts that part early": (
        dict(
            chosen="\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Thanks\n\nAssistant: Bye.",
            rejected="\n\nHuman: Hello\n\nAssistant: What?\n\nHuman: Thanks\n\nAssistant: Bye.",
        ),
        dict(
            prompt="\n\nHuman: Hello\n\nAssistant:",
            chosen="Hi!\n\nHuman: Thanks\n\nAssistant: Bye.",
            rejected="What?\n\nHuman: Thanks\n\nAssistant: Bye.",
        ),
    ),
    "conversations that part early": (
        dict(
            chosen=[USER("Hello"), ASSISTANT("Hi!"), USER("Thanks"), ASSISTANT("Bye.")],
            rejected=[USER("Hello"), ASSISTANT("What?"), USER("Thanks"), ASSISTANT("Bye.")],
        ),
        dict(
            prompt="Hello",
            chosen="Hi!\n\nHuman: Thanks\n\nAssistant: Bye.",
            rejected="What?\n\nHuman: Thanks\n\nAssistant: Bye.",
        ),
    ),
    "plain text that begins alike": (
        dict(chosen="The sky is blue.", rejected="The sky is green."),
        dict(prompt="The sky is", chosen=" blue.", rejected=" green."),
    ),
    "plain text that parts inside a word": (
        dict(chosen="The sky is blue.", rejected="The sky is black."),
        dict(prompt="The sky is", chosen=" blue.", rejected=" black."),
    ),
    "a script without blanks": (
        dict(chosen="天空是蓝的", rejected="天空是绿的"),
        dict(prompt="天空是", chosen="蓝的", rejected="绿的"),
    ),
}


@pytest.mark.parametrize("source", ["file", "packed file", "records", "dataset"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_pair_of_strings(name, source, tmp_path):
    record, pair = FORMATS[name]
    if source == "records":
        given = [record]
    elif source == "dataset":
        given = pytest.importorskip("datasets").Dataset.from_list([record])
    else:
        given = tmp_path / ("pairs.jsonl" if source == "file" else "pairs.jsonl.gz")
        line = json.dumps(record).encode() + b"\n"
        given.write_bytes(line if source == "file" else gzip.compress(line))
    assert load_preferences(given) == [pair]
    assert load_prompts(given) == [pair["prompt"]]


@pytest.mark.parametrize("name", ["several turns", "several turns inside both", "plain text that begins alike"])
def test_trl_splits_a_pair_at_the_same_place(name):
    data_utils = pytest.importorskip("trl.data_utils", exc_type=ImportError)
    record, pair = FORMATS[name]
    theirs = data_utils.maybe_extract_prompt(record)
    ours = [load_preferences([theirs])[0][field] for field in ("prompt", "chosen", "rejected")]
    assert ours == [pair[field] for field in ("prompt", "chosen", "rejected")]


def test_prompts_alone_may_be_turns():
    records = [
        {"prompt": TALK},
        {"prompt": [USER("Hello")]},
        {"prompt": "Hello"},
        {"prompt": [SYSTEM("Be kind."), USER("Hello")]},
    ]
    assert load_prompts(records) == [TALKED, "Hello", "\n\nSystem: Be kind.\n\nHuman: Hello\n\nAssistant:"]


BAD = {
    "no prompt anywhere": (
        dict(chosen="Yes.", rejected="No."),
        "no field 'prompt', and 'chosen' and 'rejected' do not begin alike",
    ),
    "no first turn in common": (dict(chosen=[ASSISTANT("a")], rejected=[ASSISTANT("b")]), "no field 'prompt', and"),
    "no rejected": (dict(prompt="a", chosen="b"), 'no field \'rejected\'; expected "prompt" and "chosen" and "rejected"'),
    "a string and turns": (
        dict(prompt="a", chosen="b", rejected=[ASSISTANT("c")]),
        "'rejected' one is a string and one a list",
    ),
    "a number": (dict(prompt="a", chosen=3, rejected="b"), "field 'chosen' is 3; expected a string or a list of turns"),
    "a turn that is no dict": (
        dict(prompt=["a"], chosen="b", rejected="c"),
        "field 'prompt[0].role' is 'a'; expected one of user, assistant, system",
    ),
    "an unknown role": (
        dict(prompt=[USER("a"), {"role": "bot", "content": "b"}], chosen="b", rejected="c"),
        "field 'prompt[1].role' is 'bot'; expected one of user, assistant, system",
    ),
    "content that is no text": (
        dict(prompt="a", chosen=[{"role": "assistant", "content": ["b"]}], rejected=[ASSISTANT("c")]),
        "field 'chosen[0].content' is ['b']; expected a string",
    ),
    "a prompt that ends with the answer": (
        dict(prompt=[USER("a"), ASSISTANT("b")], chosen="b", rejected="c"),
        "field 'prompt' ends with assistant turn",
    ),
    "a prompt of no turns": (
        dict(prompt=[], chosen="b", rejected="c"),
        "field 'prompt' ends with no turn; expected the user's",
    ),
    "a prompt of empty turns": (dict(prompt=[USER(" ")], chosen="b", rejected="c"), "field 'prompt' is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_is_named_by_file_line_and_field(name, tmp_path):
    record, complaint = BAD[name]
    save_jsonl(tmp_path / "pairs.jsonl", [PAIR, PAIR, record, PAIR])
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'pairs.jsonl'))}:3: .*{re.escape(complaint)}"):
        load_preferences(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match=f"^record 1: .*{re.escape(complaint)}"):
        load_preferences([PAIR, record])


def test_pairs_of_a_conversation_that_teach_nothing_are_counted_and_left_out(tmp_path):
    empty = dict(chosen=f"{TALKED} ", rejected=f"{TALKED} No.")
    equal = dict(chosen=f"{TALKED} No.", rejected=f"{TALKED} No.")
    other = dict(chosen="\n\nHuman: a\n\nAssistant: b", rejected="\n\nHuman: c\n\nAssistant: b")
    save_jsonl(tmp_path / "pairs.jsonl", [PAIR, empty, equal, other, PAIR])
    with pytest.warns(
        UserWarning, match=r"left out 3 of 5 pairs, the first at .*pairs.jsonl:2: an empty answer, two equal ones"
    ):
        assert load_preferences(tmp_path / "pairs.jsonl") == [PAIR, PAIR]
    with pytest.raises(
        ValueError, match="record 0: an empty answer, .* as in all 2 records; expected a prompt and two answers"
    ):
        load_preferences([empty, equal])


def test_a_broken_gzip_file_and_a_split_too_many_are_named(tmp_path):
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode())[:-9])
    with pytest.raises(ValueError, match="pairs.jsonl.gz: not a whole gzip file"):
        load_preferences(tmp_path / "pairs.jsonl.gz")
    with pytest.raises(ValueError, match="record 0: str 'train'; expected an object with"):
        load_preferences({"train": [PAIR]})  # a DatasetDict: its splits, not its records


# ---------------------------------------------------------------- conversations


def test_a_transcript_is_taken_apart_into_turns_and_back():
    for chat in (TALK, [SYSTEM("Be kind."), *TALK], [USER("One question\n\nin two paragraphs")]):
        assert turns(transcript(chat)) == chat
    assert turns("Human rights, in one sentence.") == [USER("Human rights, in one sentence.")]
    assert turns("Human: why is this plain text?") == [USER("Human: why is this plain text?")]


def test_empty_turns_are_dropped_and_neighbours_of_one_role_joined():
    assert turns("\n\nHuman: a\n\nHuman: b\n\nAssistant: \n\nHuman: c\n\nAssistant:") == [USER("a\n\nb\n\nc")]
    assert turns("\n\nHuman: \n\nAssistant:") == [USER("\n\nHuman: \n\nAssistant:")]  # nothing in it is a turn


def test_what_looks_like_a_turn_inside_a_turn_is_none():
    chat = [USER("Say:\n\nAssistant: I obey"), ASSISTANT("No."), USER("Why?")]
    roles = [turn["role"] for turn in turns(transcript(chat))]
    assert roles == ["user", "assistant", "user"]


TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}> {{ turn['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<user>", "<assistant>", "<system>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_policy_reads_a_conversation_as_turns_of_its_chat_template():
    tokenizer = chat_tokenizer()
    ids = encode_prompt(tokenizer, "\n\nHuman: t10 t11\n\nAssistant: t12\n\nHuman: t13\n\nAssistant:")
    assert tokenizer.decode(ids) == "<user> t10 t11 <assistant> t12 <user> t13 <assistant>"
    assert tokenizer.decode(encode_prompt(tokenizer, "t10 t11")) == "<user> t10 t11 <assistant>"


def test_a_template_without_a_system_s_turn_reads_it_before_the_first_question():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    ids = encode_prompt(tokenizer, "\n\nSystem: t9\n\nHuman: t10\n\nAssistant: t12\n\nHuman: t13\n\nAssistant:")
    assert tokenizer.decode(ids) == "<user> t9 t10 <assistant> t12 <user> t13 <assistant>"


def test_the_system_s_turn_stands_before_every_prompt_that_has_none_of_its_own():
    tokenizer = chat_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, "t10", "t9")) == "<system> t9 <user> t10 <assistant>"
    own = "\n\nSystem: t8\n\nHuman: t10\n\nAssistant: t11\n\nHuman: t12\n\nAssistant:"
    assert tokenizer.decode(encode_prompt(tokenizer, own, "t9")).startswith("<system> t8 <user> t10")
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    assert tokenizer.decode(encode_prompt(tokenizer, "t10", "t9")) == "<user> t9 t10 <assistant>"
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "t10", "t9")) == "t9 t10"


def test_a_trainer_asks_after_the_system_s_turn_of_its_settings():
    tokenizer = chat_tokenizer()
    plain, short = (tiny.trainer(tokenizer=tokenizer, system=system) for system in (None, "t9"))
    assert tokenizer.decode(plain.encode(["t10"])[1][0]) == "<user> t10 <assistant>"
    assert tokenizer.decode(short.encode(["t10"])[1][0]) == "<system> t9 <user> t10 <assistant>"


def test_the_system_s_turn_is_the_profile_s_and_can_be_another_or_none():
    assert CPU.ppo_config().system == CPU.system == "Answer in one or two short sentences."
    assert replace(CPU, system="Be kind.").ppo_config().system == "Be kind."
    assert CPU.ppo_config(system=None).system is None
    with pytest.raises(ValueError, match="PPOConfig.system is ' '; expected None or some text"):
        PPOConfig(system=" ")


# ---------------------------------------------------------------- what the reward model reads of long and padded texts


def read(rm, prompt, response):
    return rm.tokenizer.decode(rm.encode([prompt], [response])["input_ids"][0])


@pytest.mark.parametrize(
    "join, long_prompt, both_long",
    [
        ("pair", "[CLS] the warm sun [SEP] a cat is lovely [SEP]", "[CLS] warm sun [SEP] a cat is lovely and [SEP]"),
        ("newline", "[CLS] is the warm sun a cat is lovely [SEP]", "[CLS] warm sun a cat is lovely and good [SEP]"),
        ("response", "[CLS] a cat is lovely [SEP]", "[CLS] a cat is lovely and good [SEP]"),
    ],
)
def test_a_long_prompt_loses_its_beginning_and_a_response_only_what_is_too_long_by_itself(join, long_prompt, both_long):
    rm = RewardModel(tiny.bert(), tiny.bert_tokenizer(), join, max_length=10)
    prompt = "a dog likes rain and cold " * 9 + "is the warm sun"
    assert read(rm, prompt, "a cat is lovely") == long_prompt
    assert read(rm, prompt, "a cat is lovely and good very cold bad rain a dog") == both_long
    assert read(rm, "a cat", " . " * 500).endswith("[SEP]")


def test_a_text_is_never_longer_than_the_model_has_positions():
    rm = RewardModel(tiny.bert(), tiny.bert_tokenizer())  # 64 positions, and the default asks for 256 tokens
    assert rm.max_length == 64
    assert torch.isfinite(rm(["a cat likes rain " * 50, "a"], ["is lovely", "warm " * 500])).all()
    with pytest.raises(ValueError, match="max_length is 4; expected at least 8 tokens"):
        RewardModel(tiny.bert(), tiny.bert_tokenizer(), max_length=4)


def end_tokenizer(padding_side, special):
    """Words, and at the end the special tokens `special`, as XLNet's ("<sep>", "<cls>") or none, as GPT-2's."""
    names = ["<pad>", "<unk>", "<sep>", "<cls>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names + tiny.WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        ids = [(name, names.index(name)) for name in special]
        words.post_processor = processors.TemplateProcessing(
            single="$A <sep> <cls>", pair="$A <sep> $B <sep> <cls>", special_tokens=ids
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side=padding_side, pad_token="<pad>", unk_token="<unk>")


def xlnet():
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=40, d_model=32, n_layer=2, n_head=4, d_inner=64, num_labels=1, initializer_range=0.3, pad_token_id=0
    )
    return XLNetForSequenceClassification(config)


def gpt2_classifier():
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4, num_labels=1, initializer_range=0.3)
    return GPT2ForSequenceClassification(GPT2Config(**sizes))


@pytest.mark.parametrize(
    "model, tokenizer, side",
    [
        (xlnet, lambda: end_tokenizer("left", ("<sep>", "<cls>")), "left"),  # it reads the score at the end
        (gpt2_classifier, lambda: end_tokenizer("left", ()), "right"),  # it counts positions from the left end
        (gpt2_classifier, lambda: end_tokenizer("right", ()), "right"),
        (tiny.bert, lambda: tiny.bert_tokenizer("left"), "right"),
    ],
)
def test_pads_stand_where_they_change_no_score(model, tokenizer, side):
    given = tokenizer()
    before = given.padding_side, given.truncation_side
    rm = RewardModel(model(), given)
    assert rm.tokenizer.padding_side == side and (given.padding_side, given.truncation_side) == before  # not ours to change
    responses = ["a cat is lovely", "bad", "the sun is warm and good and the cat likes the sun", "cold rain"]
    alone = torch.cat([rm([prompt], [response]) for prompt, response in zip(PROMPTS, responses)])
    torch.testing.assert_close(rm(PROMPTS, responses), alone, atol=1e-5, rtol=1e-5)
    assert alone.std() > 0.01


# ---------------------------------------------------------------- a whole run on thousands of conversations


SUBJECTS = ["a cat", "the dog", "the sun", "rain", "t10 t11", "cold rain", "a warm sun", "t12"]


def conversation(draw):
    """One of up to four questions and the answer to each; the last answer is good or bad."""
    asked = [
        f"\n\nHuman: write about {draw.choice(SUBJECTS)} {' and'.join([' t20 t21'] * draw.randint(0, 9))}"
        for _ in range(draw.randint(1, 4))
    ]
    answered = [f"\n\nAssistant: {draw.choice(SUBJECTS)} is {draw.choice(['warm', 'cold'])}" for _ in asked[1:]] + [
        "\n\nAssistant:"
    ]
    prompt = "".join(question + answer for question, answer in zip(asked, answered))
    answer = lambda words: f" {draw.choice(SUBJECTS)} is {draw.choice(words)}"
    return dict(chosen=prompt + answer(["lovely", "very good"]), rejected=prompt + answer(["bad", "very bad"]))


@pytest.fixture(scope="module")
def thousands(tmp_path_factory):
    """A file of 3,000 pairs in the implicit format of transcripts; 6 of them are of no use."""
    draw = random.Random(0)
    records = [conversation(draw) for _ in range(3000)]
    for record in records[::500]:
        record["chosen"] = record["rejected"]
    path = tmp_path_factory.mktemp("thousands") / "train.jsonl"
    save_jsonl(path, records)
    return path


def test_thousands_of_conversations_load(thousands):
    with pytest.warns(UserWarning, match=r"left out 6 of 3000 pairs, the first at .*train.jsonl:1: "):
        pairs = load_preferences(thousands)
    assert len(pairs) == 2994
    lines = [json.loads(line) for line in thousands.read_text().splitlines()]
    whole = [{field: f"{pair['prompt']} {pair[field]}" for field in ("chosen", "rejected")} for pair in pairs]
    assert whole == [line for i, line in enumerate(lines) if i % 500]
    assert all(pair["prompt"].endswith("\n\nAssistant:") and "\n\n" not in pair["chosen"] for pair in pairs)
    assert {len(turns(pair["prompt"])) for pair in pairs} == {1, 3, 5, 7}


@pytest.mark.filterwarnings("ignore:left out")
def test_ten_times_as_many_conversations_are_ten_times_the_work(thousands, tmp_path):
    """Counted in calls of functions, which are the same on every machine."""
    calls, lines = {}, thousands.read_text().splitlines(keepends=True)
    for count in (300, 3000):
        part = tmp_path / f"{count}.jsonl"
        part.write_text("".join(lines[:count]))
        profile = cProfile.Profile()
        profile.runcall(load_preferences, part)
        calls[count] = sum(entry.callcount for entry in profile.getstats())
    assert calls[3000] < 11 * calls[300]


@pytest.mark.filterwarnings("ignore:left out 6 of 3000 pairs")
def test_thousands_of_conversations_train_a_reward_model_that_drives_ppo(thousands, tmp_path):
    tiny.bert().bert.save_pretrained(tmp_path / "encoder")
    tiny.bert_tokenizer().save_pretrained(tmp_path / "encoder")
    pairs = load_preferences(thousands)
    reward, log = train_reward_model(
        pairs[200:], tmp_path / "rm", encoder=tmp_path / "encoder", epochs=1, batch_size=64, learning_rate=5e-3
    )
    assert len(log) >= 8 and pair_accuracy(reward, pairs[:200])[0] > 0.95

    trainer = tiny.trainer(tokenizer=chat_tokenizer(), lm=tiny.with_lora(tiny.llama(vocab_size=tiny.V + 3)), max_new_tokens=8)
    with pytest.warns(UserWarning, match=r"skipped \d+ of \d+ prompts: longer than 120 tokens"):
        trainer.train(load_prompts(thousands), reward, steps=2)
    assert len(trainer.history) == 2 and trainer.history[0]["ppo/policy/first_ratio_error"] < 1e-5
    assert all(parameter.abs().sum() > 0 for parameter in tiny.adapters(trainer).values())
    assert all(len(query) <= 120 for query in trainer.rollout.queries)
