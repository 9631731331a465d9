"""Oracles: MLflow's own server, its answers and its check of the Host header, with the page mounted in it."""

import urllib.request

import pytest
from page_stores import fill
from services import mlflow_server
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
def test_mlflow_server_finds_the_page_by_its_entry_point(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HALORA_STORE", str(store.root))
    with mlflow_server(store.tracking_uri, tmp_path, "--app-name", "halora") as server:
        for path in ("/halora/sweeps/dozen", "/api/2.0/mlflow/experiments/search?max_results=1"):
            with urllib.request.urlopen(server.uri + path, timeout=30) as answer:
                assert answer.status == 200
