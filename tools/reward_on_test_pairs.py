"""How does the reward model rank the test pairs, and does it read the prompt? `python tools/reward_on_test_pairs.py` (half a minute).

Printed: its share of the pairs ranked right, the same with the prompt of another pair, and three yardsticks on the same pairs that need no
model (more warm words; the longer answer; and, with two parts of the annotator's own rule, whether an answer names its subject and ends, the
shorter of two alike). Then the same for the dev pairs. Test and dev pairs are labelled by the rule itself. Nothing is chosen by these numbers."""

from rlhf_helpers.config import project_root
from rlhf_helpers.course.gold import is_whole, names_subject, warm_words
from rlhf_helpers.data import load_preferences
from rlhf_helpers.reward import ensure_reward_model, pair_accuracy


def with_other_prompts(pairs):
    """The pairs, each under the prompt of the pair half the file away: another one, since pairs of a prompt stand together."""
    half = len(pairs) // 2
    return [{**pair, "prompt": other["prompt"]} for pair, other in zip(pairs, pairs[half:] + pairs[:half])]


def accuracies(reward_model, split="test"):
    """{what ranks the pairs: (accuracy, (low, high))}; equal scores count as wrong."""
    pairs = load_preferences(project_root() / "data" / f"pairwise_prefs_{split}.jsonl")
    count = lambda prompts, texts: list(map(warm_words, texts))
    length = lambda prompts, texts: list(map(len, texts))
    parts = lambda prompt, text: 2 * names_subject(prompt, text) + is_whole(text) - len(text) / 10_000
    by_parts = lambda prompts, texts: list(map(parts, prompts, texts))
    return {
        "the reward model": pair_accuracy(reward_model, pairs),
        "the reward model, with another pair's prompt": pair_accuracy(reward_model, with_other_prompts(pairs)),
        "more warm words": pair_accuracy(count, pairs),
        "the longer answer": pair_accuracy(length, pairs),
        "names its subject, and ends": pair_accuracy(by_parts, pairs),
    }


if __name__ == "__main__":
    for split in ("test", "heldout"):
        print(f"{split} pairs")
        for name, (accuracy, (low, high)) in accuracies(ensure_reward_model(), split).items():
            print(f"  {name}: {accuracy:.3f} ({low:.3f} to {high:.3f})")
