"""The page at `/`, in a browser: by clicks, by keys, on a phone, and by what is to be seen."""

import base64
import contextlib
import io
import json
import threading
import urllib.error
import urllib.request

import chromium
import numpy as np
import pytest
import tiny_models
from chromium import in_a_browser
from PIL import Image
from served import MAX_STEPS, drawn_alone, service_of, wait_until
from starlette.testclient import TestClient

from jaxldm import pipelines, serving
from jaxldm.commands import serve as command
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.serving import front
from jaxldm.serving.application import application
from jaxldm.serving.page import FILES
from jaxldm.serving.requests import offer_of

READY = "document.getElementById('state').textContent === 'Ready'"


@contextlib.contextmanager
def over_a_socket(app, service, lifespan="on"):
    """The address of a server of that application, in this process."""
    with command.listening("127.0.0.1", 0) as bound:
        server = front.server_of(app, service)
        server.config.lifespan = lifespan
        thread = threading.Thread(target=front.run_until_interrupted, args=(server, bound))
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def address(offer, engine):
    limits = serving.Limits(burst=1000, requests_per_second=1000)
    service = service_of(engine, limits)
    with over_a_socket(application(offer, service), service) as address:
        yield address
        engine.gate.set()


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("browser")) as page:
        page.size(1100, 800)
        yield page


def is_ready(address):
    try:
        return urllib.request.urlopen(f"{address}ready", timeout=10).status == 200
    except urllib.error.HTTPError:
        return False


@pytest.fixture
def page(window, address):
    """The page of the server, with an empty strip; a test that leaves an error in its console fails."""
    wait_until(lambda: is_ready(address), 60)  # the browser notes a refused look at /ready as an error
    window.complaints.clear()
    window.open(address)
    window.eval("localStorage.clear(); sessionStorage.clear()")
    window.open(address)
    window.until(READY)
    yield window
    assert window.complaints == []


def text_of(page, name):
    return page.eval(f"document.getElementById('{name}').innerText")


def shown(page, name):
    return page.eval(f"document.getElementById('{name}').checkVisibility()")


def picture_on_screen(page, selector, side):
    """What is to be seen of a picture of so many pixels: the middle of each."""
    x, y, width, height = page.place(selector)
    image = Image.open(io.BytesIO(page.screenshot((x, y, width, height)))).convert("L")
    middle = (np.arange(side) + 0.5) / side
    rows, columns = (middle * image.height).astype(int), (middle * image.width).astype(int)
    return np.asarray(image)[np.ix_(rows, columns)].astype(int)


def test_the_files_come_with_a_policy_that_lets_nothing_else_in(offer, engine):
    client = TestClient(application(offer, service_of(engine), token="secret"))
    for path in FILES:
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text and "<script>" not in answer.text


@in_a_browser
def test_a_click_draws_the_picture_of_the_pipeline(page, pipe, offer):
    assert not shown(page, "prompt") and not shown(page, "solver") and shown(page, "class_labels")
    page.click("#chips button:nth-child(2)")
    page.write("#num_inference_steps", "3")
    page.write("#seed", "7")
    page.click("#lock")
    page.click("#draw")
    page.until("!document.getElementById('chosen').hidden")
    page.until("document.querySelector('#progress-text').textContent.startsWith('Done in')")
    settings = {"class_labels": [1], "num_inference_steps": 3, "seed": 7}
    settings["guidance_scale"] = offer.default_guidance_scale  # what was left out is said, too
    assert json.loads(text_of(page, "settings")) == settings
    expected = drawn_alone(pipe, 7, [1], num_inference_steps=3)[0].astype(int)
    page.until("[...document.images].every(image => image.complete)")
    seen = picture_on_screen(page, "#figures img", 8)
    assert np.abs(seen - expected).max() <= 1  # to the grey level, as the screen has it
    page.click("#draw")
    page.until("document.querySelectorAll('#strip img').length === 2")
    sources = page.eval("[...document.querySelectorAll('#strip img')].map(image => image.src)")
    assert sources[0] == sources[1]  # the seed was kept


@in_a_browser
def test_past_pictures_outlive_the_page_and_are_drawn_again(page, address):
    page.write("#class_labels", "2, 0")
    page.write("#guidance_scale", "1.5")
    page.write("#num_inference_steps", "2")
    page.click("#draw")
    page.until("document.querySelectorAll('#strip img').length === 2")
    page.until("JSON.parse(localStorage.getItem('jaxldm.pictures') ?? '[]').length === 2")
    page.open(address)
    page.until(READY)
    assert page.eval("document.getElementById('class_labels').value") == ""
    page.click("#strip li:nth-child(2) button")
    page.click("#use")
    assert page.eval("document.getElementById('class_labels').value") == "2, 0"
    page.click("#draw")
    page.until("document.querySelectorAll('#strip img').length === 4")
    sources = page.eval("[...document.querySelectorAll('#strip img')].map(image => image.src)")
    assert sources[:2] == sources[2:]
    page.until("document.querySelector('#progress-text').textContent.startsWith('Done in')")
    page.click("#remove")
    page.until("document.querySelectorAll('#strip img').length === 3")
    pasted = {"class_labels": ["1"], "seed": 5, "num_inference_steps": 4}
    code = "const data = new DataTransfer(); data.setData('text', {}); document.dispatchEvent("
    code += "new ClipboardEvent('paste', {{clipboardData: data, cancelable: true}}))"
    page.eval(code.format(json.dumps(json.dumps(pasted))).replace("{{", "{").replace("}}", "}"))
    assert page.eval("document.getElementById('num_inference_steps').value") == "4"
    assert page.eval("document.getElementById('lock').checked")


@in_a_browser
def test_the_settings_are_copied(page):
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.write("#class_labels", "1")
    page.write("#num_inference_steps", "2")
    page.click("#draw")
    page.until("!document.getElementById('chosen').hidden")
    page.click("#copy")
    page.until("document.getElementById('copy').textContent === 'Copied'")
    settings = json.loads(page.eval("navigator.clipboard.readText()"))
    assert settings["class_labels"] == [1] and settings["num_inference_steps"] == 2


@in_a_browser
def test_mistakes_are_said_in_words_where_they_are(page):
    page.write("#class_labels", "seven")
    page.click("#draw")
    page.until("!document.getElementById('error').hidden")
    assert "'seven'" in text_of(page, "error")
    assert page.eval("document.activeElement.id") == "class_labels"
    assert page.eval("document.activeElement.getAttribute('aria-invalid')") == "true"
    page.write("#class_labels", "99")
    page.click("#draw")
    page.until("document.getElementById('error').innerText.startsWith('Classes must be')")
    page.complaints.clear()  # the browser itself notes the status 400
    page.write("#class_labels", "1")
    page.write("#num_inference_steps", str(MAX_STEPS + 1))
    page.click("#draw")
    assert page.eval("!document.getElementById('num_inference_steps').checkValidity()")
    assert not shown(page, "cancel")  # nothing was sent


@in_a_browser
def test_the_place_in_the_queue_progress_previews_and_cancelling(page, engine, address):
    steps = 50
    engine.gate.clear()
    body = json.dumps({"class_labels": 1, "num_images": 4, "num_inference_steps": 5}).encode()
    request = urllib.request.Request(f"{address}generate", body, {"Content-Type": "application/json"})
    other = threading.Thread(target=lambda: urllib.request.urlopen(request).close())
    other.start()
    wait_until(lambda: engine.busy == 1 or engine.busy == 2)
    page.write("#class_labels", "1")
    page.write("#num_inference_steps", str(steps))
    page.click("#draw")
    page.until("document.getElementById('progress-text').textContent.includes('in the queue')")
    assert text_of(page, "progress-text").startswith("Place 2 in the queue") and shown(page, "cancel")
    engine.gate.set()
    page.until("document.getElementById('progress').value > 0")
    page.until("document.querySelectorAll('#strip img').length === 1")
    other.join(20)
    page.write("#num_inference_steps", str(MAX_STEPS))
    page.click("#draw")
    page.until(f"document.getElementById('progress-text').textContent.endsWith('of {MAX_STEPS}')")
    page.until("document.querySelector('#figures img').src.startsWith('data:image/png')")
    page.press("Escape")
    page.until("document.getElementById('progress-text').textContent === 'Cancelled.'")
    wait_until(lambda: engine.busy == 0)
    assert page.eval("document.querySelectorAll('#strip img').length") == 1 and not shown(page, "cancel")


@in_a_browser
def test_all_of_it_is_reached_by_keys(page):
    reached = []
    for _ in range(12):
        page.press("Tab")
        reached.append(page.eval("document.activeElement.id || document.activeElement.textContent"))
    order = ["class_labels", "0", "1", "2", "num_images", "num_inference_steps", "guidance_scale", "seed"]
    assert reached[: len(order) + 2] == [*order, "lock", "negative_labels"]
    page.eval("document.getElementById('class_labels').focus()")
    page.type("0, 1, 2")
    page.press("Enter")
    page.until("document.querySelectorAll('#strip img').length === 3")
    page.eval("document.querySelector('#strip button').focus()")
    page.press("ArrowRight")
    page.press("Enter")
    page.eval("document.querySelector('#strip li:nth-child(2) [aria-current=true]').focus()")


@in_a_browser
def test_it_fits_a_phone(page):
    page.size(360, 740, phone=True)
    try:
        page.write("#class_labels", "0, 1, 2")
        page.write("#num_inference_steps", "2")
        page.click("#draw")
        page.until("document.querySelectorAll('#strip img').length === 3")
        assert page.eval("document.documentElement.scrollWidth") <= 360
        controls = "'#form input:not([type=checkbox]), #form button, #chosen button, #chosen a'"
        seen = f"[...document.querySelectorAll({controls})].filter(control => control.checkVisibility())"
        assert min(page.eval(f"{seen}.map(control => control.offsetHeight)")) >= 30  # of a finger
    finally:
        page.size(1100, 800)


@in_a_browser
def test_a_server_of_texts_with_a_token_asks_for_both(window, tmp_path):
    parts = tiny_models.text_parts(tmp_path / "tokenizer")
    pipe = pipelines.Pipeline(STABLE_DIFFUSION, parts)
    offer = offer_of(pipe, "cats", (), ((16, 16), (16, 32)))
    service = service_of(serving.Engine(pipe, sizes=(1,)))
    app = application(offer, service, token="secret")
    with over_a_socket(app, service, lifespan="off") as address:
        window.open(address)
        window.until("!document.getElementById('ask-token').hidden")
        assert text_of(window, "token-error") == "" and not shown(window, "prompt")
        window.type("wrong")
        window.press("Enter")
        window.until("document.getElementById('token-error').innerText.includes('not the token')")
        window.write("#token", "secret")
        window.press("Enter")
        window.until("document.getElementById('prompt').checkVisibility()")
        assert (
            shown(window, "size") and shown(window, "negative_prompt") and not shown(window, "class_labels")
        )
        assert text_of(window, "state").startswith("The model is being compiled")
        assert window.eval("document.getElementById('draw').disabled")
        window.complaints.clear()
        a_picture_to_start_from(window)
    window.complaints.clear()


CHOOSE = """(name => {
  const bytes = Uint8Array.from(atob(name), letter => letter.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], "a.png", { type: "image/png" }));
  const input = document.getElementById("image");
  input.files = data.files;
  input.dispatchEvent(new Event("change"));
})"""
CATCH = """window.fetch = async (path, options) => {
  if (options) window.sent = JSON.parse(options.body);
  return new Response("{}", { status: options ? 500 : 200 });
}; null"""


def a_picture_to_start_from(page):
    """The centre of a file is sent at the size that is drawn, and comes back with pasted settings."""
    assert not shown(page, "strength") and not shown(page, "start") and shown(page, "image")
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 10:50, 1], pixels[:, 25:35, 0] = 255, 255  # black, green, yellow, green, black
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    page.eval(f"{CHOOSE}({json.dumps(base64.b64encode(file.getvalue()).decode())})")
    page.until("document.getElementById('strength').checkVisibility()")
    page.eval(CATCH)
    page.eval("document.getElementById('size').value = '16x32'")
    page.until("!document.getElementById('draw').disabled")  # after the answer of another fetch
    page.write("#prompt", "a")
    page.press("Enter")  # draws, also in a field of several lines
    sent = page.until("window.sent")
    assert sent["strength"] == 0.8 and (sent["height"], sent["width"]) == (16, 32)
    image = Image.open(io.BytesIO(base64.b64decode(sent["image"].partition(",")[2]))).convert("RGB")
    assert image.size == (32, 16)  # of 60x20 the middle 40 columns, green and yellow
    assert np.abs(np.asarray(image)[:, [0, 31]].astype(int) - [0, 255, 0]).max() <= 1
    assert np.abs(np.asarray(image)[:, 15:17].astype(int) - [255, 255, 0]).max() <= 1
    page.until("!document.getElementById('draw').disabled")
    page.click("#start-from-noise")
    assert not shown(page, "strength") and not shown(page, "start")
    page.eval("window.sent = null; document.forms.form.requestSubmit()")
    assert "image" not in page.until("window.sent") and "strength" not in page.eval("window.sent")
