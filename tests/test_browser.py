"""A reader's way through JupyterLab in a real browser: open, run all cells, move the slider."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from helpers.classroom.store import clean
from tests.validation import NOTEBOOKS, ROOT, clean_environment, leftovers, read

SCREENSHOTS = ROOT / "tests" / "artifacts" / "screenshots"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
RUN_SECONDS = 120

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1400,1700",
)


@pytest.fixture(scope="module", autouse=True)
def browser_is_there():
    """Without a browser these tests are skipped, except on the build server."""
    if CHROMIUM and DRIVER:
        return
    reason = "Chromium or its driver is missing: apt-get install chromium chromium-driver"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


# ---------------------------------------------------------------- JupyterLab and the browser


class Lab:
    """JupyterLab on a free port, in a folder with a copy of a notebook."""

    def __init__(self, folder, notebook):
        self.environment = clean_environment(folder)
        self.root = folder / "course"
        self.root.mkdir()
        # Without stored outputs, so that all that is seen later comes from this run.
        copy = read(notebook)
        for cell in copy.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(copy, self.root / notebook.name)
        self.token = secrets.token_hex(8)
        options = ["--no-browser", "--ServerApp.port=0", f"--ServerApp.root_dir={self.root}"]
        options += [f"--IdentityProvider.token={self.token}", "--ServerApp.ip=127.0.0.1"]
        options += ["--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
        options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
        options += ["--LabApp.expose_app_in_browser=True"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--allow-root")
        self.log = folder / "lab.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *options],
                cwd=folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.url = self._wait_for_url()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _wait_for_url(self):
        runtime = Path(self.environment["JUPYTER_RUNTIME_DIR"])
        for _ in range(600):
            for path in runtime.glob("jpserver-*.json"):
                url = json.loads(path.read_text())["url"]
                if self._answers(url):
                    return url
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}")

    def _answers(self, url):
        try:
            return urllib.request.urlopen(f"{url}api?token={self.token}", timeout=5).status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def close(self):
        """End the server and its kernels, as Ctrl-C does."""
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert leftovers(self.environment) == []


def open_browser(folder):
    """Chromium without a network of its own, which records what it asks for."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder / 'chromium'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    environment = clean_environment(folder / "b") | {"HOME": str(folder)}
    service = webdriver.ChromeService(executable_path=DRIVER, env=environment)
    return webdriver.Chrome(options=options, service=service)


class Page:
    """A notebook that is open in JupyterLab."""

    def __init__(self, driver, lab, name):
        self.driver, self.name = driver, name
        self.requests = []
        driver.get(f"{lab.url}lab/tree/{name}?reset&token={lab.token}")
        self.wait("the kernel to be idle", self._idle)

    def wait(self, what, condition, seconds=60):
        """The first true value of `condition()`; after some seconds a screenshot and an error."""
        try:
            return WebDriverWait(self.driver, seconds, 0.2).until(lambda _: condition())
        except TimeoutException:
            self.photograph("failed")
            raise AssertionError(f"waited {seconds} s in vain for {what}") from None

    def _idle(self):
        # JupyterLab's own word for it. The mark on the page says idle before there is a kernel,
        # and cells that are run then are silently left out.
        script = """
            const session = window.jupyterapp?.shell.currentWidget?.context?.sessionContext;
            const kernel = session?.session?.kernel;
            return Boolean(session?.isReady && kernel?.connectionStatus === "connected"
                           && kernel.status === "idle");
        """
        return self.driver.execute_script(script)

    def cells(self):
        """The cells as JupyterLab holds them now: also those outside of the window."""
        model = "jupyterapp.shell.currentWidget.context.model.sharedModel"
        return self.driver.execute_script(f"return {model}.toJSON().cells")

    def run_all(self):
        """Run → Run All Cells, with the mouse; the code cells after they ended."""
        menu = "//div[@id='jp-MainMenu']//div[text()='Run']"
        self.driver.find_element(By.XPATH, menu).click()
        entry = "//ul[contains(@class,'lm-Menu-content')]//div[text()='Run All Cells']"
        self.wait("the menu", lambda: self.driver.find_elements(By.XPATH, entry))[0].click()
        self.wait("all cells to end", self._all_ran, RUN_SECONDS)
        return [cell for cell in self.cells() if cell["cell_type"] == "code"]

    def _all_ran(self):
        busy = self.driver.find_elements(By.XPATH, "//*[text()='[*]:']")
        code = [cell for cell in self.cells() if cell["cell_type"] == "code"]
        ended = all(cell["execution_count"] for cell in code) or errors(code)
        return not busy and ended and self._idle()

    def slider(self, label):
        """The handle of the slider with this label, scrolled into the window."""
        path = (
            f"//*[contains(@class,'widget-slider')][.//label[normalize-space()='{label}']]"
            "//*[contains(@class,'noUi-handle')]"
        )
        handle = self.wait(f"the slider {label}", lambda: self._find(path))
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", handle)
        return handle

    def _find(self, path):
        found = self.driver.find_elements(By.XPATH, path)
        return found[0] if found else self._scroll()

    def _scroll(self):
        # Cells outside of the window may not be drawn yet: go down by a page.
        self.driver.execute_script(
            "const box = document.querySelector('.jp-WindowedPanel-outer');"
            "const end = box.scrollTop + box.clientHeight >= box.scrollHeight - 2;"
            "box.scrollTop = end ? 0 : box.scrollTop + 600;"
        )

    def press(self, handle, key):
        """Give the slider's handle the focus and press a key once."""
        self.driver.execute_script("arguments[0].focus()", handle)
        ActionChains(self.driver).send_keys(key).perform()

    def panel(self):
        """The box of widgets around the slider: its text, and its pictures as text."""
        script = (
            "const slider = document.querySelector('.widget-slider');"
            "const box = slider.closest('.jp-OutputArea-output');"
            "const pictures = [...box.querySelectorAll('.widget-html svg, .widget-html img')];"
            "return [box.innerText, pictures.map(p => p.src || p.outerHTML)]"
        )
        return self.driver.execute_script(script)

    def photograph(self, name):
        """Keep a screenshot."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{Path(self.name).stem}-{name}.png"
        self.driver.save_screenshot(str(path))
        print(f"screenshot: {path}")

    def outside_requests(self):
        """Addresses on other machines that the page asked for."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            parameters = message.get("params", {})
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                self.requests.append(parameters["url"])
        parts = [urlsplit(url) for url in self.requests]
        here = ("127.0.0.1", "localhost")
        return [
            p.geturl() for p in parts if p.scheme[:2] in ("ht", "ws") and p.hostname not in here
        ]

    def console_errors(self):
        """Errors that the page wrote to the browser's console."""
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]


@pytest.fixture
def open_page(short_folder):
    """A function that opens a notebook in JupyterLab in a browser; all is closed afterwards."""
    opened = []

    def open_page(notebook):
        lab = Lab(short_folder, notebook)
        opened.append(lab.close)
        driver = open_browser(short_folder)
        opened.append(driver.quit)
        return Page(driver, lab, notebook.name)

    yield open_page
    for close in reversed(opened):
        close()


def errors(code):
    """Errors in the outputs of cells that expect none."""
    return [
        f"cell {cell['execution_count']}: {output['ename']}: {output['evalue']}"
        for cell in code
        for output in cell["outputs"]
        if output["output_type"] == "error"
        and "raises-exception" not in cell["metadata"].get("tags", [])
    ]


def move_and_watch(page):
    """Move the slider one step; wait until workers and picture changed; return what was shown."""
    before, pictures = page.panel()
    handle = page.slider("Workers")
    workers = int(float(handle.get_attribute("aria-valuenow")))
    at_end = workers == int(float(handle.get_attribute("aria-valuemax")))
    wanted = workers - 1 if at_end else workers + 1
    page.photograph("before")
    page.press(handle, Keys.ARROW_LEFT if at_end else Keys.ARROW_RIGHT)
    words = f"{wanted} worker{'s' * (wanted != 1)}"
    page.wait(f"the panel to say {words}", lambda: words in page.panel()[0])
    page.wait("other pictures", lambda: _all_differ(pictures, page.panel()[1]))
    page.photograph("after")
    return before, page.panel()[0], words


def _all_differ(before, after):
    return before and len(before) == len(after) and all(map(str.__ne__, before, after))


# ---------------------------------------------------------------- a made-up notebook

PANEL = """
import ipywidgets as widgets
from IPython.display import display

slider = widgets.IntSlider(value=2, min=1, max=3, description="Workers", continuous_update=False)
words, picture = widgets.HTML(), widgets.HTML()


def draw(change=None):
    number = slider.value
    words.value = f"{number} worker{'s' * (number != 1)}"
    bars = "".join(f'<rect x="0" y="{20 * i}" width="90" height="9"/>' for i in range(number))
    picture.value = f'<svg width="100" height="80">{bars}</svg>'


slider.observe(draw, names="value")
draw()
display(widgets.VBox([slider, words, picture]))
"""


def write(path, *sources):
    cells = [new_code_cell(source.strip()) for source in sources]
    nbformat.write(clean(new_notebook(cells=[new_markdown_cell("# Made up"), *cells])), path)
    return path


FETCH = """
from IPython.display import HTML, display

display(HTML('<img src="http://192.0.2.1/x.png">'))
"""


@pytest.mark.slow
def test_a_made_up_panel_reacts_and_faults_are_seen(open_page, tmp_path):
    page = open_page(write(tmp_path / "made-up.ipynb", PANEL, FETCH, "1 / 0"))
    assert errors(page.run_all()) == ["cell 3: ZeroDivisionError: division by zero"]
    before, after, words = move_and_watch(page)
    assert "2 workers" in before
    assert "3 workers" in after
    assert words == "3 workers"
    assert set(page.outside_requests()) == {"http://192.0.2.1/x.png"}
    assert any("192.0.2.1" in message for message in page.console_errors())


# ---------------------------------------------------------------- notebook 00


@pytest.mark.timeout(300)
def test_notebook_00_runs_and_its_slider_changes_the_workers(open_page, short_folder):
    page = open_page(NOTEBOOKS[0])
    code = page.run_all()
    assert errors(code) == []
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    before, after, words = move_and_watch(page)
    assert words not in before
    assert words in after
    assert page.outside_requests() == []
    assert page.console_errors() == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("number", "slider", "words"),
    [
        ("03", "Ranks", "rows a second"),
        ("04", "Ranks", "H = 16, at random: loss"),
        ("05", "Ranks", "ms a step"),
        ("06", "Stages", "ms a step"),
        ("07", "Workers", "fair share of a worker"),
        ("08", "Tensor", "tokens a second"),
        ("09", "Workers", "workers of 250 rows"),
    ],
)
def test_a_panel_trains_on_as_many_real_ranks_as_its_slider_says(
    open_page, tmp_path, number, slider, words
):
    notebook = next(path for path in NOTEBOOKS if path.name.startswith(number))
    copy = read(notebook)
    # The last cell closes the cluster, and the panel with it.
    copy.cells = [cell for cell in copy.cells if not cell.source.startswith("cluster.close()")]
    nbformat.write(copy, tmp_path / notebook.name)
    page = open_page(tmp_path / notebook.name)
    code = page.run_all()
    assert errors(code) == []
    handle = page.slider(slider)
    before, pictures = page.panel()
    assert words in before
    page.photograph("before")
    page.press(handle, Keys.ARROW_RIGHT)
    page.wait("another picture", lambda: _all_differ(pictures, page.panel()[1]))
    page.wait("another sentence", lambda: words in page.panel()[0] and page.panel()[0] != before)
    page.photograph("after")
    assert page.outside_requests() == []
    assert page.console_errors() == []
