"""JSON lines in: good files give records, bad files an error that says `file:line: what is wrong`."""

import json

import pytest

from rlhf_helpers.data import load_preferences, load_prompts, read_jsonl, save_jsonl

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
    ],
)
def test_a_bad_line_is_named_by_file_and_line(write, line, complaint):
    path = write(GOOD + b"\n" + line + b"\n" + GOOD)  # the bad line is the third
    with pytest.raises(ValueError) as error:
        load_preferences(path)
    assert str(error.value).startswith(f"{path}:3: ") and complaint in str(error.value)
    assert "\n" not in str(error.value)


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


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "tea"}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: field 'prompt' has half of a surrogate pair"):
        load_prompts(path)
