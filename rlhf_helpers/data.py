"""Prompts and preferences: records in, checked pairs of strings out. An error says `file:line: what is wrong`.

A source is a JSONL file (or .jsonl.gz) or anything that yields dicts, such as a `datasets.Dataset`. A pair may come in each of
the formats of HF `datasets`: with a prompt of its own or with the prompt inside both answers, as strings or as lists of turns,
{"role", "content"}. In the course a prompt is always one string. A conversation of several turns is a transcript,
"\\n\\nHuman: ...\\n\\nAssistant: ...\\n\\nHuman: ...\\n\\nAssistant:", which `turns` takes apart for a chat template."""

import contextlib
import gzip
import json
import re
import warnings
import zlib
from os.path import commonprefix
from pathlib import Path

from rlhf_helpers.errors import InputError
from rlhf_helpers.files import is_whole_unicode, parse_json, read_bytes, shown, write_text

PAIR = ("prompt", "chosen", "rejected")
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}  # to a chat template, and in a transcript
MARK = re.compile(rf"\n\n({'|'.join(ROLES.values())}):")  # where a turn begins
ANSWER = "\n\nAssistant:"
WORD_BEGUN = re.compile(r"[^\W\u2e80-\uffff]*")  # read backwards (Chinese and its neighbours have no blanks between words)


def checked_list(name, texts):
    """The texts as a list. Raises InputError for one text alone, and for what is no list of them."""
    if not isinstance(texts, (str, bytes, dict, set)) and not hasattr(texts, "columns"):
        with contextlib.suppress(TypeError):
            return list(texts)
    raise InputError(f"{name} is {shown(texts)}; expected a list of texts")


def load_prompts(source):
    """The different prompts of a source, in order: list[str]. Records have a field "prompt", or are pairs that contain it."""
    prompts = []
    for where, record in _records(source, ["prompt"]):
        if "prompt" not in record and {"chosen", "rejected"} <= record.keys():
            prompts += [pair["prompt"] for pair in _pairs(where, record)]
        else:
            _need(where, record, ["prompt"], ["prompt"])
            prompts.append(_prompt(where, record["prompt"]))
    if not prompts:
        raise InputError(f"{where}: no shared prompt, or no two answers that differ, as in all records before; expected both")
    return list(dict.fromkeys(prompts))


def load_preferences(source):
    """The preference pairs of a source: a list of dicts with the strings "prompt", "chosen" and "rejected". Pairs that teach
    nothing are left out, with a warning: two equal answers; and, of those cut out of conversations, an empty one, or no prompt."""
    pairs, left_out, total = [], [], 0
    for total, (where, record) in enumerate(_records(source, PAIR), start=1):
        found = _pairs(where, record)
        pairs += found
        left_out += [] if found else [where]
    why = "an empty answer, two equal ones, or no shared prompt"
    if not pairs:
        raise InputError(f"{left_out[0]}: {why}, as in all {total} records; expected a prompt and two answers that differ")
    if left_out:
        warnings.warn(f"left out {len(left_out)} of {total} pairs, the first at {left_out[0]}: {why}", stacklevel=2)
    return pairs


def turns(prompt):
    """A prompt as a chat template takes it, a list of {"role", "content"}: a transcript is taken apart, anything else is one
    turn of the user's. Empty turns are dropped, and neighbours of one role joined: many templates want roles to alternate."""
    chat, prompt = [], prompt.replace("\r\n", "\n")
    if _is_transcript(prompt):
        parts = MARK.split("\n\n" + prompt.lstrip())[1:]
        for mark, content in zip(parts[::2], map(str.strip, parts[1::2])):
            role = next(role for role in ROLES if ROLES[role] == mark)
            if content and chat and chat[-1]["role"] == role:
                chat[-1]["content"] += "\n\n" + content
            elif content:
                chat.append({"role": role, "content": content})
    return chat or [{"role": "user", "content": prompt}]


def transcript(chat):
    """The inverse of `turns`: a conversation as one string, ready for the assistant's answer. A single question is itself."""
    return chat[0]["content"] if [turn["role"] for turn in chat] == ["user"] else _written(chat) + ANSWER


def read_jsonl(path, required=()):
    """The objects of a JSONL file, each with the fields `required` as non-empty strings; blank lines are passed over.

    Raises MissingInput for a missing file, and InputError naming file, line and field for anything else."""
    records = []
    for where, record in _records(Path(path), required):
        for name in required:
            _need(where, record, [name], required)
            _string(where, name, record[name])
        records.append(record)
    return records


def save_jsonl(path, records):
    """Write one JSON object a line; the file appears whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# ---------------------------------------------------------------- records


def _records(source, required):
    """(where, dict) of every record: "file:line" in a file, "record n" of anything else."""
    expected = f"JSON lines with {_names(required)}"
    if isinstance(source, (str, Path)):
        records = _lines(Path(source), expected)
    elif hasattr(source, "__iter__"):
        records = ((f"record {number}", record) for number, record in enumerate(source))
    else:
        raise InputError(f"source is {shown(source)}; expected a file of {expected}, or something that yields dicts")
    empty = True
    for where, record in records:
        empty = False
        if not isinstance(record, dict):
            raise InputError(f"{where}: {type(record).__name__} {shown(record)}; expected an object with {_names(required)}")
        yield where, record
    if empty:
        raise InputError(f"{source if isinstance(source, (str, Path)) else 'source'}: no records; expected {expected}")


def _lines(path, expected):
    """("file:line", what JSON says) of every line that is not blank."""
    content = read_bytes(path, expected)
    if path.suffix == ".gz" or content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise InputError(f"{path}: not a whole gzip file; expected {expected}, packed") from None
    for number, raw in enumerate(content.split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); expected a UTF-8 file") from None
        if line:
            yield where, parse_json(line, where, "one object a line")


def _names(required):
    return " and ".join(f'"{name}"' for name in required) or "fields"


def _need(where, record, names, required):
    for name in names:
        if name not in record:
            raise InputError(f"{where}: no field {name!r}; expected {_names(required)}")


def _string(where, name, value, expected="a string", empty=False):
    """`value`, which must be text, and some unless it may be `empty`; line ends of Windows become those of Unix."""
    if not isinstance(value, str):
        raise InputError(f"{where}: field {name!r} is {shown(value)}; expected {expected}")
    if not is_whole_unicode(value):
        raise InputError(f"{where}: field {name!r} has half of a surrogate pair; expected text")
    if not empty and not value.strip():
        raise InputError(f"{where}: field {name!r} is empty; expected some text")
    return value.replace("\r\n", "\n")


# ---------------------------------------------------------------- one record


def _pairs(where, record):
    """The record's pair in a list, or [] where it teaches nothing, as some do in every file cut out of conversations."""
    _need(where, record, PAIR[1:], PAIR)
    chosen, rejected = (_answer(where, name, record[name]) for name in PAIR[1:])
    if type(chosen) is not type(rejected):
        raise InputError(f"{where}: of 'chosen' and 'rejected' one is a string and one a list; expected two of a kind")
    if isinstance(chosen, str) and "prompt" in record:
        for name in PAIR[1:]:
            _string(where, name, record[name])
        prompt = _prompt(where, record["prompt"])
        return [{**record, "prompt": prompt, "chosen": chosen, "rejected": rejected}] if chosen != rejected else []
    shared, chosen, rejected = (_split_text if isinstance(chosen, str) else _split_turns)(chosen, rejected)
    prompt = _prompt_before(where, record["prompt"], shared) if "prompt" in record else shared
    if prompt is None:
        raise InputError(f"{where}: no field 'prompt', and 'chosen' and 'rejected' do not begin alike; expected {_names(PAIR)}")
    usable = prompt.strip() and chosen.strip() and rejected.strip() and chosen != rejected
    return [dict(prompt=prompt, chosen=chosen, rejected=rejected)] if usable else []


def _prompt_before(where, value, shared):
    """The prompt of a pair whose answers are lists of turns. What these share is the conversation so far: it begins with the prompt, or
    goes on after it. A system turn may stand in either."""
    prompt = _prompt(where, value)
    if shared is None:
        return prompt
    asked, so_far = turns(prompt), turns(shared)
    if so_far[0]["role"] == "assistant":
        return transcript(asked + so_far)
    first = lambda chat: [turn for turn in chat[:1] if turn["role"] == "system"]
    key = lambda chat: [(turn["role"], turn["content"].strip()) for turn in chat]
    own, system = first(asked), first(asked) or first(so_far)
    asked, so_far = asked[len(own) :], so_far[len(first(so_far)) :]
    if key(so_far)[: len(asked)] != key(asked):
        raise InputError(
            f"{where}: field 'prompt' is {shown(value)}, and both answers begin with other turns; expected the same"
        )
    return prompt if len(so_far) == len(asked) and (own or not system) else transcript(system + so_far)


def _prompt(where, value):
    """A prompt, which is a string, or turns that end with the user's, as a string."""
    value = _answer(where, "prompt", value)
    if isinstance(value, list):
        if not value or value[-1]["role"] != "user":
            raise InputError(
                f"{where}: field 'prompt' ends with {value[-1]['role'] if value else 'no'} turn; expected the user's"
            )
        value = transcript(value)
    return _string(where, "prompt", value)


def _answer(where, name, value):
    """A field of a pair, a string or a list of turns, with its types checked. Emptiness is judged later."""
    if not isinstance(value, list):
        return _string(where, name, value, "a string or a list of turns", empty=True)
    read = []
    for place, turn in ((f"{name}[{number}]", turn) for number, turn in enumerate(value)):
        role = turn.get("role") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(role, str) or role not in ROLES:
            raise InputError(f"{where}: field '{place}.role' is {shown(role)}; expected one of {', '.join(ROLES)}")
        read.append({"role": role, "content": _string(where, f"{place}.content", turn.get("content"), empty=True)})
    return read


def _is_transcript(text):
    return bool(re.match(r"\s*(Human|System|Assistant):", text)) and ANSWER in text


def _written(chat):
    """Turns as a transcript. A paragraph inside one that looks like the beginning of a turn loses a line end, and is none."""
    contents = (MARK.sub("\n\\1:", turn["content"].strip()) for turn in chat)
    return "".join(f"\n\n{ROLES[turn['role']]}: {content}" for turn, content in zip(chat, contents))


def _split_text(chosen, rejected):
    """(prompt, chosen, rejected) of two texts that begin alike; the prompt is None if they do not. In transcripts it ends with
    the last "Assistant:" that both share (or is empty), in other texts where they part, between two words."""
    shared = commonprefix([chosen, rejected])
    if _is_transcript(chosen) and _is_transcript(rejected):
        end = shared.rfind(ANSWER) + len(ANSWER) if ANSWER in shared else 0
        return chosen[:end], chosen[end:].strip(), rejected[end:].strip()
    prompt = shared[: len(shared) - WORD_BEGUN.match(shared[::-1]).end()].removesuffix(" ")
    return prompt if prompt.strip() else None, chosen[len(prompt) :], rejected[len(prompt) :]


def _split_turns(chosen, rejected):
    """The same for two lists of turns. The prompt ends with the last of the user's turns that both share."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    while same and chosen[same - 1]["role"] != "user":
        same -= 1
    answers = (_written(answer[same:]).removeprefix(ANSWER).strip() for answer in (chosen, rejected))
    return transcript(chosen[:same]) if same else None, *answers
