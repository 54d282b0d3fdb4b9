"""JSON lines in: good files give records, bad files an error that says `file:line: what is wrong`."""

import gzip
import json
import os
import random
import re
import warnings

import pytest

from rlhf_helpers.data import load_preferences, load_prompts, read_jsonl, save_jsonl, turns
from rlhf_helpers.errors import InputError, MissingInput

GOOD = b'{"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."}\n'


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "file.jsonl"
        path.write_bytes(content)
        return path

    return write


def test_prompts_come_once_each_in_order(write):
    path = write(b'{"prompt": "b"}\n{"prompt": "a", "chosen": "x"}\n{"prompt": "b"}\n')
    assert load_prompts(path) == ["b", "a"]


def test_a_preference_keeps_its_three_fields(write):
    assert load_preferences(write(GOOD)) == [{"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."}]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_do_no_harm(write):
    path = write(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n \n" + GOOD.rstrip(b"\n"))
    assert len(load_preferences(path)) == 2


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b'{"prompt": "a", ', "not JSON"),
        (b'["prompt"]', "list"),
        (b'"prompt"', "str"),
        (b"3", "int"),
        (b'{"prompt": "a", "chosen": "b"}', "no field 'rejected'"),
        (b'{"prompt": 7, "chosen": "b", "rejected": "c"}', "field 'prompt' is 7; expected a string"),
        (b'{"prompt": "a", "chosen": null, "rejected": "c"}', "field 'chosen' is None; expected a string"),
        (b'{"prompt": " ", "chosen": "b", "rejected": "c"}', "field 'prompt' is empty"),
        (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', "not UTF-8 (byte 13 of the line)"),
        (b"[" * 50_000 + b"]" * 50_000, "brackets nested too deeply; expected one object a line"),
        (b'{"prompt": "a", "x": ' + b'{"x":' * 50_000 + b"1" + b"}" * 50_001, "brackets nested too deeply"),
        (b"[" * 100_000, "brackets nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "a number of too many digits"),
        (b'{"prompt": ' + b"9" * 4000 + b', "chosen": "b", "rejected": "c"}', "field 'prompt' is 999"),
        (b'{"prompt": NaN, "chosen": "b", "rejected": "c"}', "field 'prompt' is nan; expected a string"),
        (b'{"prompt": "a", "chosen": -Infinity, "rejected": "c"}', "field 'chosen' is -inf; expected a string"),
        (b'{"prompt": true, "chosen": "b", "rejected": "c"}', "field 'prompt' is True; expected a string"),
        (b'{"prompt": "a\x00", "chosen": "b", "rejected": "c"}', "not JSON (Invalid control character at, column 14)"),
        (
            b'{"prompt": {"a": 1}, "chosen": "b", "rejected": "c"}',
            "field 'prompt' is {'a': 1}; expected a string or a list of turns",
        ),
        (b'{"prompt": [' + b"[" * 900 + b"]" * 900 + b'], "chosen": "b", "rejected": "c"}', "field 'prompt[0].role' is [[["),
        (
            b'{"prompt": [{"role": ["user"], "content": "a"}], "chosen": "b", "rejected": "c"}',
            "field 'prompt[0].role' is ['user']; ",
        ),
        (b'{"chosen": [{"role": {"a": 1}}], "rejected": []}', "field 'chosen[0].role' is {'a': 1}; expected one of user, "),
        (
            b'{"chosen": [{"role": "user", "content": ["a"]}], "rejected": []}',
            "field 'chosen[0].content' is ['a']; expected a string",
        ),
        (b'{"prompt": "' + b"a" * 9000 + b'", "chosen": 7, "rejected": "c"}', "field 'chosen' is 7"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(write, line, complaint):
    path = write(GOOD + b"\n" + line + b"\n" + GOOD)  # the bad line is the third
    with pytest.raises(ValueError) as error:
        load_preferences(path)
    assert isinstance(error.value, InputError)
    assert str(error.value).startswith(f"{path}:3: ") and complaint in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 300


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.jsonl: no such file; expected JSON lines with "prompt"'):
        load_prompts(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_records_is_refused(write, content):
    with pytest.raises(ValueError, match="file.jsonl: no records"):
        load_prompts(write(content))


def test_what_is_saved_is_read_back_and_no_part_file_stays(tmp_path):
    records = [{"prompt": "Grüße \u2028 und\nmehr 🌞", "n": 1}, {"prompt": "b"}]
    path = tmp_path / "new" / "file.jsonl"
    save_jsonl(path, records)
    assert read_jsonl(path) == records
    assert [file.name for file in path.parent.iterdir()] == ["file.jsonl"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.jsonl"
    save_jsonl(path, [{"n": 1}])
    with pytest.raises(TypeError):
        save_jsonl(path, [{"n": object()}])
    assert json.loads(path.read_text()) == {"n": 1}


USER, ASSISTANT, SYSTEM = (lambda text, role=role: dict(role=role, content=text) for role in ("user", "assistant", "system"))
CONVERSATIONS = {  # prompt, what both answers share: what is trained on
    "nothing": ("P", [], "P"),
    "the prompt": ("P", [USER("P")], "P"),
    "the prompt, after a system turn": ("P", [SYSTEM("S"), USER("P")], [SYSTEM("S"), USER("P")]),
    "the prompt without its system turn": ([SYSTEM("S"), USER("P")], [USER("P")], [SYSTEM("S"), USER("P")]),
    "both, with a system turn": ([SYSTEM("S"), USER("P")], [SYSTEM("S"), USER("P")], [SYSTEM("S"), USER("P")]),
    "the prompt and more": ("P", [USER("P"), ASSISTANT("A"), USER("U")], [USER("P"), ASSISTANT("A"), USER("U")]),
    "what comes after the prompt": ("P", [ASSISTANT("A"), USER("U")], [USER("P"), ASSISTANT("A"), USER("U")]),
    "the same, after turns": ([USER("P")], [ASSISTANT("A"), USER("U")], [USER("P"), ASSISTANT("A"), USER("U")]),
}


@pytest.mark.parametrize("prompt, shared, whole", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_turns_that_both_answers_share_are_not_lost_beside_a_prompt(prompt, shared, whole):
    record = dict(prompt=prompt, chosen=[*shared, ASSISTANT("B")], rejected=[*shared, ASSISTANT("C")])
    (pair,) = load_preferences([record])
    assert (pair["chosen"], pair["rejected"]) == ("B", "C")
    assert turns(pair["prompt"]) == (turns(whole) if isinstance(whole, str) else whole)


def test_a_prompt_with_which_the_conversation_does_not_begin_is_named():
    answer = lambda text: [USER("Q"), ASSISTANT(text)]
    with pytest.raises(InputError, match="record 0: field 'prompt' is 'P', and both answers begin with other turns"):
        load_preferences([dict(prompt="P", chosen=answer("B"), rejected=answer("C"))])


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "tea"}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: field 'prompt' has half of a surrogate pair"):
        load_prompts(path)


# ---------------------------------------------------------------- sources that are no files of records


def test_what_is_no_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}: cannot be read .*; expected JSON lines"):
        load_prompts(tmp_path)
    for name in ("nul\0.jsonl", "x" * 5000):
        with pytest.raises(InputError, match=": cannot be read .*; expected JSON lines"):
            load_prompts(name)
    with pytest.raises(MissingInput, match="no such file"):
        load_prompts(tmp_path / "nowhere.jsonl")
    for source in (None, 7, 1.5):
        with pytest.raises(InputError, match=f"^source is {source}; expected a file of JSON lines"):
            load_prompts(source)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(write):
    path = write(GOOD)
    path.chmod(0)
    with pytest.raises(InputError, match="file.jsonl: cannot be read .Permission denied.; expected JSON lines"):
        load_prompts(path)


@pytest.mark.parametrize("damage", [lambda z: z + b"garbage", lambda z: z[:-4], lambda z: z[:9], lambda z: b"no gzip"])
def test_a_packed_file_that_is_not_whole_is_named(damage, tmp_path):
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(damage(gzip.compress(GOOD)))
    with pytest.raises(InputError, match="file.jsonl.gz: not a whole gzip file; expected JSON lines"):
        load_preferences(path)


def test_a_packed_file_is_known_by_its_first_bytes(write):
    assert len(load_preferences(write(gzip.compress(GOOD)))) == 1


def test_of_a_field_said_twice_the_last_one_counts(write):
    assert load_prompts(write(b'{"prompt": "a", "prompt": "b"}\n')) == ["b"]


def test_two_answers_that_share_one_long_word_are_parted_in_no_time(write):
    word = "x" * 2_000_000  # by the square of its length, this would take hours
    pairs = load_preferences(write(json.dumps({"chosen": f"{word} a", "rejected": f"{word} b"}).encode()))
    assert [pair["chosen"] for pair in pairs] == [" a"]


# ---------------------------------------------------------------- 300 malformed files


def odd(draw, depth=0):
    """A value that no field should have, or a turn, or a list of such."""
    role = draw.choice(["user", "assistant", [], {}, "tool", None, 5, odd(draw, depth + 1) if depth < 3 else 0])
    turn = {"role": role, "content": draw.choice(["x", "", None, 7, ["x"], "\ud800"])}
    return draw.choice(
        [None, True, 7, 10**400, 1e999, float("nan"), "", " \n", "\ud800", "a\0", "\u2028", [], {}, [turn], [[turn]], turn]
    )


def malformed(draw):
    """A file's bytes: good records with values swapped, fields gone, brackets, flipped bits, cuts, other encodings."""
    said = "\n\nHuman: a\n\nAssistant: "
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = []
    for _ in range(draw.randint(1, 4)):
        record = draw.choice([
            json.loads(GOOD), {"chosen": said + "x", "rejected": said + "y"}, {"prompt": "ä 🌞"},
            {"prompt": turns[:1], "chosen": "a", "rejected": "b"}, {"chosen": turns, "rejected": [turns[0], turns[1] | {"content": "b"}]},
        ])  # fmt: skip
        for name in [name for name in record if draw.random() < 0.08]:
            record[name] = odd(draw)
            if draw.random() < 0.2:
                del record[name]
        line = json.dumps(record if draw.random() < 0.95 else odd(draw), ensure_ascii=draw.random() < 0.5)
        lines.append(line.encode("utf-8", "surrogatepass"))
    if draw.random() < 0.15:
        depth = draw.choice([900, 960, 980, 990, 1000, 3000, 50_000])
        lines.append(draw.choice([b"", b'{"prompt": ']) + b"[" * depth + b"]" * draw.choice([0, depth]))
    content = bytearray(draw.choice([b"\n", b"\r\n"]).join(lines))
    for _ in range(draw.choice([0, 0, 0, 1, 5])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    content = bytes(content[: draw.choice([len(content)] * 3 + [draw.randrange(len(content))])])
    encoding = draw.choice([None] * 6 + ["utf-16", "utf-32-le", "latin-1"])
    content = content.decode("utf-8", "replace").encode(encoding, "replace") if encoding else content
    return draw.choice([lambda c: c] * 5 + [gzip.compress, lambda c: gzip.compress(c) + b"x", lambda c: gzip.compress(c)[:-3]])(
        content
    )


def test_of_300_malformed_files_each_is_read_well_or_refused_by_file_and_line(write):
    counts = {"read": 0, "refused": 0}
    for seed in range(300):
        path = write(malformed(random.Random(seed)))
        for load in (load_prompts, load_preferences):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = load(path)
                texts = (
                    found
                    if load is load_prompts
                    else [pair[name] for pair in found for name in ("prompt", "chosen", "rejected")]
                )
                assert texts and all(isinstance(text, str) and text.strip() and text.encode() for text in texts), seed
                counts["read"] += 1
            except InputError as error:
                place = re.escape(str(path)) + r"(:\d+: |: no records; |: not a whole gzip file; )"
                assert re.match(place, str(error)) and len(str(error).splitlines()) == 1 and "; expected" in str(error), seed
                counts["refused"] += 1
    assert min(counts.values()) > 60


def test_line_ends_of_windows_inside_a_field_are_line_ends():
    chat = "\n\nHuman: What is tea?\n\nAssistant: A drink.\n\nHuman: Hot?\n\nAssistant:"
    record = dict(chosen=f"{chat} Mostly.", rejected=f"{chat} No.")
    crlf = {name: text.replace("\n", "\r\n") for name, text in record.items()}
    assert load_preferences([crlf]) == load_preferences([record]) == [dict(prompt=chat, chosen="Mostly.", rejected="No.")]
    assert turns(chat.replace("\n", "\r\n")) == turns(chat) and len(turns(chat)) == 3


def test_a_pair_of_equal_answers_teaches_nothing_and_is_counted():
    pairs = [dict(prompt="a", chosen="b", rejected="b"), dict(prompt="a", chosen="b", rejected="c")]
    with pytest.warns(UserWarning, match="left out 1 of 2 pairs, the first at record 0: .*two equal ones"):
        assert load_preferences(pairs) == pairs[1:]


def test_windows_line_ends_inside_a_text_become_unix_ones_in_every_format(write):
    turn = lambda role, text: {"role": role, "content": text}
    strings = {"prompt": "a\r\nb", "chosen": "c\r\nd", "rejected": "e\r\nf"}
    lists = {"prompt": "a\r\nb", "chosen": [turn("assistant", "c\r\nd")], "rejected": [turn("assistant", "e\r\nf")]}
    for record in strings, lists:
        (pair,) = load_preferences(write(json.dumps(record).encode()))
        assert pair == {"prompt": "a\nb", "chosen": "c\nd", "rejected": "e\nf"}
