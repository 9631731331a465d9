"""Oracles: MLflow's own server, its answers and its check of the Host header, with the page mounted in it."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import entry_points

import pytest
from page_stores import fill
from services import STARTING_S, free_port
from starlette.testclient import TestClient

from halora.records.store import Store


@pytest.fixture
def store(tmp_path, tiny_models, tiny_task):
    found = Store(tmp_path / "store")
    fill(found, tiny_models["llama"], tiny_task, ["dozen"])
    return found


def test_the_page_is_mounted_before_mlflow_s_own(store, monkeypatch):
    monkeypatch.setenv("HALORA_STORE", str(store.root))
    from halora.dashboard.mlflow_app import create_mlflow_app

    client = TestClient(create_mlflow_app(), base_url="http://127.0.0.1:5000")
    page = client.get("/halora/")
    assert page.status_code == 200
    assert 'href="/halora/sweeps/dozen"' in page.text
    assert 'src="/halora/static/page.js' in page.text
    fragment = client.get("/halora/sweeps/dozen?accuracy=0.4", headers={"hx-request": "true"})
    assert fragment.headers["hx-push-url"] == "/halora/sweeps/dozen?accuracy=0.4"
    assert client.get("/halora/sweeps/none").status_code == 404
    assert client.get("/health").text == "OK"
    assert client.get("/halora/", headers={"host": "evil.example"}).status_code == 403
    assert (
        client.post("/halora/sweeps/dozen/trials/4/register", headers={"origin": "http://127.0.0.1:5000"}).status_code
        == 403
    )


@pytest.mark.slow
def test_mlflow_server_finds_the_page_by_its_entry_point(store):
    assert "halora" in entry_points(group="mlflow.app").names
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "halora", "--port", str(port), "--workers", "1"]
    command += ["--host", "127.0.0.1", "--backend-store-uri", store.tracking_uri]
    environment = os.environ | {"HALORA_STORE": str(store.root), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        try:
            end = time.monotonic() + STARTING_S
            while _status(f"http://127.0.0.1:{port}/health") != 200:
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.3)
            assert _status(f"http://127.0.0.1:{port}/halora/sweeps/dozen") == 200
            assert _status(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1") == 200
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # its own session, started here


def _status(address):
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
