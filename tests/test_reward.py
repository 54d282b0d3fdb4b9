"""The reward model: folders in, scores out, and training on pairs."""

import json
import math
import os

import numpy as np
import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

from rlhf_helpers import reward
from rlhf_helpers.data import save_jsonl
from rlhf_helpers.errors import InputError
from rlhf_helpers.files import aside, write_manifest
from rlhf_helpers.pairwise import pairwise_loss
from rlhf_helpers.reward import (
    RewardModel,
    base_samples,
    ensure_reward_model,
    pair_accuracy,
    score_from_logits,
    train_reward_model,
)
from tests import tiny

PROMPTS = ["write about a cat", "write about the sun", "a dog"]
RESPONSES = ["a cat is lovely", "the sun is warm and good and the cat likes the sun", "bad"]
PAIRS = [
    dict(prompt=f"write about {subject}", chosen=f"{subject} is {good}", rejected=f"{subject} is {bad}")
    for subject in ("a cat", "the dog", "the sun", "rain")
    for good, bad in (("lovely", "bad"), ("good", "cold"), ("very good", "bad"))
]


def model(labels=1, padding_side="right", **options):
    return RewardModel(tiny.bert(labels), tiny.bert_tokenizer(padding_side), **options)


# ---------------------------------------------------------------- scores


def test_the_input_is_prompt_then_response_each_once():
    rm = model()
    text = lambda join: rm.tokenizer.decode(model(join=join).encode(["a cat"], ["is lovely"])["input_ids"][0])
    assert text("pair") == "[CLS] a cat [SEP] is lovely [SEP]"
    assert text("newline") == "[CLS] a cat is lovely [SEP]"
    assert text("response") == "[CLS] is lovely [SEP]"


def test_of_a_pair_that_is_too_long_the_prompt_gives_way_though_the_response_is_the_longer_one():
    rm = model(max_length=32)
    ids = rm.encode([" ".join(["cat"] * 20)], [" ".join(["lovely"] * 24)])["input_ids"][0].tolist()
    words = rm.tokenizer.convert_ids_to_tokens(ids)
    assert len(words) == 32 and words.count("lovely") == 24 and words.count("cat") == 32 - 24 - 3


def test_one_label_scores_by_its_logit():
    logits = torch.tensor([[1.5], [-20.0]])
    assert score_from_logits(logits).tolist() == [1.5, -20.0]


def test_two_labels_score_by_the_sigmoid_of_the_logits_difference():
    logits = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(score_from_logits(logits), torch.sigmoid(logits[:, 1] - logits[:, 0]))


def test_other_numbers_of_labels_are_refused(reward_folders):
    with pytest.raises(ValueError, match="3 labels; expected 1"):
        score_from_logits(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="3 labels; expected 1 .* or 2"):
        model(3)
    with pytest.raises(ValueError, match=f"{reward_folders[3]}: cannot be used as a reward model: .*3 labels"):
        RewardModel.load(reward_folders[3])


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_response_scores_the_same_alone_and_in_a_batch(labels, padding_side, batch_size):
    together = model(labels, padding_side)(PROMPTS, RESPONSES)
    torch.testing.assert_close(
        together, model(labels, padding_side, batch_size=batch_size)(PROMPTS, RESPONSES), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(together, model(labels)(PROMPTS, RESPONSES), atol=1e-5, rtol=1e-5)
    assert together.std() > 0.01  # they differ


def test_scores_are_fp32_numbers_without_gradient_one_a_response():
    scores = model()(PROMPTS, RESPONSES)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad


def test_a_score_counts_deviations_from_the_mean_of_the_samples():
    rm = model()
    raw = rm.raw(PROMPTS, RESPONSES)
    rm.standardise(PROMPTS, RESPONSES)
    scores = rm(PROMPTS, RESPONSES)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close((raw - raw.mean()) / raw.std(), scores)


def test_samples_that_all_score_the_same_cannot_standardise():
    with pytest.raises(ValueError, match="deviation .*; expected scores that differ"):
        model().standardise(["a cat"] * 3, ["is lovely"] * 3)


def test_as_many_responses_as_prompts_are_needed():
    with pytest.raises(ValueError):
        model()(PROMPTS, RESPONSES[:2])


def test_an_unknown_join_is_refused():
    with pytest.raises(ValueError, match="join is 'both'; expected one of pair, newline, response"):
        model(join="both")


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("labels", [1, 2])
def test_what_is_saved_scores_the_same_when_loaded(labels, tmp_path):
    rm = model(labels, join="newline")
    rm.standardise(PROMPTS, RESPONSES)
    rm.batch_size = 3
    rm.save(tmp_path / "rm")
    loaded = RewardModel.load(tmp_path / "rm")
    assert (loaded.join, loaded.mean, loaded.std, loaded.batch_size) == ("newline", rm.mean, rm.std, 3)
    torch.testing.assert_close(loaded(PROMPTS, RESPONSES), rm(PROMPTS, RESPONSES))
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


def test_any_classifier_s_folder_will_do(reward_folders):
    rm = RewardModel.load(reward_folders[2])
    assert (rm.mean, rm.std, rm.join) == (0.0, 1.0, "pair")
    assert all(0 < score < 1 for score in rm(PROMPTS, RESPONSES).tolist())


@pytest.fixture
def broken(tmp_path):
    """A saved reward model's folder, to be damaged."""
    model().save(tmp_path / "rm")
    return tmp_path / "rm"


DAMAGE = {
    "no config.json": lambda f: (f / "config.json").unlink(),
    "config.json cut short": lambda f: (f / "config.json").write_text("{"),
    "another architecture": lambda f: (f / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"]})
    ),
    "no architecture": lambda f: (f / "config.json").write_text(json.dumps({"model_type": "bert"})),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "weights cut short": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]),
    "an unknown join": lambda f: (f / reward.FORMAT_FILE).write_text('{"join": "both"}'),
    "an unknown setting": lambda f: (f / reward.FORMAT_FILE).write_text('{"scale": 2}'),
    "format file cut short": lambda f: (f / reward.FORMAT_FILE).write_text('{"join": '),
    "format file of brackets": lambda f: (f / reward.FORMAT_FILE).write_text("[" * 3000),
    "format file of bytes": lambda f: (f / reward.FORMAT_FILE).write_bytes(b"\xff"),
    "format file with a list": lambda f: (f / reward.FORMAT_FILE).write_text("[1]"),
    "a mean that is a string": lambda f: (f / reward.FORMAT_FILE).write_text('{"mean": "0"}'),
    "a mean that is not finite": lambda f: (f / reward.FORMAT_FILE).write_text('{"mean": NaN}'),
    "a deviation of 0": lambda f: (f / reward.FORMAT_FILE).write_text('{"std": 0}'),
    "a max_length that is a switch": lambda f: (f / reward.FORMAT_FILE).write_text('{"max_length": true}'),
    "a join that is a list": lambda f: (f / reward.FORMAT_FILE).write_text('{"join": ["pair"]}'),
    "config.json with a list": lambda f: (f / "config.json").write_text("[1]"),
    "config.json of brackets": lambda f: (f / "config.json").write_text("[" * 3000),
    "architectures that are numbers": lambda f: edit(f, architectures=[7]),
    "architectures that are one": lambda f: edit(f, architectures="BertForSequenceClassification"),
    "sizes of another model": lambda f: edit(f, hidden_size=48),
    "sizes that are strings": lambda f: edit(f, hidden_size="many"),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer cut short": lambda f: (f / "tokenizer.json").write_text("{"),
}


def edit(folder, **changes):
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_folder_is_named_in_one_sentence_by_the_manifest_or_without_one(damage, broken):
    DAMAGE[damage](broken)
    for renew in (lambda folder: None, write_manifest, lambda folder: (folder / "manifest.json").unlink()):
        renew(broken)
        with pytest.raises(InputError) as error:
            RewardModel.load(broken)
        assert str(error.value).startswith(f"{broken}: ") and "\n" not in str(error.value)


def test_one_flipped_bit_in_the_weights_is_seen(broken):
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (broken / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="rm: cannot be used as a reward model: model.safetensors: not what was written"):
        RewardModel.load(broken)


def test_a_save_killed_between_its_two_renames_leaves_a_model_that_loads(broken):
    scores = RewardModel.load(broken)(PROMPTS, RESPONSES)
    os.rename(broken, aside(broken))
    assert torch.equal(RewardModel.load(broken)(PROMPTS, RESPONSES), scores)
    model(2).save(broken)
    assert RewardModel.load(broken).model.config.num_labels == 2 and [path.name for path in broken.parent.iterdir()] == ["rm"]


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])  # many a project has the second
def test_a_folder_of_other_things_is_not_replaced_by_a_model(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for save in (model().save, lambda folder: train_reward_model(PAIRS * 20, folder)):
        with pytest.raises(InputError, match=f"{tmp_path.name}: holds other things and no {reward.FORMAT_FILE}"):
            save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_missing_folder_that_is_not_the_default_is_not_trained(tmp_path):
    with pytest.raises(ValueError, match="nowhere: not a reward model"):
        ensure_reward_model(tmp_path / "nowhere", say=pytest.fail)


def test_a_pair_with_a_held_out_prompt_is_never_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path))
    save_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    save_jsonl(tmp_path / "heldout.jsonl", PAIRS[3:4])
    with pytest.raises(ValueError, match="'write about the dog' is held out in heldout.jsonl"):
        ensure_reward_model(pairs_file="pairs.jsonl", heldout_file="heldout.jsonl", say=pytest.fail)
    assert not (tmp_path / "output").exists()


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """An encoder without a score, as reward models start from."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny.bert().bert.save_pretrained(folder)
    tiny.bert_tokenizer().save_pretrained(folder)
    return folder


def test_the_pairwise_loss_is_minus_log_sigmoid_of_the_margin():
    loss = pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)
    assert pairwise_loss(torch.tensor([500.0]), torch.tensor([-500.0])).item() == 0
    assert pairwise_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == 1000


def test_base_samples_are_the_different_responses():
    prompts, responses = base_samples(PAIRS[:2] + PAIRS[:1])
    assert prompts == ["write about a cat"] * 4
    assert responses == ["a cat is lovely", "a cat is bad", "a cat is good", "a cat is cold"]


def test_accuracy_is_the_share_of_pairs_in_the_right_order_within_its_interval():
    right_for_lovely = lambda prompts, responses: [float("lovely" in response) for response in responses]
    accuracy, (low, high) = pair_accuracy(right_for_lovely, PAIRS)
    assert accuracy == pytest.approx(1 / 3) and 0 <= low < accuracy < high <= 1  # a tie is not right
    with pytest.raises(InputError, match="^pair_accuracy: no pairs; expected at least one"):
        pair_accuracy(right_for_lovely, [])


@pytest.mark.parametrize("labels", [1, 2])
def test_training_lowers_the_loss_orders_the_pairs_and_saves_a_standardised_model(labels, encoder_folder, tmp_path):
    rm, log = train_reward_model(
        PAIRS, tmp_path / "rm", encoder=encoder_folder, num_labels=labels, epochs=15, batch_size=6, learning_rate=5e-3
    )
    assert log[0]["loss"] > 0.4 > 0.1 > log[-1]["loss"] and [row["step"] for row in log] == [5, 10, 15, 20, 25, 30]
    assert pair_accuracy(rm, PAIRS)[0] == 1.0
    loaded = RewardModel.load(tmp_path / "rm")
    assert loaded.model.config.num_labels == labels
    scores = loaded(*base_samples(PAIRS))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std().item() == pytest.approx(1, abs=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]
    assert not any(p.requires_grad for p in rm.model.parameters()) and not rm.model.training


def test_an_encoder_may_have_a_pooler_that_its_classifier_lacks(tmp_path):
    config = RobertaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                           max_position_embeddings=66, pad_token_id=1)  # fmt: skip
    encoder = RobertaModel(config)
    encoder.save_pretrained(tmp_path / "encoder")
    tiny.bert_tokenizer().save_pretrained(tmp_path / "encoder")
    rm, _ = train_reward_model(
        PAIRS, tmp_path / "rm", encoder=str(tmp_path / "encoder"), epochs=1, batch_size=6, learning_rate=1e-12, max_length=32
    )
    name = "embeddings.word_embeddings.weight"
    assert torch.allclose(
        rm.model.base_model.state_dict()[name], encoder.state_dict()[name]
    )  # it begins with the encoder's weights


def test_training_does_not_move_to_an_apple_card_that_ppo_would_not_use(encoder_folder, tmp_path, monkeypatch):
    """transformers' Trainer takes MPS where there is one; then the trainer's Accelerator, on the CPU, could not be made."""
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *args, **kwargs: True)
    rm, _ = train_reward_model(PAIRS, tmp_path / "rm", encoder=encoder_folder, epochs=1, batch_size=6)
    assert {parameter.device.type for parameter in rm.model.parameters()} == {"cpu"}
    assert tiny.trainer().accelerator.device.type == "cpu"


def test_bootstrap_intervals_are_the_same_every_time():
    reward_fn = lambda prompts, responses: np.arange(len(responses)) % 3
    assert pair_accuracy(reward_fn, PAIRS) == pair_accuracy(reward_fn, PAIRS)


def test_a_folder_without_the_weights_of_the_score_is_refused(tmp_path):
    tiny.bert(1).base_model.save_pretrained(tmp_path)
    tiny.bert_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict(architectures=["BertForSequenceClassification"], num_labels=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be used as a reward model: no weights for classifier"):
        RewardModel.load(tmp_path)


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(std=0.0), "RewardModel: std is 0.0; expected a number above 0"),
        (dict(mean=None), "RewardModel: mean is None; expected"),
        (dict(mean=math.nan), "RewardModel: mean is nan; expected"),
        (dict(max_length=9.5), "RewardModel: max_length is 9.5"),
        (dict(max_length=7), "RewardModel: max_length is 7; expected at least 8"),
        (dict(batch_size=0), "RewardModel: batch_size is 0"),
        (dict(join=["pair"]), r"RewardModel: join is \['pair'\]"),
    ],
)
def test_settings_of_a_reward_model_are_checked(how, words, tmp_path):
    with pytest.raises(InputError, match=words):
        model(**how)
    numpys = model(mean=np.float32(1), std=np.int64(2), max_length=np.int64(64))
    numpys.save(tmp_path / "rm")
    assert RewardModel.load(tmp_path / "rm").mean == 1.0


def test_roberta_s_positions_begin_behind_its_pad():
    config = RobertaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                           max_position_embeddings=34, pad_token_id=1, num_labels=1)  # fmt: skip
    tokenizer = tiny.bert_tokenizer()
    tokenizer.model_max_length = 10**9
    rm = RewardModel(RobertaForSequenceClassification(config), tokenizer)
    assert rm.max_length == 32 and rm(["cat " * 50], ["a dog"]).isfinite().all()


@pytest.mark.parametrize(
    "pairs, options, words",
    [
        (PAIRS[:10], {}, "10 pairs and batch_size 16; expected the pairs for one batch"),
        ([], {}, "source: no records"),
        (None, {}, "source is None; expected"),
        ([*PAIRS, dict(prompt="a", chosen=5, rejected="b")] * 2, {}, "record 12: field 'chosen' is 5"),
        (PAIRS * 2, dict(batch_size=0), "train_reward_model: batch_size is 0"),
        (PAIRS * 2, dict(learning_rate=-1.0), "train_reward_model: learning_rate is -1.0; expected a number above 0"),
        (PAIRS * 2, dict(learning_rate="1e-3"), "train_reward_model: learning_rate is '1e-3'"),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_refused_before(pairs, options, words, encoder_folder, tmp_path):
    with pytest.raises(InputError, match=words):
        train_reward_model(pairs, tmp_path / "rm", encoder=encoder_folder, **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "prompts, responses, words",
    [
        (
            ["a"] * 32,
            ["b"] * 40,
            "32 prompts and 40 responses; expected as many",
        ),  # whole batches match, the last one is left over
        (["a"] * 3, ["b"], "3 prompts and 1 responses"),
        ("text", "text", "prompts is 'text'; expected a list"),
        (["a"], [], "1 prompts and 0 responses"),
        (["a", None], ["b", "c"], r"prompts\[1\] is None; expected some text"),
        (["a"], ["\ud800"], r"responses\[0\] is '\\ud800'; expected some text"),
        (["a"], [5], r"responses\[0\] is 5; expected some text"),
        (None, [], "prompts is None; expected a list"),
        ({"a", "cat"}, {"dog", "sun"}, "prompts is {.*; expected a list"),
        (np.array("a"), ["b"], "prompts is .*; expected a list"),
    ],
)
def test_texts_that_cannot_be_meant_are_refused(prompts, responses, words):
    rm = RewardModel(tiny.bert(1), tiny.bert_tokenizer())
    with pytest.raises(InputError, match=words):
        rm(prompts, responses)


def test_no_texts_have_no_scores():
    assert RewardModel(tiny.bert(1), tiny.bert_tokenizer())([], []).shape == (0,)
