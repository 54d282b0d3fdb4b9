"""How does the reward model rank the test pairs, and does it read the prompt? `python tools/reward_on_test_pairs.py` (half a minute).

Printed: its share of the pairs ranked right, the same with the prompt of another pair, and two yardsticks on the same pairs that need no
model (more warm words; the longer answer). Test pairs are labelled by the rule itself. Nothing is chosen by these numbers."""

from rlhf_helpers.config import project_root
from rlhf_helpers.course.gold import warm_words
from rlhf_helpers.data import load_preferences
from rlhf_helpers.reward import ensure_reward_model, pair_accuracy


def with_other_prompts(pairs):
    """The pairs, each under the prompt of the pair half the file away: another one, since pairs of a prompt stand together."""
    half = len(pairs) // 2
    return [{**pair, "prompt": other["prompt"]} for pair, other in zip(pairs, pairs[half:] + pairs[:half])]


def accuracies(reward_model):
    """{what ranks the test pairs: (accuracy, (low, high))}; equal scores count as wrong."""
    pairs = load_preferences(project_root() / "data" / "pairwise_prefs_test.jsonl")
    count = lambda prompts, texts: list(map(warm_words, texts))
    length = lambda prompts, texts: list(map(len, texts))
    return {
        "the reward model": pair_accuracy(reward_model, pairs),
        "the reward model, with another pair's prompt": pair_accuracy(reward_model, with_other_prompts(pairs)),
        "more warm words": pair_accuracy(count, pairs),
        "the longer answer": pair_accuracy(length, pairs),
    }


if __name__ == "__main__":
    for name, (accuracy, (low, high)) in accuracies(ensure_reward_model()).items():
        print(f"{name}: {accuracy:.3f} ({low:.3f} to {high:.3f})")
