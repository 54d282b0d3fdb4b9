"""The inspector: every number of every token, to be touched. `show(frames)` puts it on a notebook's page: one piece of HTML with its
script and data inside, which asks nobody for anything, needs no kernel, and works in an exported page.

A *frame* is one batch of responses with their numbers (`frame`); several of them, of one run, get a slider (`Recorder`)."""

import hashlib
import html as escaping
import json
import math
import re

import torch

from rlhf_helpers.errors import InputError
from rlhf_helpers.files import read_json, write_text
from rlhf_helpers.models import response_logits
from rlhf_helpers.rollout import gae_advantages

SIGNALS = {  # key: (name on the page, what it is)
    "logprob": ("log-prob", "log-probability under the policy that wrote it, nats"),
    "ref": ("reference", "log-probability under the reference, nats"),
    "kl": ("KL", "log-prob less the reference's, nats; of a single token it may be below 0"),
    "price": ("price of KL", "what the token pays for its KL: -\u03b2 \u00d7 KL"),
    "reward": ("reward", "the price, and on the last token the score"),
    "value": ("value", "what the value head expects before this token"),
    "return": ("return", "value plus advantage before whitening; with \u03bb = 1, all that is earned from this token on"),
    "raw": ("return \u2212 value", "the advantage before whitening"),
    "advantage": ("advantage", "what the update weighs the token with"),
    "change": ("change", "log-prob after the update, less before; nats"),
    "ratio": ("ratio \u2212 1", "how much likelier the update made the token: probability after / before, less 1"),
}


def frame(rollout, tokenizer, label="", likeliest=None, after=None):
    """A dict of what the page shows of a Rollout, which JSON can hold. `likeliest` comes from `likeliest_tokens`; `after` are the
    log-probs (B, T) of the same tokens after the update, where they are known."""
    mask = rollout.mask.cpu()
    pick = lambda tensor, row: [short(x) for x in tensor[row][mask[row]].tolist()]
    columns = {
        "logprob": rollout.logprobs,
        "ref": rollout.ref_logprobs,
        "kl": rollout.kl,
        "price": rollout.non_score_rewards,
        "reward": rollout.rewards,
        "value": rollout.values,
        "return": rollout.returns,
        "raw": rollout.returns - rollout.values,
        "advantage": rollout.advantages,
    }
    if after is not None:
        columns["change"] = after - rollout.logprobs
        columns["ratio"] = torch.exp(columns["change"]) - 1
    rows = []
    for row, response in enumerate(rollout.responses):
        tokens = pieces(tokenizer, response)
        numbers = {name: pick(tensor.detach().float().cpu(), row) for name, tensor in columns.items()}
        rows.append(dict(prompt=rollout.prompts[row], score=short(rollout.scores[row].item()), tokens=tokens, numbers=numbers))
        if likeliest is not None:
            rows[-1]["likeliest"] = likeliest[row]
    return dict(label=label, rows=rows)


def short(number):
    """A number as the page keeps it: three digits, and None where it is none."""
    return float(f"{number:.3g}") if math.isfinite(number) else None


def pieces(tokenizer, ids):
    """The text of each token, so that together they read as the response does; special tokens by their names."""
    special = set(tokenizer.all_special_ids)
    texts, done = [], ""
    for n, i in enumerate(ids.tolist(), 1):
        if i in special:
            texts.append(tokenizer.convert_ids_to_tokens(i))
            continue
        text = tokenizer.decode([j for j in ids[:n].tolist() if j not in special]).rstrip("\ufffd")  # half a character waits
        texts.append(text[len(done) :] if text.startswith(done) else tokenizer.decode([i]))
        done = text
    return texts


@torch.no_grad()
def likeliest_tokens(trainer, rollout, k=5):
    """For every token of every response the k likeliest ones that the policy, and the reference, would have put there: per response
    a list of pairs of lists of (text, probability). A pass of each; the adapters are as they are now."""
    tokenizer, temperature, found = trainer.tokenizer, trainer.config.temperature, []
    for rows in torch.arange(len(rollout), device=trainer.device).split(trainer.config.mini_batch_size):
        tops = []
        with trainer.model.without_dropout():
            policy = response_logits(trainer.model.pretrained_model, *rollout.inputs(rows))
            for logits in (policy, trainer._reference_logits(rollout, rows)):
                tops.append((logits.float() / temperature).softmax(-1).topk(k))
        for place, row in enumerate(rows.tolist()):
            length = int(rollout.mask[row].sum())
            sides = [
                [
                    [[tokenizer.decode([i]), short(p)] for i, p in zip(ids, chances)]
                    for ids, chances in zip(top.indices[place, :length].tolist(), top.values[place, :length].tolist())
                ]
                for top in tops
            ]
            found.append([list(pair) for pair in zip(*sides)])
    return found


class Recorder:
    """`train(..., on_step=Recorder(trainer, prompts, reward_fn))` notes what the policy answers to the same few prompts, with the same
    random numbers, before the first step (when it is made) and after every `every` steps; `likeliest`: with the likeliest tokens of
    every place, which makes the page four times as large. `frames` is what `show` takes; in `file`, if one is given, they are kept as
    JSON, which `load` reads."""

    def __init__(self, trainer, prompts, reward_fn, every=4, seed=0, likeliest=False, file=None):
        self.prompts, self.queries = trainer.encode(prompts)
        self.reward_fn, self.every, self.seed, self.likeliest, self.file = reward_fn, every, seed, likeliest, file
        self.frames = []
        self.note(trainer)

    def note(self, trainer):
        responses = trainer.generate(self.queries, generator=torch.Generator().manual_seed(self.seed))
        scores = self.reward_fn(self.prompts, trainer.decode(responses))
        grouped = trainer.config.num_generations > 1  # then the trainer's may want groups, and there are none here
        rollout = trainer.inspect(self.queries, responses, scores, gae_advantages if grouped else None)
        rollout.prompts = self.prompts
        label = f"after {trainer.steps_done} steps" if trainer.steps_done else "before training"
        likeliest = likeliest_tokens(trainer, rollout) if self.likeliest else None
        self.frames.append(frame(rollout, trainer.tokenizer, label, likeliest))
        if self.file and trainer.accelerator.is_main_process:
            write_text(self.file, json.dumps(self.frames, ensure_ascii=False))

    def __call__(self, trainer, stats):
        if trainer.steps_done % self.every == 0:
            self.note(trainer)


# ---------------------------------------------------------------- the page


def load(file):
    """The frames that a Recorder kept in a file. Raises InputError for any other file."""
    frames = read_json(file)
    if not (isinstance(frames, list) and frames and all(isinstance(f, dict) and f.get("rows") for f in frames)):
        raise InputError(f"{file}: no frames of the inspector; expected a file that Recorder(..., file=...) wrote")
    return frames


def show(frames, signal="advantage"):
    """Put the inspector on a notebook's page. `frames` is a frame or a list of them; `signal`, a key of SIGNALS, is what the tokens are
    coloured by at first. Raises InputError for a signal that the frames have not."""
    from IPython.display import HTML, display

    display(HTML(page(frames, signal)))


def side_by_side(runs, signal="kl"):
    """Two recorded runs as HTML, next to each other where the page is wide enough: a dict of their frames by title. Signal, response
    and slider of one move the other's (to the nearest step that it has), and both have one scale."""
    columns = (
        f"<div><h2>{escaping.escape(title)}</h2>\n{page(frames, signal, linked='runs')}</div>" for title, frames in runs.items()
    )
    return (
        '<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:16px">'
        + "".join(columns)
        + "</div>"
    )


def page(frames, signal="advantage", linked=""):
    """The inspector of one frame or several as HTML: one <div>, with its style, its script and its data. All on a page that have the
    same word in `linked` move together."""
    frames = frames if isinstance(frames, list) else [frames]
    if not frames or not all(frame["rows"] for frame in frames):
        raise InputError("inspector: no responses to show; expected a frame with one at least")
    present = [name for name in SIGNALS if name in frames[0]["rows"][0]["numbers"]]
    if signal not in present:
        raise InputError(f"inspector: signal = {signal!r}; expected one that the frames have: {', '.join(present)}")
    data = dict(frames=frames, signals={name: SIGNALS[name] for name in present}, signal=signal)
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    name = "inspector-" + hashlib.sha1(packed.encode(), usedforsecurity=False).hexdigest()[:10]
    first = frames[0]["rows"][0]
    plain = "".join(
        f'<span title="{escaping.escape(f"{SIGNALS[signal][0]} {number}")}">{escaping.escape(token)}</span>'
        for token, number in zip(first["tokens"], first["numbers"][signal])
    )  # what is read where scripts do not run
    parts = dict(NAME=name, PLAIN=plain, DATA=packed, LINKED=escaping.escape(linked))
    return re.sub("NAME|PLAIN|DATA|LINKED", lambda part: parts[part[0]], TEMPLATE)  # in one go: a token may read DATA


TEMPLATE = """<div id="NAME" class="rlhf-inspector" data-linked="LINKED">
<style>
#NAME{--ground:#fff;--ink:#111;--line:#bbb;--soft:#f3f3f3;--up:0,114,178;--down:213,94,0;color:var(--ink);background:var(--ground);
font:15px/1.6 system-ui,sans-serif;border:1px solid var(--line);border-radius:8px;padding:12px 14px;max-width:960px}
@media (prefers-color-scheme:dark){#NAME{--ground:#1b1b1b;--ink:#eee;--line:#555;--soft:#2a2a2a;--up:86,180,233;--down:230,159,0}}
[data-jp-theme-light="true"] #NAME{--ground:#fff;--ink:#111;--line:#bbb;--soft:#f3f3f3;--up:0,114,178;--down:213,94,0}
[data-jp-theme-light="false"] #NAME{--ground:#1b1b1b;--ink:#eee;--line:#555;--soft:#2a2a2a;--up:86,180,233;--down:230,159,0}
#NAME .bar{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:center;margin-bottom:8px;font-size:13px}
#NAME select,#NAME button{font:inherit;color:inherit;background:var(--soft);border:1px solid var(--line);border-radius:5px;padding:2px 8px}
#NAME .text{white-space:pre-wrap;line-height:2;padding:6px 8px;border-radius:6px;outline-offset:2px;overflow-wrap:break-word}
#NAME .text span{border-radius:3px;padding:2px 0;cursor:default}
#NAME .text span.on{outline:2px solid var(--ink)}
#NAME .prompt{font-weight:600}
#NAME table{border-collapse:collapse;font-size:13px;margin:8px 0 0;color:inherit}
#NAME td,#NAME th{padding:1px 10px 1px 0;text-align:left;border:0;background:none;color:inherit}
#NAME td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
#NAME th{white-space:nowrap}
#NAME .foot{display:flex;flex-wrap:wrap;gap:4px 40px;min-height:15em;align-items:flex-start}
#NAME .what{opacity:.75}
#NAME .hint{font-size:13px}
</style>
<div class="bar" role="group" aria-label="what is shown"></div>
<div class="prompt"></div>
<div class="text" tabindex="0" aria-label="the response; arrow keys go from token to token">PLAIN</div>
<div class="what hint">Point at a token, or click into the text and use the arrow keys (up and down: another response). It opens on the largest number.</div>
<div class="foot" aria-live="polite"></div>
<script type="application/json">DATA</script>
<script>
(function(){
const root=[...document.querySelectorAll('[id="NAME"]')].find(r=>!r.dataset.on);if(!root)return;root.dataset.on=1;const D=JSON.parse(root.querySelector("script[type='application/json']").textContent);
const at={f:D.frames.length-1,r:0,t:-1,s:D.signal},bar=root.querySelector(".bar"),text=root.querySelector(".text"),foot=root.querySelector(".foot");
const el=(tag,props,...kids)=>{const e=Object.assign(document.createElement(tag),props||{});kids.forEach(k=>e.append(k));return e};
const row=()=>D.frames[at.f].rows[at.r],show=x=>x===null||x===undefined?"\\u2013":(x<0?"\\u2212":"")+Math.abs(x).toFixed(Math.abs(x)>=10?1:Math.abs(x)>=1?2:3);
const scale={};Object.keys(D.signals).forEach(s=>{const all=[];D.frames.forEach(f=>f.rows.forEach(r=>(r.numbers[s]||[]).forEach(x=>x!==null&&all.push(Math.abs(x)))));
all.sort((a,b)=>a-b);scale[s]=all.length?(all[Math.floor(.98*(all.length-1))]||all[all.length-1]):0});
const others=()=>root.dataset.linked?[...document.querySelectorAll(".rlhf-inspector")].filter(r=>r!==root&&r.look&&r.dataset.linked===root.dataset.linked).map(r=>r.look):[];
const steps=D.frames.map(f=>+(String(f.label||"").match(/\\d+/)||[0])[0]),tell=slid=>others().forEach(o=>o.follow(at.s,at.r,slid?steps[at.f]:null));
const most=()=>Math.max(scale[at.s],...others().map(o=>o.scale[at.s]||0))||1;
root.look={scale,draw:()=>draw(),follow(s,r,step){if(D.signals[s])at.s=s;if(step!==null){at.f=0;steps.forEach((n,i)=>{if(Math.abs(n-step)<Math.abs(steps[at.f]-step))at.f=i})}
at.r=Math.min(r,D.frames[at.f].rows.length-1);at.t=-1;draw()}};
const pick=(label,list,get,set)=>{const s=el("select",{onchange:()=>{set(+s.value);draw();tell()}});list.forEach((o,i)=>s.append(el("option",{value:i,textContent:o})));
s.setAttribute("aria-label",label);const box=el("label",{},label+" ",s);box.sync=()=>{s.value=get()};bar.append(box);return box};
const names=Object.keys(D.signals),controls=[
pick("show",names.map(n=>D.signals[n][0]),()=>names.indexOf(at.s),i=>{at.s=names[i]}),
pick("response",D.frames.reduce((a,b)=>b.rows.length>a.rows.length?b:a).rows.map((r,i)=>(i+1)+" \\u00b7 "+r.prompt.slice(0,48)),()=>at.r,i=>{at.r=Math.min(i,D.frames[at.f].rows.length-1);at.t=-1})];
if(D.frames.length>1){const slide=el("input",{type:"range",min:0,max:D.frames.length-1,step:1,oninput:()=>{at.f=+slide.value;at.r=Math.min(at.r,D.frames[at.f].rows.length-1);at.t=-1;draw();tell(true)}}),out=el("output");
slide.setAttribute("aria-label","step");const box=el("label",{},"step ",slide," ",out);box.sync=()=>{slide.value=at.f;out.textContent=D.frames[at.f].label};bar.append(box);controls.push(box)}
const legend=el("span",{className:"what"});bar.append(legend);
function strongest(){const n=row().numbers[at.s]||[];return n.reduce((best,x,i)=>Math.abs(x||0)>Math.abs(n[best]||0)?i:best,0)}
function detail(){foot.replaceChildren();const r=row();
const left=el("table");left.append(el("tr",{},el("th",{textContent:"token"}),el("td",{className:"n",textContent:JSON.stringify(r.tokens[at.t])}),el("td",{className:"what",textContent:(at.t+1)+" of "+r.tokens.length})));
names.forEach(n=>{if(r.numbers[n])left.append(el("tr",{},el("th",{textContent:D.signals[n][0]}),el("td",{className:"n",textContent:show(r.numbers[n][at.t])}),el("td",{className:"what",textContent:D.signals[n][1]})))});
foot.append(left);
if(r.likeliest){const right=el("table");right.append(el("tr",{},...["policy would say","","reference would say",""].map(h=>el("th",{textContent:h}))));
const [p,q]=r.likeliest[at.t];p.forEach((_,i)=>right.append(el("tr",{},...[p[i],q[i]].flatMap(x=>[el("td",{textContent:JSON.stringify(x[0])}),el("td",{className:"n",textContent:(100*x[1]).toFixed(1)+" %"})]))));foot.append(right)}}
function choose(t){at.t=t;[...text.children].forEach((s,i)=>s.classList.toggle("on",i===t));detail()}
function draw(){const r=row(),m=most();root.querySelector(".prompt").textContent=r.prompt+"   (score "+show(r.score)+(r.numbers.kl?", KL "+show(r.numbers.kl.reduce((a,b)=>a+b,0))+" nats":"")+")";text.replaceChildren();
r.tokens.forEach((token,i)=>{const x=(r.numbers[at.s]||[])[i],s=el("span",{textContent:token,onmouseenter:()=>choose(i),onclick:()=>choose(i)});
if(x!==null&&x!==undefined){s.style.background="rgba(var("+(x<0?"--down":"--up")+"),"+(.75*Math.min(1,Math.abs(x)/m)).toFixed(3)+")"}text.append(s)});
legend.textContent=D.signals[at.s][1]+"; blue above 0, orange below, full colour at "+show(m);controls.forEach(c=>c.sync());choose(at.t<0?strongest():Math.min(at.t,r.tokens.length-1))}
text.addEventListener("keydown",e=>{const rows=D.frames[at.f].rows.length,keys={ArrowRight:()=>choose(Math.min(at.t+1,row().tokens.length-1)),ArrowLeft:()=>choose(Math.max(at.t-1,0)),
ArrowDown:()=>{at.r=(at.r+1)%rows;draw();tell()},ArrowUp:()=>{at.r=(at.r+rows-1)%rows;draw();tell()}};if(keys[e.key]){e.preventDefault();e.stopPropagation();keys[e.key]()}});
draw();others().forEach(o=>o.draw())})();
</script>
</div>"""
