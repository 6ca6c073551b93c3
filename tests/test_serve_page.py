"""The page in a real browser: send a picture, attack it, take the PNG away; nothing is asked of another machine."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image

import chromium
from advtune import runs
from advtune.data import Split, load_images, load_task
from advtune.serve.play import MEGABYTES

CARDS = "[...document.querySelectorAll('.at-card')].map(c => [c.dataset.state, c.dataset.before, c.dataset.after])"
READY = "document.querySelectorAll('.at-card').length == 2"
SET = """(() => {
    const box = document.querySelector('#eps input[type=number]');
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, '%s');
    box.dispatchEvent(new Event('input', {bubbles: true}));
    box.dispatchEvent(new Event('change', {bubbles: true}));
    box.blur(); })()"""
needed = pytest.mark.skipif(chromium.program() is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page as it is without a run anywhere: its address, and the run that it tuned. Ctrl-C ends it well."""
    folder = tmp_path_factory.mktemp("serve")
    environment = os.environ | {"ADVTUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "advtune.cli", "serve", "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    found = re.match(r"(http://127\.0\.0\.1:\d+)  ", line)
    if not found:
        process.kill()
        pytest.fail(line + process.stderr.read())
    yield found[1], next((folder / "cache" / "serve").iterdir())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0
    assert "the page is closed" in error
    refused = re.findall(r"^[\w.]*InvalidPathError: ", error, re.MULTILINE)  # Gradio's own, of a request that lies
    assert error.count("Traceback") == len(refused), error


@pytest.fixture
def tab(tmp_path):
    opened = chromium.Tab(tmp_path)
    yield opened
    opened.close()


@pytest.mark.slow
@needed
def test_load_upload_attack_see_the_class_change(served, tab, tmp_path):
    address, run = served
    task = load_task("fashion-mnist-mini")
    images = load_images(task, Split(part="test", limit=60, resolution=64), progress=False)
    model = runs.load(str(run))
    f = model.classifier(model.tokens(task.classes, task.template))
    said = f(images.x.float() / 255).argmax(1)
    chosen = int((said == images.y).nonzero()[5])
    picture = images.x[chosen].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "mine.png")

    tab.open(address)
    tab.wait(READY)  # an attack is there before anything was pressed
    assert "its class" in tab.run("document.querySelector('#chosen').innerText")
    tab.send("#upload input[type=file], input[type=file]", tmp_path / "mine.png")
    tab.wait("document.querySelector('#chosen').innerText.includes('your own')")
    right = task.classes[int(said[chosen])]
    tab.wait(READY)
    assert tab.run(CARDS)[1][1] == right
    tab.run(SET % 12)
    tab.click("#attack")
    tab.wait("document.querySelectorAll('.at-fooled').length == 2 && document.body.innerText.includes('12/255')")
    (_, before, after) = tab.run(CARDS)[1]
    assert before == right != after
    link = tab.run("document.querySelectorAll('a.at-get')[1].href")
    png = np.array(Image.open(io.BytesIO(base64.b64decode(link.partition("base64,")[2]))))
    assert 1 <= abs(png.astype(int) - picture).max() <= 12
    assert task.classes[int(f(torch.from_numpy(png).permute(2, 0, 1)[None].float() / 255).argmax())] == after
    tab.shoot(tmp_path / "desktop.png")

    tab.open(address, 390, 844, phone=True)
    tab.wait(READY)
    tab.shoot(tmp_path / "phone.png")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "nothing hangs over on a phone"
    assert tab.run("[gradio_config.run_history, gradio_config.analytics_enabled]") == [False, False]
    elsewhere = [url for url in tab.requested if not url.startswith((address, "data:", "blob:", "about:"))]
    assert elsewhere == []
    assert tab.said == []


@pytest.mark.slow
@needed
def test_a_bad_upload_gets_a_sentence(served, tab, tmp_path):
    address, _ = served
    tab.open(address)
    tab.wait(READY)
    (tmp_path / "letter.png").write_text("not a picture")
    tab.send("input[type=file]", tmp_path / "letter.png")
    tab.wait("document.querySelector('#answer').innerText.includes('not a picture that can be read')")
    assert "its class" in tab.run("document.querySelector('#chosen').innerText"), "the picture before stays"
    tab.run(SET % 500)  # the box has it until it is left
    tab.click("#attack")
    tab.wait("document.querySelector('#answer').innerText.includes('choose one from 0 to 16')")
    tab.run(SET % 1)
    tab.click("#attack")
    tab.wait(READY)
    (tmp_path / "large.png").write_bytes(bytes(MEGABYTES * 1_000_000 + 10_000_000))
    tab.send("input[type=file]", tmp_path / "large.png")
    tab.wait("document.body.innerText.toLowerCase().includes('size')")
    assert tab.run(READY)
    assert "Traceback" not in tab.run("document.body.innerText")


@pytest.mark.slow
def test_what_the_browser_sends_is_answered_whatever_it_is(clip_folder):
    from advtune.serve import page
    from advtune.serve.models import Example, open_shelf

    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "PNG")
    shelf, picture = open_shelf(str(clip_folder), "cpu"), Example(stream.getvalue(), "")
    rest = {"attack": "pgd", "eps": 1, "budget": 2, "tuned": None, "away": page.OWN, "template": "a {}."}
    plain = page.answered(shelf, picture, "cat, dog", **rest)
    assert plain.count("data-state") == 1
    gone = page.answered(shelf, picture, "cat, dog", **{**rest, "away": "cow"})
    assert gone == plain, "a name that is no more on the page leads nowhere"
    for wrong in ({"eps": None}, {"budget": 1e9}, {"attack": "none"}, {"template": "a"}):
        assert page.answered(shelf, picture, "cat, dog", **{**rest, **wrong}).startswith('<div class="at-note"')
    kept, _, refusal = page.received(shelf, None, picture)
    assert (kept, refusal) == (picture, "No file came; choose a picture.")


@pytest.mark.slow
def test_no_file_of_this_machine_can_be_asked_for(served, tmp_path):
    """A browser that lies about what it has uploaded."""
    address, _ = served
    Image.new("RGB", (16, 16), "red").save(tmp_path / "secret.png")
    with urlopen(f"{address}/config") as answer:
        steps = json.load(answer)["dependencies"]
    receive = next(step["id"] for step in steps if step["targets"][0][1:] == ["upload"])
    file = {"path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"}}
    asked = json.dumps({"data": [file, None], "fn_index": receive, "session_hash": "liar"}).encode()
    urlopen(Request(f"{address}/gradio_api/queue/join", asked, {"Content-Type": "application/json"})).close()
    with urlopen(f"{address}/gradio_api/queue/data?session_hash=liar", timeout=600) as lines:
        last = next(json.loads(line[6:]) for line in lines if b"process_completed" in line)
    assert last["success"] is False
    assert "data:image" not in json.dumps(last)
