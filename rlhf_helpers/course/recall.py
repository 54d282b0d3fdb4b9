"""The three questions at the start of each notebook about earlier ones: one table, from which the pages' text is made, too."""

from typing import NamedTuple


class Answer(NamedTuple):
    text: str
    lesson: str  # what a wrong one mixes up, or why the right one is right
    where: tuple[str, str]  # (notebook, how the heading of its section begins)


class Question(NamedTuple):
    text: str
    right: str
    answers: dict[str, Answer]


def question(text, right, *answers):
    return Question(text, right, {letter: Answer(*answer) for letter, answer in zip("ABC", answers)})


def markdown(notebook):
    """The text of a notebook's questions, as its Markdown cell holds it."""
    lines = ["### Three questions back", "", "From memory, before you look anything up. The cell below takes three letters, such as \"A\".", ""]
    for n, asked in enumerate(QUESTIONS[notebook], 1):
        lines += [f"**{n}.** {asked.text}", "", *(f"- {letter}: {answer.text}" for letter, answer in asked.answers.items()), ""]
    return "\n".join(lines).rstrip()


BASELINE, REUSE, PRICE = ("00", "3 · A baseline"), ("00", "4 · Using a draw twice"), ("00", "5 · A price on KL")
LETTERS = ("00", "7 · What the letters mean")
PAD, TRAINS, ONE_MODEL = ("01", "1 · The tokenizer"), ("01", "5 · What can learn"), ("01", "6 · Policy, reference, value")
PAIRS, FED, GOLD = ("02", "2 · From comparisons"), ("02", "7 · Three ways"), ("02", "9 · Proxy and gold")
SPLIT, PADDING, IDS = ("03", "2 · Train and held-out"), ("03", "5 · Padding left"), ("03", "6 · Ids stay ids")
FIRST_KL, KL, REWARDS = ("04", "1 · The KL before training"), ("04", "5 · KL"), ("04", "6 · Rewards")
ADVANTAGES, FIRST_PASS, SECOND_PASS = ("04", "7 · Advantages"), ("04", "9 · The losses"), ("04", "12 · Second pass")
CURVES, AFTER, SEEN = ("05", "4 · Train"), ("05", "5 · After"), ("07", "3 · What you could have seen")

QUESTIONS = {
    "01": (
        question(
            "The reward model gives 10, 11 and 11.5 where it gave 0, 1 and 1.5. What becomes of a single draw's estimate of the gradient?", "B",
            ("its mean grows tenfold, and training goes faster", "A constant added to every score adds nothing to the mean: the probabilities sum to 1, whatever the policy.", BASELINE),
            ("its mean stays, its variance grows", "What is added cancels on average, and not in a single draw; a baseline takes it out again.", BASELINE),
            ("nothing changes: only differences count", "They do for the mean. A single draw is pushed by its whole score.", BASELINE),
        ),
        question(
            "What does the clip of PPO limit?", "C",
            ("the ratio, which cannot leave 0.8 to 1.2", "The ratio went to 1.36 in the example: the clip ends the push of a draw, it does not hold the ratio.", REUSE),
            ("the distance from the reference", "That is what the price on KL is for; the clip looks at the policy that drew the batch, and never at the reference.", PRICE),
            ("what a draw can gain by being pushed further", "Beyond the line its gradient is 0.", REUSE),
        ),
        question(
            "Exact gradients, no noise at all, no price on KL. Where does training end?", "A",
            ("at the answer that the reward model scores highest", "Whatever people think of it: less noise does not make a reward model right.", PRICE),
            ("at the answer that people like best", "Training never sees what people like, only what the reward model says.", PRICE),
            ("near the start, for the reference holds it", "The reference holds nothing by itself. It acts through the price alone.", PRICE),
        ),
    ),
    "02": (
        question(
            "Which numbers of the 4-bit policy does PPO train?", "B",
            ("whatever is in 16 bits: embeddings and norms", "Those would train if nobody froze them, by accident so to speak.", TRAINS),
            ("adapters and value head, in fp32", "A third of a percent of the model; all else is frozen.", TRAINS),
            ("the 4-bit codes of the linear layers", "Codes from 0 to 15 have no gradient.", TRAINS),
        ),
        question(
            "Where does the course keep the reference model?", "A",
            ("nowhere: it is the policy with its adapters off", "So it costs no memory, and the first KL is exactly 0.", ONE_MODEL),
            ("in a second copy, in 16 bits", "That copy was larger than the policy, and PPO would be paid to undo the quantization.", ONE_MODEL),
            ("in the value head", "The value head guesses how a text will turn out; the reference says how likely each token was before training.", ONE_MODEL),
        ),
        question(
            "The best policy at a price $\\beta$ on KL is $\\pi_\\text{ref}\\, e^{s/\\beta}$, normalised. What does it become if $\\beta$ grows without end?", "C",
            ("always the answer with the highest score", "That is the other end, a price near 0.", PRICE),
            ("all answers equally often", "The scores drop out, and the reference does not.", PRICE),
            ("the reference", "The exponent goes to 0, and what is left is the first factor.", PRICE),
        ),
    ),
    "03": (
        question(
            "A reward model's scores all grow by 100. What does its loss on pairs do?", "C",
            ("it falls", "You may think of scores that were multiplied: then differences grow. Added numbers cancel in a difference.", PAIRS),
            ("it rises", "Nothing in the loss punishes large scores, only a difference of the wrong sign or one that is too small.", PAIRS),
            ("nothing", "Only differences count, so the zero of a reward model is arbitrary.", PAIRS),
        ),
        question(
            "You hand the policy's token ids, all below 30,522, to the reward model instead of text. What do you see?", "B",
            ("an error", "Only if an id lies beyond the smaller vocabulary. Most do not.", FED),
            ("a score, as if all were well", "It has read other words, with the same numbers.", FED),
            ("a score of 0, for it knows no such words", "Every id below 30,522 is some word of its own vocabulary, and gets a score like any other.", FED),
        ),
        question(
            "Padding and end of text are the same token, and the mask is `ids != pad`. What is lost?", "A",
            ("the end: the model never learns to stop", "The EOS is masked as if it were padding.", PAD),
            ("nothing, padding should be masked", "Padding should. But the mask cannot tell it from the EOS that the model wrote.", PAD),
            ("the first token of each response", "It looks at ids, not at places: what goes is the token that equals the pad, at the end.", PAD),
        ),
    ),
    "04": (
        question(
            "Two fractions: the importance ratio, and the one inside KL. What stands below the line?", "C",
            ("in both the reference", "The ratio looks at the policy just before this batch, since that one drew it.", PRICE),
            ("in the ratio the reference, in KL the policy that drew the batch", "The other way round: KL is the distance from the policy before all training.", PRICE),
            ("in the ratio the policy that drew the batch, in KL the reference", "One corrects for old draws, the other is what the price is on.", REUSE),
        ),
        question(
            "A batch to generate from is padded on the right, with a correct mask. What is the symptom?", "B",
            ("none: the mask hides the pads", "The mask hides them from attention. The next token is still read off at the last place, which is a pad.", PADDING),
            ("the answers to shorter prompts begin with rubbish", "They have to continue from a pad.", PADDING),
            ("all answers are rubbish", "The longest prompt has no pads, and its answer was as before. That is why it is easily missed.", PADDING),
        ),
        question(
            "Why not keep the text alone, and encode it again when PPO needs token ids?", "A",
            ("the same text has other spellings in tokens, and the EOS is gone", "Log-probs would be about a sequence that was never sampled.", IDS),
            ("encoding is slow", "It is quick. It answers with other ids, which is worse.", IDS),
            ("the reward model could not read it", "The reward model reads text and nothing else; it is the trainer that needs the ids.", FED),
        ),
    ),
    "05": (
        question(
            "Where does the score of a response stand among the rewards of its tokens?", "A",
            ("on its last real token", "The others are paid for KL alone; the advantages carry the score back to them.", REWARDS),
            ("spread over all of its tokens", "Rewards are not spread. Advantages carry the score back, by the sum over later surprises.", ADVANTAGES),
            ("in the last column of the batch", "For a shorter response that is padding, and the mask throws the score away.", REWARDS),
        ),
        question(
            "What is the advantage of a token at $\\lambda = 1$?", "C",
            ("the surprise right after it", "That is $\\lambda = 0$, where the value head is trusted for all that comes later.", ADVANTAGES),
            ("the score of its response", "Less what the value head expected, and with the KL still to be paid.", ADVANTAGES),
            ("the rewards still to come, less the value", "The guesses in between cancel: no bias from a bad head, all the noise of the response.", ADVANTAGES),
        ),
        question(
            "The policy loss stays near 0 all the time. Is the run learning?", "B",
            ("no: a loss of 0 has no gradient", "At ratio 1 the loss is the mean of the advantages, which is 0, while its gradient is the policy gradient.", FIRST_PASS),
            ("this loss does not tell", "Its value is near 0 by construction; score and KL say more.", FIRST_PASS),
            ("yes: 0 is where it should end", "It starts there. Advantages of mean 0 give a loss of 0 before anything was learnt.", FIRST_PASS),
        ),
    ),
    "06": (
        question(
            "The KL of a run's very first step is 0.02, not 0. What has happened?", "B",
            ("the policy has begun to move", "Nothing was updated when it was taken.", FIRST_KL),
            ("two computations that should be one differ", "A dtype, dropout, the padding, other kernels: worth knowing which, before anything is learnt.", FIRST_KL),
            ("it is the noise of k1", "Where policy and reference are the same, k1 is 0 on every token: there is nothing to be noisy.", KL),
        ),
        question(
            "`ppo/policy/clipfrac` is 0 in every step. What follows?", "C",
            ("the learning rate is too small", "However large it is: before the first optimizer step of a batch every ratio is 1.", SECOND_PASS),
            ("the clip is switched off", "It is there, and has nothing to do: no ratio is away from 1.", SECOND_PASS),
            ("nothing, if a batch has one optimizer step", "Ratios leave 1 only when a batch is used again after an update.", SECOND_PASS),
        ),
        question(
            "After a run the paired interval of held-out gold lies above 0. What does it say?", "A",
            ("that this run gained more than the luck of these prompts", "Another seed is another run, about which it is silent.", AFTER),
            ("that the recipe works, whatever the seed", "The interval draws prompts anew, and there was only one seed: that takes several runs.", AFTER),
            ("that 95 % of the prompts got better", "It is about the mean over prompts. Single prompts may have got worse.", AFTER),
        ),
    ),
    "07": (
        question(
            "What does training see: the proxy, the gold reward, or both?", "A",
            ("the proxy alone", "The gold is for measuring, and with people it could not be written down.", GOLD),
            ("the gold alone", "The gold made the pairs. What came of them, the reward model, is what PPO asks.", GOLD),
            ("both, weighted by the price on KL", "The price weighs the score against KL. Gold is nowhere in the objective.", REWARDS),
        ),
        question(
            "A token in the middle of a response is 2 nats likelier under the policy than under the reference, at a price of 0.1. Its reward?", "B",
            ("+0.2", "The sign: drifting away is paid for. Only a token that went back towards the reference earns.", REWARDS),
            ("−0.2", "The price times its KL, and no score, for it is not the last token.", REWARDS),
            ("−0.2, and its share of the score", "The score stands on the last token alone; the middle hears of it through its advantage.", ADVANTAGES),
        ),
        question(
            "The score on training prompts has risen for twenty steps. What do you ask next?", "C",
            ("whether the policy loss has fallen as well", "It is near 0 by construction, in good runs and in bad ones.", FIRST_PASS),
            ("nothing: the score is what was to rise", "It is what training works on, and the reward model is asked where it has seen least.", GOLD),
            ("how held-out prompts do, paired, and what the texts say", "With an interval, by a measure that training did not see, and then by reading.", AFTER),
        ),
    ),
    "08": (
        question(
            "What may the baseline of a whole answer depend on, if the mean gradient is to stay as it was?", "B",
            ("on nothing: it must be a constant", "Any number will do that does not look at the answer, such as the mean of the other answers or a guess from the prompt.", BASELINE),
            ("on anything but the answer that it is taken from", "Then what it adds is a constant times the gradient of 1.", BASELINE),
            ("on the answer, if it guesses its score well", "Subtract an answer's own score, and nothing is left to learn from.", BASELINE),
        ),
        question(
            "One text scores one point more than another. At a price of 0.1, how many nats rarer may it be under the reference, and still be written as often as the other by the ideal policy?", "C",
            ("0.1", "The score is divided by the price: $e^{s/\\beta}$. Cheap KL buys many nats.", PRICE),
            ("1", "That is a price of 1: the exponent is the score over the price.", PRICE),
            ("10", "One point is a factor of $e^{1/0.1}$: ten nats.", PRICE),
        ),
        question(
            "Best of 8: what is trained, and which price on KL is set?", "A",
            ("nothing, and none: its KL is bounded by n", "At most log n − (n − 1)/n nats.", LETTERS),
            ("the policy, on the best of its eight answers", "That would be a method of its own; best of n draws, keeps the highest score, and trains nothing.", LETTERS),
            ("the reward model, which learns to choose", "It chooses as it is. What is spent is sampling, for every answer anew.", LETTERS),
        ),
    ),
    "09": (
        question(
            "The score is high, KL is at 90 nats, and the answers to all prompts look alike. What do you say?", "B",
            ("the score is high, so people will be content", "Far from the reference the score is a promise that nobody has checked.", SEEN),
            ("probably hacked: read the texts, and measure with something else", "The reward model was never shown such texts.", SEEN),
            ("the KL estimate is broken", "A broken one mostly shows as a mean below 0, or not 0 at the first step. This one says how far the policy went.", KL),
        ),
        question(
            "At the first pass over a batch, before any update, some ratios are 0.4. What now?", "C",
            ("a narrower clip", "The clip hides it. At the first pass there is nothing to clip.", FIRST_PASS),
            ("a smaller learning rate", "Nothing has been updated yet; no learning rate has acted.", FIRST_PASS),
            ("look for what differs between the two passes", "A temperature, a shift by one place, another model: at the first pass every ratio is 1.", FIRST_PASS),
        ),
        question(
            "Somebody's reward model ranks 95 % of held-out pairs correctly, after the pairs were shuffled and split. What do you ask?", "A",
            ("whether the prompts are held out, too", "A prompt with several records lands on both sides: nine in ten did.", SPLIT),
            ("how many epochs it was trained", "More epochs would not explain it on pairs that are truly new. These may not be.", SPLIT),
            ("nothing: 95 % beats ours", "On whose pairs, and prompts that it knew? Without that a share says little.", SPLIT),
        ),
    ),
}
