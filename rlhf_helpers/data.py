"""Prompts and preferences: JSON lines in, checked records out. An error says `file:line: what is wrong`."""

import json
from pathlib import Path


def read_jsonl(path, required=()):
    """The objects of a JSONL file, each with the fields `required` as non-empty strings; blank lines are passed over.

    Raises FileNotFoundError for a missing file, and ValueError naming file, line and field for anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected JSON lines with {_names(required)}")
    records = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); expected a UTF-8 file") from None
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}); expected one object a line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {type(record).__name__} {line[:40]!r}; expected an object with {_names(required)}")
        for name in required:
            if name not in record:
                raise ValueError(f"{where}: no field {name!r}; expected {_names(required)}")
            if not isinstance(record[name], str):
                raise ValueError(f"{where}: field {name!r} is {record[name]!r}; expected a string")
            if any("\ud800" <= letter <= "\udfff" for letter in record[name]):
                raise ValueError(f"{where}: field {name!r} has half of a surrogate pair; expected text")
            if not record[name].strip():
                raise ValueError(f"{where}: field {name!r} is empty; expected some text")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no records; expected JSON lines with {_names(required)}")
    return records


def _names(required):
    return " and ".join(f'"{name}"' for name in required) or "fields"


def load_prompts(path):
    """The different prompts of a JSONL file with a "prompt" field (a preference file will do), in order: list[str]."""
    return list(dict.fromkeys(record["prompt"] for record in read_jsonl(path, ["prompt"])))


def load_preferences(path):
    """The preference pairs of a JSONL file: a list of dicts with the strings "prompt", "chosen" and "rejected"."""
    return read_jsonl(path, ["prompt", "chosen", "rejected"])


def save_jsonl(path, records):
    """Write one JSON object a line; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    beside.replace(path)
