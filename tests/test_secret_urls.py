"""Oracles: forms of URLs with the secret `hush` in them; the bytes of every file of a sweep, and all that it prints."""

import csv
import shlex

import pytest
import yaml

from halora.secret_urls import hidden, secrets_in

SECRET = [
    "postgresql://u:hush@h/db",
    "postgresql+psycopg://u@h/db?password=hush",
    "postgresql://h/db?user=u&password=hush",
    "postgresql://u:hush%40@h/db",
    "postgresql://u:a/hush@h/db",
    "postgresql://u:a#hush@h/db",
    "postgresql://u:a?hush@h/db",
    "postgresql://u:p@hush@h/db",
    "mysql+pymysql://u:hush@h/db",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dhush",
    "sqlite+pysqlcipher://:hush@/f.db",
    "http://hush@h",
    "http://u:hush@h:5000",
    "https://u:a#hush@h",
    "http://u%3Ahush%40h",
    "http://u:12/hush@h/",
    "HTTP://hush@h/x",
    " https://hush@h",
    "http:\\\\u:hush@h",
    "https://h/x?sig=hush",
    "https://h/x?X-Amz-Date=1&X-Amz-Signature=hush",
    "https://h/x?hush",
    "https://h/x#access_token=hush",
    "https://h/x;token=hush",
    "s3://key:hush@bucket",
    "s3://key:a#hush@bucket",
    "s3://key:a/hush@bucket/x",
    "s3://bucket/x?aws_secret_access_key=hush",
    "simplecache::s3://u:hush@b/x",
    "zip://a.zip::https://hush@h/a",
    "gs://hush@bucket/x",
    "abfs://c@a.dfs.core.windows.net/x?sv=1&sig=hush",
    "ray://hush@h:10001",
    "ftp://u:hush@h/x",
    "sftp://u:hush@h/x",
]
WITHOUT_SLASHES = ["http:/u:hush@h", "u:hush@h:5000"]
HARMLESS = [
    "postgresql+psycopg://user@127.0.0.1:5432/db",
    "postgresql://h/db?sslmode=require&sslrootcert=/x/y",
    "http://127.0.0.1:5000",
    "http://[::1]:8265/",
    "s3://bucket/x@y/z",
    "sqlite:////home/a@b/m.db",
    "sqlite:///m.db",
    "abfs://c@a.dfs.core.windows.net/x",
    "simplecache::s3://b/x",
    "memory://x",
    "/home/me@work/x",
    "me@work/x",
    "h:6379",
    "auto",
    "databricks",
]


@pytest.mark.parametrize("url", [*SECRET, *WITHOUT_SLASHES, "s3://AKIAABCDEFGHIJKLMNOP/bucket"])
def test_a_secret_is_found_and_not_repeated(url):
    found = secrets_in(url)
    assert found
    assert not any("hush" in each for each in found)


@pytest.mark.parametrize("url", SECRET)
def test_a_text_is_shown_without_the_secrets_of_its_urls(url):
    shown = hidden(f"cannot read {url} now, nor http://127.0.0.1:5000/x")
    assert "hush" not in shown
    assert shown.endswith("://[hidden] now, nor http://127.0.0.1:5000/x")


@pytest.mark.parametrize("url", HARMLESS)
def test_what_holds_no_secret_is_left_alone(url):
    assert secrets_in(url) == []
    assert hidden(f"cannot read '{url}'") == f"cannot read '{url}'"


@pytest.fixture
def simulated(tmp_path, tiny_models, tiny_task):
    """A sweep of two trials, and the table of curves that it takes their results from."""
    (tmp_path / "curves.csv").parent.mkdir(exist_ok=True)
    with (tmp_path / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "step", "accuracy", "clean_accuracy", "train_loss", "seconds", "lora.rank"])
        writer.writerows([[trial, 2, 0.5, 0.6, 1.0, 1.0, rank] for trial, rank in enumerate((2, 4))])
    content = {
        "name": "s",
        "family": "secret",
        "trials": 2,
        "trial": {
            "model": tiny_models["llama"],
            "task": tiny_task,
            "chip": "halora-2026",
            "training": {"steps": 2, "report_every": 2},
        },
        "space": {"lora.rank": {"choices": [2, 4]}},
        "search": {"sampler": "random"},
        "reference_point": {"accuracy": 0.0, "energy_uj_per_token": 5.0},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    return f"{tmp_path / 's.yaml'} --simulate {tmp_path / 'curves.csv'}"


def test_no_secret_of_a_url_is_in_any_file_or_line_of_a_sweep(simulated, halora, postgresql, tmp_path, monkeypatch):
    """The study's database alone has its password in a URL: the server asks for none, so any is right."""
    store, told = tmp_path / "store", []

    def refused(arguments, *codes):
        code, out, err = halora(arguments)
        assert code in codes, (arguments, out, err)
        told.extend([out, err])

    for url in [*SECRET, *WITHOUT_SLASHES]:
        given = shlex.quote(url)
        for option in ("--tracking-uri", "--checkpoint-url", "--address"):
            refused(f"sweep launch {simulated} --store {store} {option} {given}", 2)
        refused(f"adapter verify {given}", 2)
    for url in SECRET:
        given = shlex.quote(url)
        refused(f"sweep launch {simulated} --store {store} --set trial.model={given}", 2)
        refused(f"sweep launch {simulated} --store {store} --set trial.task={given}", 2)
        for name in ("HALORA_TRACKING_URI", "HALORA_CHECKPOINT_URL"):
            with monkeypatch.context() as patch:
                patch.setenv(name, url)
                refused(f"sweep launch {simulated} --store {store}", 2)
    assert not store.exists()
    monkeypatch.setenv("HALORA_STUDY_URL", postgresql.replace("halora@", "halora:hush@"))
    for arguments in (f"launch {simulated}", "status", "resume s", "report s"):
        refused(f"sweep {arguments} --store {store}", 0)
    monkeypatch.setenv("HALORA_STUDY_URL", "postgresql+psycopg://u:hush@127.0.0.1:9/db")
    refused(f"sweep resume s --store {store}", 3)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if b"hush" in path.read_bytes()] == []
    assert not any("hush" in each for each in told)
