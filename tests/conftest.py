"""Fixtures that several files of unit tests share: everything is made here, nothing is downloaded. What takes seconds to
import is imported where it is used: a file that needs no model starts at once."""

import gc
import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Ctrl-C acts as in a terminal, also where a shell has started the tests in its background and lets it be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are fastest, and bitwise reproducible, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_not_searched():
    """`gc.collect`, which loading a model and leaving a run call, looks at what a file of tests made, and not at the million objects
    of the libraries: that takes half a second each time."""
    gc.freeze()
    yield
    gc.collect()  # of what this file made, before the next one keeps it
    gc.unfreeze()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, as `from_pretrained` wants it."""
    import torch

    from tests import tiny

    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(hidden_size=64).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory):
    """A small Mistral of random weights with a tokenizer that reads English, as `from_pretrained` wants it."""
    import torch

    from rlhf_helpers.config import DATA_FILE, project_root
    from rlhf_helpers.data import load_preferences
    from tests import tiny

    folder = tmp_path_factory.mktemp("mistral")
    pairs = load_preferences(project_root() / DATA_FILE)
    tokenizer = tiny.mistral_tokenizer([text for pair in pairs for text in pair.values() if isinstance(text, str)])
    tokenizer.save_pretrained(folder)
    tiny.mistral(len(tokenizer)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def nf4(llama_folder):
    """A function that makes a new tiny 4-bit NF4 Llama, frozen, or with LoRA adapters if `targets` are named."""
    from tests import tiny

    def make(targets=("q_proj", "v_proj"), **lora):
        lm = tiny.nf4_llama(llama_folder)
        return tiny.with_lora(lm, targets, **lora) if targets else lm

    return make


@pytest.fixture(scope="session")
def reward_folders(tmp_path_factory):
    """Folders of tiny BERT classifiers by number of labels: 1, 2 and 3."""
    from tests import tiny

    folders = {}
    for labels in (1, 2, 3):
        folders[labels] = tmp_path_factory.mktemp(f"reward{labels}")
        tiny.bert(labels).save_pretrained(folders[labels])
        tiny.bert_tokenizer().save_pretrained(folders[labels])
    return folders
