"""The inspector: it shows the numbers of the rollout, asks nobody for anything, and can be touched."""

import contextlib
import json
import re

import pytest
import torch

from rlhf_helpers import advantages
from rlhf_helpers.course import inspector
from rlhf_helpers.errors import InputError
from tests import tiny
from tests.test_browser import CHROMIUM, ROOT, Browser


@pytest.fixture(scope="module")
def stepped():
    """(trainer, rollout, its frame) of a tiny trainer's second step."""
    trainer = tiny.trainer()
    queries, _, scores = tiny.batch()
    for _ in range(2):
        trainer.step(queries, trainer.generate(queries), scores)
    rollout = trainer.inspect(queries, trainer.generate(queries), scores)
    likeliest = inspector.likeliest_tokens(trainer, rollout)
    return trainer, rollout, inspector.frame(rollout, trainer.tokenizer, "now", likeliest, rollout.logprobs + 0.5)


def test_a_frame_has_every_real_token_s_numbers_and_no_pad(stepped):
    _, rollout, frame = stepped
    assert len(frame["rows"]) == len(rollout) and json.dumps(frame, allow_nan=False)
    for row, shown in enumerate(frame["rows"]):
        length = int(rollout.mask[row].sum())
        assert len(shown["tokens"]) == length and shown["score"] == pytest.approx(rollout.scores[row].item(), rel=5e-3)
        for name, tensor in dict(
            kl=rollout.kl, reward=rollout.rewards, advantage=rollout.advantages, value=rollout.values
        ).items():
            assert shown["numbers"][name] == pytest.approx(tensor[row, :length].tolist(), rel=5e-3, abs=1e-9), name
        assert shown["numbers"]["ratio"] == pytest.approx([0.6487] * length, rel=5e-3)
        assert shown["numbers"]["change"] == pytest.approx([0.5] * length, rel=1e-3)
        assert set(shown["numbers"]) == set(inspector.SIGNALS)


def test_the_likeliest_tokens_are_those_of_policy_and_reference(stepped):
    trainer, rollout, frame = stepped
    for row, shown in enumerate(frame["rows"]):
        for place, token in enumerate(rollout.responses[row].tolist()):
            for side, logprobs in enumerate((rollout.logprobs, rollout.ref_logprobs)):
                top = shown["likeliest"][place][side]
                chances = [chance for _, chance in top]
                assert len(top) == 5 and chances == sorted(chances, reverse=True)
                own = trainer.tokenizer.decode([token])
                if own in dict(map(tuple, top)):  # then with the probability that it was scored with
                    assert dict(map(tuple, top))[own] == pytest.approx(logprobs[row, place].exp().item(), rel=1e-2)


def test_pieces_read_as_the_text_does():
    tokenizer = tiny.tokenizer()
    ids = torch.tensor([5, 6, 7, tiny.EOS])
    pieces = inspector.pieces(tokenizer, ids)
    assert "".join(pieces[:3]) == tokenizer.decode(ids[:3]) and pieces[3] == "<eos>"


def test_a_recorder_notes_the_same_prompts_with_the_same_random_numbers():
    trainer = tiny.trainer()
    reward = lambda prompts, texts: [float(len(text)) for text in texts]
    prompts = ["t5 t6", "t7"]
    recorder = inspector.Recorder(trainer, prompts, reward, every=2, seed=1)
    again = inspector.Recorder(trainer, prompts, reward, every=2, seed=1)
    assert recorder.frames == again.frames and recorder.frames[0]["label"] == "before training"
    trainer.train([f"t{i} t{i + 1}" for i in range(4, 20)], reward, steps=4, on_step=recorder)
    assert [frame["label"] for frame in recorder.frames] == ["before training", "after 2 steps", "after 4 steps"]
    assert [row["prompt"] for row in recorder.frames[-1]["rows"]] == prompts


def test_a_recorder_asks_for_no_groups_of_answers():
    trainer = tiny.trainer(num_generations=2)
    trainer.advantages = advantages.leave_one_out
    recorder = inspector.Recorder(trainer, ["t5 t6", "t7"], lambda prompts, texts: [1.0, 2.0])
    assert len(recorder.frames[0]["rows"]) == 2


def test_a_recorder_shows_the_advantages_that_the_run_learns_from():
    trainer = tiny.trainer()
    trainer.advantages = advantages.no_baseline
    recorder = inspector.Recorder(trainer, ["t5 t6", "t7"], lambda prompts, texts: [1.0, 1.0])
    assert {round(number, 3) for row in recorder.frames[0]["rows"] for number in row["numbers"]["advantage"]} == {1.0}


def test_what_a_recorder_keeps_in_a_file_is_what_it_noted_so_far(tmp_path):
    trainer, file = tiny.trainer(), tmp_path / "run" / "recording.json"
    reward = lambda prompts, texts: [float(len(text)) for text in texts]
    recorder = inspector.Recorder(trainer, ["t5 t6"], reward, every=1, file=file)
    assert len(inspector.load(file)) == 1
    trainer.train([f"t{i} t{i + 1}" for i in range(4, 20)], reward, steps=2, on_step=recorder)
    assert inspector.load(file) == recorder.frames and len(recorder.frames) == 3
    for wrong in ("[]", "{}", '[{"rows": []}]', "["):
        file.write_text(wrong)
        with pytest.raises(InputError, match="recording.json"):
            inspector.load(file)


def test_recording_does_not_change_the_run():
    ends = []
    for record in (False, True):
        trainer = tiny.trainer()
        reward = lambda prompts, texts: [float(len(text) % 7) for text in texts]
        recorder = inspector.Recorder(trainer, ["t5 t6"], reward, every=1) if record else None
        trainer.train([f"t{i} t{i + 1}" for i in range(4, 20)], reward, steps=3, on_step=recorder)
        ends.append(tiny.state(trainer))
    assert tiny.same(*ends)


def test_the_page_stands_alone_and_reads_where_scripts_do_not_run(stepped):
    frame = stepped[2]
    page = inspector.page(frame)
    assert page == inspector.page([frame]) and not re.search(r"https?:|src=|@import|url\(", page)
    plain = re.search(r'class="text".*?>(.*?)</div>', page, re.DOTALL)[1]
    assert plain.count("<span title=") == len(frame["rows"][0]["tokens"]) and "advantage" in plain


def test_text_cannot_break_out_of_the_page(stepped):
    frame = json.loads(json.dumps(stepped[2]))
    frame["rows"][0]["prompt"] = "</script><b id='broken'>x</b><!--"
    frame["rows"][0]["tokens"][:2] = ["<i>", "DATA"]
    page = inspector.page(frame)
    assert page.count("</script>") == 2 and "<i>" not in page.split('<script type="application/json">')[0]
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1])
    assert data["frames"][0] == frame


def test_a_signal_that_the_frames_have_not_is_one_sentence(stepped):
    for signal in "KL", "likeliest":
        with pytest.raises(InputError, match=f"signal = '{signal}'; expected one that the frames have: logprob, ref, kl"):
            inspector.page(stepped[2], signal)


def test_nothing_to_show_is_one_sentence(stepped):
    for frames in [], [stepped[2], dict(label="", rows=[])]:
        with pytest.raises(InputError, match="inspector: no responses to show; expected a frame with one at least"):
            inspector.page(frames)


def test_half_a_character_waits_for_its_other_half():
    """Tokens of a byte-level tokenizer may be parts of one."""

    class Bytes:
        all_special_ids = ()
        decode = staticmethod(lambda ids: bytes(ids).decode("utf-8", errors="replace"))

    pieces = inspector.pieces(Bytes, torch.tensor(list("a😀 b".encode())))
    assert "".join(pieces) == "a😀 b" and pieces[1:4] == ["", "", ""] and pieces[4] == "😀"


@contextlib.contextmanager
def opened(html, folder):
    """A browser that has opened a page; at the end nothing has gone wrong in it, and nothing was asked for."""
    from tests.test_browser import wait_for

    file = folder / "page.html"
    file.write_text(f"<!doctype html><meta charset='utf-8'><body>{html}</body>", encoding="utf-8")
    (folder / "browser").mkdir()
    browser = Browser(folder / "browser")
    try:
        browser.call("Runtime.enable")
        browser.call("Page.enable")
        browser.call("Page.addScriptToEvaluateOnNewDocument", source="window.wrong=[];window.onerror=m=>{window.wrong.push(m)}")
        browser.call("Page.navigate", url=file.as_uri())
        selects = 2 * html.count('class="rlhf-inspector"')
        made = f"document.querySelectorAll('.rlhf-inspector select').length == {selects}"
        wait_for(lambda: browser.evaluate(made), "the page", 20)
        yield browser
        assert browser.evaluate("window.wrong") == [] and [url for url in browser.requests if not url.startswith("file:")] == []
    finally:
        browser.close()


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_it_can_be_touched(stepped, tmp_path):
    """Hover, keys, choice of signal and response, slider; nothing is asked for, and nothing goes wrong."""
    frame = stepped[2]
    with opened(inspector.page([frame | {"label": "first"}, frame]), tmp_path) as browser:
        count = "document.querySelectorAll('.rlhf-inspector .text span').length"
        foot = "document.querySelector('.rlhf-inspector .foot').innerText"
        assert browser.evaluate(count) == len(frame["rows"][0]["tokens"])
        assert "Point at a token" in browser.evaluate("document.querySelector('.rlhf-inspector .hint').innerText")
        shown = frame["rows"][0]["numbers"]["advantage"]
        strongest = max(range(len(shown)), key=lambda i: abs(shown[i] or 0))
        assert f"{strongest + 1} of {len(shown)}" in browser.evaluate(foot)  # before anybody has touched it
        box = browser.evaluate(
            "(({x,y,width,height})=>({x:x+width/2,y:y+height/2}))(document.querySelectorAll('.rlhf-inspector .text span')[1].getBoundingClientRect())"
        )
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", **box)
        assert "2 of" in browser.evaluate(foot) and "policy would say" in browser.evaluate(foot)
        browser.evaluate("document.querySelector('.rlhf-inspector .text').focus()")
        key = lambda name: browser.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name)
        key("ArrowLeft")
        assert "1 of" in browser.evaluate(foot)
        key("ArrowDown")
        assert browser.evaluate(count) == len(frame["rows"][1]["tokens"])
        change = "(s=>{s.selectedIndex=%d;s.dispatchEvent(new Event('change'))})(document.querySelectorAll('.rlhf-inspector select')[0])"
        browser.evaluate(change % list(inspector.SIGNALS).index("kl"))
        assert inspector.SIGNALS["kl"][1] in browser.evaluate("document.querySelector('.rlhf-inspector .what').textContent")
        browser.evaluate(
            "(s=>{s.value=0;s.dispatchEvent(new Event('input'))})(document.querySelector('.rlhf-inspector input'))"
        )
        assert browser.evaluate("document.querySelector('.rlhf-inspector output').textContent") == "first"
        browser.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark")])
        ground = "getComputedStyle(document.querySelector('.rlhf-inspector')).backgroundColor"
        assert browser.evaluate(ground) == "rgb(27, 27, 27)"


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_two_runs_side_by_side_move_together(stepped, tmp_path):
    def labelled(*steps, times=1):
        rows = [
            row | dict(numbers=row["numbers"] | dict(kl=[times * x for x in row["numbers"]["kl"]]))
            for row in stepped[2]["rows"]
        ]
        return [dict(label=f"after {step} steps" if step else "before training", rows=rows) for step in steps]

    alone = inspector.page(labelled(0, 8))
    both = inspector.side_by_side({"one": labelled(0, 4, 8, times=0), "two": labelled(0, 6, 30, times=0.01)})
    with opened(alone + both, tmp_path) as browser:
        labels = "[...document.querySelectorAll('.rlhf-inspector output')].map(o => o.textContent).join()"
        signals = "[...document.querySelectorAll('.rlhf-inspector')].map(r => r.querySelector('select').selectedIndex).join()"
        scales = (
            "[...document.querySelectorAll('.rlhf-inspector .bar > .what')].map(o => o.textContent.split('full colour at ')[1])"
        )
        one, left, right = browser.evaluate(scales)
        assert left == right and 0 < float(right) < 0.02 * float(one)  # of the run that has any KL
        assert browser.evaluate(labels) == "after 8 steps,after 8 steps,after 30 steps"
        slide = "(s=>{s.value=%d;s.dispatchEvent(new Event('input'))})(document.querySelectorAll('.rlhf-inspector input')[%d])"
        for place, which, expected in (2, 1, "8,6"), (1, 1, "4,6"), (2, 2, "8,30"):
            browser.evaluate(slide % (place, which))
            assert browser.evaluate(labels) == ",".join(f"after {n} steps" for n in ["8", *expected.split(",")])
        browser.evaluate(slide % (0, 2))
        assert browser.evaluate(labels) == "after 8 steps,before training,before training"
        browser.evaluate(slide % (2, 2))
        browser.evaluate(slide % (2, 1))
        browser.evaluate(slide % (2, 2))
        moved = browser.evaluate(labels)
        value = list(inspector.SIGNALS).index("value")
        browser.evaluate(
            f"(s=>{{s.selectedIndex={value};s.dispatchEvent(new Event('change'))}})(document.querySelectorAll('.rlhf-inspector select')[2])"
        )
        assert browser.evaluate(signals) == f"{list(inspector.SIGNALS).index('advantage')},{value},{value}"
        browser.evaluate("document.querySelectorAll('.rlhf-inspector .text')[1].focus()")
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowDown", code="ArrowDown")
        responses = (
            "[...document.querySelectorAll('.rlhf-inspector')].map(r => r.querySelectorAll('select')[1].selectedIndex).join()"
        )
        assert browser.evaluate(responses) == "0,1,1"
        assert browser.evaluate(labels) == moved == "after 8 steps,after 8 steps,after 30 steps"  # only a slider moves a slider


def test_the_page_without_installation_is_small_and_has_both_runs():
    page = (ROOT / "docs" / "inspector.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 1_000_000 and "http" not in page and page.count('data-linked="runs"') == 2
    frames = [
        json.loads(data)["frames"] for data in re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    ]
    assert len(frames) == 2 and all(len(run) > 5 and run[0]["label"] == "before training" for run in frames)
    priced, free = (sum(sum(row["numbers"]["kl"]) for row in run[-1]["rows"]) for run in frames)
    assert free > 3 * priced  # what the page is there to show
