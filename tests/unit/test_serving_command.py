"""`hmar-mega serve`: its options and its end; and which batches its worker runs as CUDA graphs."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers import tiny_export
from torch import Tensor

from hmar_mega.cli import main
from hmar_mega.inference import load_model
from hmar_mega.inference.decoding import to_bytes
from hmar_mega.inference.graphs import ImageSampler
from hmar_mega.serving.runner import GRAPH_AFTER, Draw, Drawn, Item, Runner
from hmar_mega.serving.server import is_loopback, listen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("exported") / "model")


def wait(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm_finishes_what_is_in_flight(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The command itself: the request in its queue gets its pictures, and the exit status is 0."""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    before = signal.getsignal(signal.SIGTERM)

    def ask_and_stop() -> httpx.Response:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client, ThreadPoolExecutor(1) as pool:
            for _ in range(3000):
                with contextlib.suppress(httpx.ConnectError):
                    client.get("/healthz")
                    break
                time.sleep(0.01)
            asked = pool.submit(client.post, "/v1/images", json={"classes": [0, 1]})
            wait(lambda: "\nhmar_mega_queue_images 2\n" in client.get("/metrics").text)
            signal.raise_signal(signal.SIGTERM)
            return asked.result()

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_and_stop)
        options = ["--port", str(port), "--device", "cpu", "--max-wait", "1500", "--max-batch", "64"]
        assert main(["serve", str(folder), *options]) == 0  # --max-wait: the request is in the queue at the signal
        answer = asked.result()
    assert (answer.status_code, len(answer.json()["images"])) == (200, 2)
    assert f"serving model at http://127.0.0.1:{port}/" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_options_that_cannot_be_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refusal(*options: str) -> str:
        assert main(["serve", str(folder), *options]) == 2
        return capsys.readouterr().err

    (tmp_path / "short").write_text("abc\n")
    assert "has 3 characters; give at least 16" in refusal("--token-file", str(tmp_path / "short"))
    assert "cannot read --token-file" in refusal("--token-file", str(tmp_path / "none"))
    monkeypatch.setenv("HMAR_MEGA_TOKEN", "two words are no token")
    assert "HMAR_MEGA_TOKEN has 22 characters; give at least 16 of ASCII without spaces" in refusal()
    monkeypatch.delenv("HMAR_MEGA_TOKEN")
    assert "--max-queue 4 is less than --max-count 16" in refusal("--max-queue", "4")
    assert "--max-batch 0: give a number above 0" in refusal("--max-batch", "0")
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        assert "cannot listen at 127.0.0.1" in refusal("--port", str(taken.getsockname()[1]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "serve needs fastapi and uvicorn: pip install 'hmar-mega[serve]'" in refusal()


def test_what_other_machines_reach_needs_a_token():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.5", "myhost")] == [False] * 4


def test_graphs_are_of_few_sizes_and_of_settings_that_come_often(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where every new size or setting costs a capture; the sampler itself is the plain one."""
    model, sizes = load_model(folder, "cpu"), []
    plain, why_not = ImageSampler.__call__, ImageSampler.why_not

    def captured(self: ImageSampler, labels: Tensor, seeds: Tensor, settings: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(labels))
        with monkeypatch.context() as inner:
            inner.setattr(ImageSampler, "why_not", why_not)
            return plain(self, labels, seeds, settings)

    monkeypatch.setattr(ImageSampler, "why_not", lambda self, batch, settings: None)
    monkeypatch.setattr(ImageSampler, "__call__", captured)
    runner = Runner(model, 6)
    runner.warm_up()
    assert sizes == [1, 2, 4, 6]

    def pictures(count: int, **settings: Any) -> np.ndarray:
        found: list[Drawn] = []
        items = [Item(i % 5, 9 + i) for i in range(count)]
        runner(Draw(model.sample_settings(**settings)), items, lambda scale, last, made: found.extend(made), bool)
        return np.stack([one.pixels for one in found])

    sizes.clear()
    expected = to_bytes(model.generate([0, 1, 2, 3, 4], seed=9))
    sizes.clear()
    assert np.array_equal(pictures(3), expected[:3])
    assert np.array_equal(pictures(5), expected)
    assert sizes == [4, 6]
    sizes.clear()
    other = [pictures(3, top_k=20) for _ in range(GRAPH_AFTER + 1)]
    assert sizes == [4, 4]
    assert all(np.array_equal(one, other[0]) for one in other)
