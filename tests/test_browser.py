"""A real browser: JupyterLab opens a notebook in headless Chromium and runs it, as a learner would; then the figures are looked
for on the screen. A tiny notebook every time, the course's own among the slow tests. Chromium is driven over its own DevTools protocol: https://chromedevtools.github.io/devtools-protocol/"""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from matplotlib.image import imread

from rlhf_helpers.course import inspector

ROOT = Path(__file__).resolve().parent.parent
SCREENS = ROOT / "output" / "screens"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
LIMIT = 1200  # seconds for one notebook; two minutes where nothing else runs
WHOLE = pytest.mark.slow  # minutes; without a browser the notebooks run in `make test`, too (nbval)
FIGURES = [
    pytest.param("tiny", "plots.token_heatmap(", id="a heat map"),
    pytest.param("tiny", "plots.LiveCurves(", id="a live figure"),
    pytest.param("04_ppo_step_by_step", "plots.token_heatmap(tokenizer, rollout, best)", id="the heat map of 04", marks=WHOLE),
    pytest.param("05_ppo_training_loop", "plots.LiveCurves(", id="the live figure of 05", marks=WHOLE),
]
TINY = [  # a notebook that trains a tiny model and shows what 04 and 05 show
    "from rlhf_helpers.course import plots\nfrom tests import tiny\ntrainer = tiny.trainer()\nqueries, _, scores = tiny.batch()",
    """with plots.LiveCurves(3, every=0) as live:
    for _ in range(3):
        live(trainer, trainer.step(queries, trainer.generate(queries), scores))""",
    """plots.show(plots.token_heatmap(trainer.tokenizer, trainer.rollout, 0), alt="one response, four times")""",
]

websocket = pytest.importorskip("websocket", reason="no websocket-client: pip install -e .[lab,test,trl]")
pytest.importorskip("jupyterlab", reason="no JupyterLab: pip install -e .[lab,test,trl]")
no_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt install chromium)")
pytestmark = [pytest.mark.browser, no_browser]

READY = """(() => { const panel = window.jupyterapp?.shell.currentWidget;
    return Boolean(panel?.content?.model && panel.context.isReady && panel.sessionContext.isReady
                   && panel.sessionContext.session?.kernel?.status === "idle"); })()"""

STATE = """(() => { const panel = window.jupyterapp.shell.currentWidget;
    const cells = [...panel.content.model.cells].map((cell, i) => [cell, i]).filter(([cell]) => cell.type === "code");
    const errors = cells.flatMap(([cell, i]) => cell.outputs.toJSON().filter(output => output.output_type === "error")
                                                    .map(output => [i, output.ename, output.evalue]));
    const kernel = panel.sessionContext.session?.kernel?.status;
    return { errors, kernel, counts: cells.map(([cell]) => cell.executionCount) }; })()"""

SCROLL = """(async source => { const notebook = window.jupyterapp.shell.currentWidget.content;
    const i = [...notebook.model.cells].findIndex(cell => cell.type === "code" && cell.sharedModel.source.includes(source));
    notebook.activeCellIndex = i;
    await notebook.scrollToItem(i, "start");
    await new Promise(done => setTimeout(done, 1000));
    notebook.widgets[i].node.querySelector(".jp-OutputArea-output img")?.scrollIntoView({block: "center"});
    await new Promise(done => setTimeout(done, 1000));
    return [...notebook.widgets[i].node.querySelectorAll(".jp-OutputArea-output :is(img, svg)")].map(image => {
        const {x, y, width, height} = image.getBoundingClientRect();
        const top = document.elementFromPoint(x + width / 2, y + height / 2);
        return { x, y, width, height, loaded: image.complete && image.naturalWidth > 0, onTop: top === image }; });
})(%s)"""


class Browser:
    """Headless Chromium with one page. `requests` are the addresses that the page has asked for."""

    def __init__(self, folder):
        flags = ["--headless=new", "--remote-debugging-port=0", "--no-first-run", "--disable-background-networking",
                 "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,1600", f"--user-data-dir={folder}"]  # fmt: skip
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = wait_for(lambda: (folder / "DevToolsActivePort").read_text().split()[0], "Chromium", 60)
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10))
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.requests, self.sent = [], 0
        self.call("Network.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # JupyterLab asks which panel has the focus

    def call(self, method, **parameters):
        """One command of the protocol, and its result. Events that come in between are read, too."""
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == self.sent:
                assert "error" not in message, message
                return message["result"]

    def evaluate(self, expression):
        """The value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path, **clip):
        """The page, or a rectangle of it, as a PNG file; returns the pixels."""
        area = {"clip": {**clip, "scale": 1}} if clip else {}
        content = base64.b64decode(self.call("Page.captureScreenshot", format="png", **area)["data"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return imread(io.BytesIO(content))

    def close(self):
        self.socket.close()
        stop(self.process)


def wait_for(condition, what, seconds, every=0.25):
    """The first true value of `condition()`; an OSError counts as not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except OSError:
            pass
        time.sleep(every)
    pytest.fail(f"{what} was not ready after {seconds} seconds")


def stop(process):
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def up_to_the_figure(notebook, source):
    """The text of a notebook as if it had never been run, what is seen later was made in the browser; and without the cells after
    the one with `source`, which have been run without a browser (nbval)."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    (last,) = (
        place
        for place, cell in enumerate(content["cells"])
        if cell["cell_type"] == "code" and source in "".join(cell["source"])
    )
    content["cells"] = content["cells"][: last + 1]
    for cell in content["cells"]:
        cell |= {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
    return json.dumps(content)


def tiny_notebook():
    cell = lambda source: dict(cell_type="code", source=source, metadata={}, outputs=[], execution_count=None)
    kernel = dict(name="python3", display_name="Python 3", language="python")
    return json.dumps(dict(cells=list(map(cell, TINY)), metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=4))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on a copy of the notebooks. Models and data are those of the repository (RLHF_HOME)."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "config" / "labconfig").mkdir(parents=True)
    news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}  # asks to fetch news, in a pop-up
    (folder / "config" / "labconfig" / "page_config.json").write_text(json.dumps(news))
    (folder / "course").mkdir()
    (folder / "course" / "tiny.ipynb").write_text(tiny_notebook())
    for name, source in (case.values for case in FIGURES if case.marks):
        (folder / "course" / f"{name}.ipynb").write_text(up_to_the_figure(ROOT / "notebooks" / f"{name}.ipynb", source))
    port = free_port()
    settings = {"ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0,
                "ServerApp.root_dir": folder / "course", "LabApp.workspaces_dir": folder / "workspaces",
                "LabApp.expose_app_in_browser": True, "IdentityProvider.token": ""}  # fmt: skip
    own = {"JUPYTER_CONFIG_DIR": folder / "config", "JUPYTER_RUNTIME_DIR": folder / "runtime", "IPYTHONDIR": folder / "ipython",
           "JUPYTER_DATA_DIR": folder / "data", "RLHF_HOME": ROOT, "RLHF_FAST": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOT}  # fmt: skip
    env = os.environ | {k: str(v) for k, v in own.items()}
    for name in ("trusted", "stored"):
        inspector_notebook(folder / "course" / f"{name}.ipynb")
    trust = [sys.executable, "-m", "jupyter", "trust", folder / "course" / "trusted.ipynb"]
    subprocess.run(trust, check=True, capture_output=True, env=env)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *(f"--{k}={v}" for k, v in settings.items())]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: urllib.request.urlopen(f"{address}/api/status", timeout=5).status == 200, "JupyterLab", 90)
        yield address
    finally:
        stop(server)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


TOUCHED = """(() => { const page = document.querySelector(".rlhf-inspector"), token = page?.querySelectorAll(".text span")[1];
    token?.dispatchEvent(new MouseEvent("mouseenter"));
    return { choices: page?.querySelectorAll("select").length, words: page?.querySelector(".text")?.textContent,
             ground: page && getComputedStyle(page).backgroundColor, foot: page?.querySelector(".foot")?.textContent }; })()"""


def inspector_notebook(path):
    """Writes a notebook whose stored output is the inspector, of two tokens."""
    numbers = {name: [0.5, -0.5] for name in inspector.SIGNALS}
    frame = dict(label="", rows=[dict(prompt="Say it.", score=1.0, tokens=["Hello", " there"], numbers=numbers)])
    output = nbformat.v4.new_output("display_data", {"text/html": inspector.page(frame), "text/plain": "an inspector"})
    cell = nbformat.v4.new_code_cell("inspector.show(frame)", outputs=[output])
    kernel = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=dict(kernelspec=kernel)), path)


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "as somebody else stored it"])
def test_an_inspector_is_there_when_a_notebook_is_opened_again_without_a_kernel(lab, browser, trusted):
    """With its script and JupyterLab's theme where the notebook is trusted, and its text where it is not."""
    browser.call("Page.navigate", url=f"{lab}/lab/tree/{'trusted' if trusted else 'stored'}.ipynb?reset")
    wait_for(lambda: browser.evaluate(READY), "the notebook", 120)
    seen = wait_for(lambda: (now := browser.evaluate(TOUCHED))["words"] and now, "the inspector", 60)
    assert seen["words"] == "Hello there" and seen["choices"] == (2 if trusted else 0)
    if trusted:
        assert "2 of 2" in seen["foot"] and seen["ground"] == "rgb(255, 255, 255)"
        browser.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'}), null")
        wait_for(lambda: browser.evaluate(TOUCHED)["ground"] == "rgb(27, 27, 27)", "the dark ground", 60)
    assert not browser.evaluate("window.jupyterapp.shell.currentWidget.content.model.cells.get(0).executionCount")


@pytest.mark.parametrize("notebook, source", FIGURES)
def test_run_all_in_jupyterlab_puts_the_figure_on_the_screen(lab, browser, notebook, source):
    browser.call("Page.navigate", url=f"{lab}/lab/tree/{notebook}.ipynb?reset")
    wait_for(lambda: browser.evaluate(READY), f"{notebook} in JupyterLab", 120)
    browser.evaluate("window.jupyterapp.commands.execute('runmenu:run-all'), null")

    def finished():
        state = browser.evaluate(STATE)
        return state if state["errors"] or (state["kernel"] == "idle" and None not in state["counts"]) else None

    try:
        state = wait_for(finished, f"Run All of {notebook}", LIMIT, every=1)
        assert state["errors"] == []
        assert state["counts"] == list(range(1, len(state["counts"]) + 1))
        (image,) = browser.evaluate(SCROLL % json.dumps(source))  # one output, drawn anew in place
        browser.screenshot(SCREENS / f"{notebook}.png")
        assert image["loaded"] and image["onTop"] and image["width"] > 400
        area = {name: image[name] for name in ("x", "y", "width", "height")}
        assert browser.screenshot(SCREENS / f"{notebook}_figure.png", **area).std() > 0.05  # not one plain ground
    finally:
        browser.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    inside = (lab, lab.replace("http", "ws"), "data:", "blob:")
    assert {address for address in browser.requests if not address.startswith(inside)} <= {BADGE}
