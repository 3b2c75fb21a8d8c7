"""The HTTP service, by a client over a real socket: its pictures are the model's, and it takes nonsense with calm."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import browser
import httpx
import numpy as np
import pytest
import serving as load_test
import torch
import uvicorn
from helpers import tiny_export
from PIL import Image

from hmar_mega.inference import ImageModel, edit, load_model
from hmar_mega.inference.decoding import to_bytes
from hmar_mega.inference.options import ClassNames
from hmar_mega.serving.app import Limits, Service, create_app
from hmar_mega.serving.batcher import Batcher
from hmar_mega.serving.server import LOCAL_HOSTS, listen

NAMES = ("ant", "bee", "cow", "dog", "wasp")
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return load_model(folder, "cpu")


@contextlib.contextmanager
def serving(
    model: ImageModel, token: str | None = None, grace: int = 20, **limits: Any
) -> Iterator[tuple[httpx.Client, Service]]:
    """A client of a running service, which has ended when the block has."""
    service = Service(model, ClassNames(NAMES, 5), Limits(**limits), "tiny")
    app = create_app(service, token, None if token else LOCAL_HOSTS)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, ws="none", lifespan="on", timeout_graceful_shutdown=grace)
    )
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            while not server.started:
                time.sleep(0.005)
            yield client, service
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def running(model: ImageModel) -> Iterator[tuple[httpx.Client, Service]]:
    with serving(model, max_count=6, max_body=100_000) as both:
        yield both


@pytest.fixture
def client(running: tuple[httpx.Client, Service]) -> httpx.Client:
    return running[0]


def pixels(png: str | bytes) -> np.ndarray:
    data = base64.b64decode(png) if isinstance(png, str) else png
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def png64(array: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def hold(service: Service, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The worker is held in its next batch until the event is set, or nobody waits for the batch."""
    release, run = threading.Event(), service.batcher._run

    def held(key: Any, items: Any, emit: Any, abandoned: Any) -> None:
        while not release.wait(0.01) and not abandoned():
            pass
        run(key, items, emit, abandoned)

    monkeypatch.setattr(service.batcher, "_run", held)
    return release


def metric(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_are_the_models_own(client: httpx.Client, model: ImageModel):
    asked = {"classes": ["wasp", 0], "count": 2, "seed": 7, "cfg": 2.0, "top_p": 0.9, "mask_schedule": "1;1,3"}
    answer = client.post("/v1/images", json=asked).json()
    found = answer["images"]
    told = [(one["class"], one["name"], one["seed"]) for one in found]
    assert told == [(4, "wasp", 7), (4, "wasp", 8), (0, "ant", 9), (0, "ant", 10)]
    expected = to_bytes(
        model.generate([4, 4, 0, 0], cfg_scale=2.0, top_p=0.9, mask_schedule=[[1], [1, 3]], seed=[7, 8, 9, 10])
    )
    assert np.array_equal(np.stack([pixels(one["png"]) for one in found]), expected)
    one = client.post("/v1/images", json={"classes": 4, "seed": 3}, headers={"accept": "image/png"})
    assert one.headers["content-type"] == "image/png"
    assert np.array_equal(pixels(one.content), to_bytes(model.generate([4], seed=3))[0])


def test_requests_of_equal_settings_share_batches_and_keep_their_pictures(
    model: ImageModel, monkeypatch: pytest.MonkeyPatch
):
    """Twelve clients behind a busy worker: one batch of eight and one of three, and every picture as if alone."""
    with serving(model, max_batch=8) as (client, service):
        release = hold(service, monkeypatch)
        with ThreadPoolExecutor(12) as pool:

            def ask(seed: int) -> httpx.Response:
                return client.post("/v1/images", json={"classes": seed % 5, "seed": seed})

            first = pool.submit(ask, 0)
            wait(lambda: service.batcher.busy_seconds > 0)
            rest = [pool.submit(ask, seed) for seed in range(1, 12)]
            wait(lambda: service.batcher.waiting == 11)
            assert metric(client, "hmar_mega_queue_images") == 11
            release.set()
            answers = [future.result().json() for future in (first, *rest)]
        for seed, answer in enumerate(answers):
            expected = to_bytes(model.generate([seed % 5], seed=seed))[0]
            assert np.array_equal(pixels(answer["images"][0]["png"]), expected)
        assert metric(client, 'hmar_mega_batch_images_bucket{le="1"}') == 1
        assert metric(client, 'hmar_mega_batch_images_bucket{le="4"}') == 2
        assert metric(client, "hmar_mega_batch_images_count") == 3
        assert metric(client, "hmar_mega_images_total") == 12
        assert metric(client, 'hmar_mega_requests_total{endpoint="/v1/images",status="200"}') == 12
        assert metric(client, 'hmar_mega_request_seconds_count{endpoint="/v1/images"}') == 12


def test_scales_are_streamed_as_generate_scales_gives_them(client: httpx.Client, model: ImageModel):
    with client.stream("POST", "/v1/images/stream", json={"classes": [1, 2], "seed": 5}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    events = [(name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)]
    assert [name for name, _ in events] == ["start", "scale", "scale", "scale", "done"]
    assert events[0][1] == {"images": 2, "scales": [1, 2, 4]}
    expected = model.generate_scales([1, 2], seed=5)
    for number, (_, data) in enumerate(events[1:4]):
        assert (data["scale"], data["side"], data["first"]) == (number + 1, (1, 2, 4)[number], 0)
        found = np.stack([pixels(one["png"]) for one in data["images"]])
        assert np.array_equal(found, to_bytes(expected[number]))


def test_edits_are_those_of_edit(client: httpx.Client, model: ImageModel):
    original = to_bytes(model.generate([2], seed=1))[0]
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    asked = {"image": png64(original), "mask": png64(mask), "class": "bee", "count": 2, "seed": 4, "feather": 2}
    answer = client.post("/v1/edits", json=asked).json()
    image = torch.from_numpy(original.astype(np.float32) / 255).permute(2, 0, 1).expand(2, -1, -1, -1)
    expected = edit(model, image, torch.from_numpy(mask > 0)[None, None], [1, 1], 4, feather=2)
    assert np.array_equal(np.stack([pixels(one["png"]) for one in answer["images"]]), to_bytes(expected.images))
    kept = [one["kept_psnr"] for one in answer["images"]]
    assert kept == pytest.approx(expected.kept_psnr.tolist(), abs=0.01)
    boxed = client.post("/v1/edits", json={"image": png64(original), "box": [8, 0, 16, 16], "class": 1, "seed": 4})
    assert np.array_equal(pixels(boxed.json()["images"][0]["png"])[:, :8], original[:, :8])
    wide = png64(np.zeros((20, 40, 3), np.uint8))
    wider = client.post(
        "/v1/edits", json={"image": f"data:image/png;base64,{wide}", "outpaint": {"right": 4}, "class": 1}
    )
    assert "resized to" in wider.json()["changes"][0]


def test_the_model_tells_about_itself(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    about = client.get("/v1/model").json()
    assert (about["num_classes"], about["resolution"], about["patch_nums"]) == (5, 16, [1, 2, 4])
    assert about["classes"] == list(NAMES)
    assert about["limits"]["count"] == 6
    assert client.get("/healthz").json() == {"status": "ok"}
    monkeypatch.setattr(Batcher, "busy_seconds", 61.0)  # longer than any request may take
    stuck = client.get("/healthz")
    assert (stuck.status_code, stuck.json()) == (503, {"status": "stuck"})
    assert "/v1/edits" in client.get("/openapi.json").json()["paths"]


# -------------------------------------------------------------------------------------------------------------- limits

PNG = png64(np.zeros((16, 16, 3), np.uint8))
WRONG: dict[str, tuple[str, Any, int, str]] = {
    "no JSON": ("/v1/images", b'{"classes": 3, ', 422, "the body is not JSON"),
    "not UTF-8": ("/v1/images", b"\xff\xfe\x00", 400, "cannot be read as JSON in UTF-8"),
    "nothing": ("/v1/images", b"", 422, "a JSON body, sent as application/json, is required"),
    "a list": ("/v1/images", [1, 2], 422, "must be a JSON object"),
    "nested": ("/v1/images", b'{"classes":' + b"[" * 20000 + b"]" * 20000 + b"}", 400, "nested too deeply"),
    "no class": ("/v1/images", {}, 422, "classes is required"),
    "no such class": ("/v1/images", {"classes": 5}, 422, "class 5 is out of range: this model has 5 classes, 0 to 4"),
    "a huge class": ("/v1/images", {"classes": 10**30}, 422, "out of range"),
    "a strange name": ("/v1/images", {"classes": "waps"}, 422, "class 'waps' is not known; did you mean wasp"),
    "too many": ("/v1/images", {"classes": [0, 1], "count": 4}, 422, "8 images were asked for; a request may have 6"),
    "none": ("/v1/images", {"classes": 0, "count": 0}, 422, "count cannot be 0: should be greater than or equal to 1"),
    "a bool": ("/v1/images", {"classes": 0, "count": True}, 422, "count cannot be True: should be a valid integer"),
    "a text": ("/v1/images", {"classes": 0, "seed": "x"}, 422, "seed cannot be 'x'"),
    "a seed": ("/v1/images", {"classes": 0, "seed": -1}, 422, "seed -1 is out of range: use 0 to 2"),
    "NaN": ("/v1/images", b'{"classes": 0, "top_p": NaN}', 422, "top_p cannot be nan"),
    "infinite": ("/v1/images", b'{"classes": 0, "cfg": Infinity}', 422, "cfg cannot be inf"),
    "a typo": ("/v1/images", {"classes": 0, "sed": 1}, 422, "'sed' is no field of this request: did you mean seed?"),
    "passes": ("/v1/images", {"classes": 0, "mask_schedule": "1;9"}, 422, "9"),
    "many passes": ("/v1/images", {"classes": 0, "mask_schedule": [[1] * 99]}, 422, "99 passes; allowed are"),
    "schedule": ("/v1/images/stream", {"classes": 0, "mask_schedule": "a"}, 422, "mask_schedule 'a' is not of"),
    "no base64": ("/v1/edits", {"image": "%", "box": [0, 0, 4, 4], "class": 0}, 422, "image is not base64"),
    "no picture": ("/v1/edits", {"image": "aGVsbG8=", "box": [0, 0, 4, 4], "class": 0}, 422, "cannot be read as PNG"),
    "cut off": ("/v1/edits", {"image": PNG[:40], "box": [0, 0, 4, 4], "class": 0}, 422, "image cannot be read as PNG"),
    "no region": ("/v1/edits", {"image": PNG, "class": 0}, 422, "nothing was given to say what to edit"),
    "a box": ("/v1/edits", {"image": PNG, "box": [4, 4, 4, 9], "class": 0}, 422, "box 4,4,4,9 is not within the 16×16"),
    "a side": ("/v1/edits", {"image": PNG, "outpaint": {"up": 4}, "class": 0}, 422, "outpaint names the side 'up'"),
    "too large": ("/v1/edits", b" " * 100_001, 413, "larger than the 100,000 bytes allowed"),
    "no endpoint": ("/v1/nothing", {}, 404, "GET /openapi.json lists what there is"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "told"), WRONG.values(), ids=WRONG)
def test_malformed_requests_are_told_why(client: httpx.Client, path: str, body: Any, status: int, told: str):
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = client.post(path, headers={"content-type": "application/json"}, **given)
    assert answer.status_code == status, answer.text
    assert re.search(told, answer.json()["error"]), answer.text
    assert client.get("/healthz").status_code == 200


def test_a_bomb_of_a_picture_is_not_decoded(client: httpx.Client):
    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, format="PNG")
    asked = {"image": base64.b64encode(file.getvalue()).decode(), "box": [0, 0, 4, 4], "class": 0}
    answer = client.post("/v1/edits", json=asked)
    assert "image has 8000×8000 pixels; allowed are 25 megapixels" in answer.json()["error"]


def test_other_sites_cannot_reach_a_local_service_under_a_name_of_theirs(client: httpx.Client):
    answer = client.get("/v1/model", headers={"host": "rebound.example:8000"})
    assert answer.status_code == 403
    assert answer.json()["error"].startswith("host 'rebound.example:8000' is not how this service may be addressed")
    plain = client.post("/v1/images", content=b'{"classes": 0}', headers={"content-type": "text/plain"})
    assert plain.status_code == 422  # what a page of another site may send without asking


def test_a_full_queue_time_and_clients_that_leave(model: ImageModel, monkeypatch: pytest.MonkeyPatch):
    with serving(model, max_batch=1, max_queue=1, max_count=1, timeout=2.5) as (client, service):
        release = hold(service, monkeypatch)
        with ThreadPoolExecutor(4) as pool:

            def ask(path: str = "/v1/images", **options: Any) -> httpx.Response:
                return client.post(path, json={"classes": 0}, **options)

            first = pool.submit(ask)
            wait(lambda: service.batcher.busy_seconds > 0)
            for path in ("/v1/images", "/v1/images/stream"):
                with pytest.raises(httpx.ReadTimeout):
                    ask(path, timeout=0.3)
                wait(lambda: service.batcher.waiting == 0)  # who has left makes room at once
            streamed = pool.submit(ask, "/v1/images/stream")
            wait(lambda: service.batcher.waiting == 1)
            refused = ask()
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert "1 images are waiting and at most 1 may" in refused.json()["error"]
            late = first.result()
            assert (late.status_code, late.json()["error"][:20]) == (504, "not done within 2.5 ")
            assert streamed.result().status_code == 504
        release.set()
        assert ask().status_code == 200
        for kind, count in {"busy": 1, "timeout": 2, "cancelled": 2}.items():
            assert metric(client, f'hmar_mega_errors_total{{kind="{kind}"}}') == count


def test_a_stream_whose_reader_leaves_is_broken_off(model: ImageModel, monkeypatch: pytest.MonkeyPatch):
    with serving(model) as (client, service):
        monkeypatch.setattr("hmar_mega.serving.app.PULSE", 0.05)
        hold(service, monkeypatch)
        with client.stream("POST", "/v1/images/stream", json={"classes": 0}) as answer:
            assert next(answer.iter_text()).startswith("event: start")
        wait(lambda: service.batcher.busy_seconds == 0)  # though the batch was never released
        assert metric(client, "hmar_mega_images_total") == 0


def test_nothing_is_lost_under_load(client: httpx.Client):
    """The benchmark's load: eight clients at once, a third of the requests nonsense."""
    found, statuses = load_test.load(str(client.base_url), concurrency=8, requests=48, malformed=0.33)
    assert (found.requests, found.failures) == (48, 0)
    assert statuses["200"] == 48 - found.malformed
    assert 8 <= found.malformed <= 24
    assert 1 <= found.mean_batch <= 8
    assert 0 < found.p50 <= found.p95 <= found.p99
    assert [load_test.percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.5, 0.95)] == [2.0, 4.0]


def test_what_is_not_done_within_the_grace_is_told_so(model: ImageModel, monkeypatch: pytest.MonkeyPatch):
    with ThreadPoolExecutor(1) as pool:
        with serving(model, grace=1) as (client, service):
            hold(service, monkeypatch)
            asked = pool.submit(httpx.post, f"{client.base_url}/v1/images", json={"classes": 0}, timeout=30)
            wait(lambda: service.batcher.busy_seconds > 0)
        answer = asked.result()
    assert (answer.status_code, answer.json()["error"]) == (503, "the service stopped before the images were made")


def test_a_batch_that_fails_is_an_error_and_not_the_end(model: ImageModel, monkeypatch: pytest.MonkeyPatch):
    with serving(model) as (client, service):
        run = service.batcher._run

        def failing(*_: Any) -> None:
            raise RuntimeError("CUDA out of memory")

        monkeypatch.setattr(service.batcher, "_run", failing)
        answer = client.post("/v1/images", json={"classes": 0})
        assert (answer.status_code, "RuntimeError" in answer.json()["error"]) == (500, True)
        monkeypatch.setattr(service.batcher, "_run", run)
        assert client.post("/v1/images", json={"classes": 0}).status_code == 200
        assert metric(client, 'hmar_mega_errors_total{kind="failed"}') == 1


def test_a_token_is_asked_for_by_everything_but_the_page_and_health(model: ImageModel):
    with serving(model, token=TOKEN) as (client, _):
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
            for path in ("/v1/model", "/metrics", "/openapi.json", "/nothing"):
                assert client.get(path, headers=given).status_code == 401
            assert client.post("/v1/images", json={"classes": 0}, headers=given).status_code == 401
        assert client.get("/healthz").status_code == client.get("/").status_code == 200
        known = {"authorization": f"Bearer {TOKEN}"}
        assert client.post("/v1/images", json={"classes": 0}, headers=known).status_code == 200


# ----------------------------------------------------------------------------------------------------------- a browser


@pytest.mark.skipif(browser.find_chromium() is None, reason="no Chromium is installed")
def test_the_page_draws_and_edits_in_a_real_browser(running: tuple[httpx.Client, Service]):
    client, _ = running
    with browser.Browser.launch() as page:
        page.open(str(client.base_url))
        page.wait("document.querySelectorAll('#class option').length === 5")
        assert page.run("document.querySelector('#class').selectedOptions[0].textContent") == "ant (0)"
        page.click("#go")
        page.wait("/^4 pictures in/.test(document.querySelector('#status').textContent)")
        assert page.run("[...document.querySelectorAll('figure img')].map(i => i.naturalWidth)") == [16] * 4
        assert page.run("document.querySelectorAll('#scales li').length") == 3
        page.click("figure button")
        page.key(" ", "Space", 32, text=" ")  # the canvas has the focus
        page.wait("!document.querySelector('#edit-go').disabled")
        page.click("#edit-go")
        page.wait("/kept pixels/.test(document.querySelector('#status').textContent)")
        page.run("document.querySelector('#mask-schedule').value = 'x'")
        page.click("#go")
        page.wait("/mask_schedule 'x' is not/.test(document.querySelector('#error').textContent)")
        refused = [text for text in page.complaints if "422" not in text]
        assert refused == []  # neither a script error nor a violation of the content policy
