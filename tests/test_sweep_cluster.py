"""Oracles: the form of Ray's addresses; Prometheus' own reader; what a log's writer was told; torch's own allocator."""

import pytest
import torch

from halora.cli.remote_commands import _arguments, check_client
from halora.errors import UnreachableError, UserError
from halora.settings.training import TrainingSettings
from halora.sweep.cluster.cluster import BEGINS, Cluster
from halora.sweep.cluster.remote import carry_out
from halora.sweep.cluster.session import check_listening, unreachable
from halora.sweep.cluster.versions import CLIENT, own_code, own_versions
from halora.sweep.run.driver_log import DriverLog, read_log
from halora.training.memory import ran_out_of_memory


@pytest.mark.parametrize(
    ("address", "elsewhere"),
    [
        (None, False),
        ("auto", False),
        ("10.0.0.1:6379", False),
        ("ray://head:10001", True),
        ("http://127.0.0.1:8265", True),
        ("https://head", True),
    ],
)
def test_an_address_says_where_a_command_is_carried_out(address, elsewhere):
    assert Cluster.at(address).elsewhere is elsewhere


@pytest.mark.parametrize("address", ["head", "head:port", "http://", "ray://head", "tcp://head:1", "http://h:99999"])
def test_what_is_no_address_is_refused_with_the_forms(address):
    with pytest.raises(UserError, match=r"write auto, HOST:PORT, ray://HOST:PORT or http://HOST:PORT"):
        Cluster.at(address)


def test_a_password_is_not_taken_and_not_repeated():
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN") as told:
        Cluster.at("ray://me:secret@head:10001")
    assert "secret" not in str(told.value)


def test_every_mistake_is_told_at_once(tmp_path):
    with pytest.raises(UserError) as told:
        Cluster.at(None, tmp_path / "halora.whl")
    assert len(told.value.problems) == 2


def test_nobody_listening_is_told_at_once():
    with pytest.raises(UnreachableError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        check_listening(Cluster.at("127.0.0.1:1"))


def test_versions_that_differ_are_told_apart_from_silence():
    error = RuntimeError("Version mismatch: The cluster was started with: Ray: 2.59")
    assert "different versions" in str(unreachable("a:1", error))


def test_the_code_s_digest_is_of_this_code():
    assert own_code() == own_code() == own_versions()["halora"]
    assert own_versions()["torch"] == torch.__version__.partition("+")[0]


class Listener:
    """A watcher that keeps what it is told."""

    def __init__(self):
        self.said = []

    def say(self, text):
        """Keep it."""
        self.said.append(text)

    def trial(self, number, state, text="", node=""):
        """Keep it."""
        self.said.append(f"trial {number} {state} {text}")


def test_a_log_keeps_all_and_passes_it_on(tmp_path):
    watcher = Listener()
    log = DriverLog(tmp_path / "driver.jsonl", "s", watcher)
    log.say('"quoted"\nand broken')
    log.trial(3, "failed", "no number", "10.0.0.2")
    first, second = read_log(tmp_path / "driver.jsonl")
    assert first["message"] == '"quoted"\nand broken'
    assert {**second, "time": ""} == {
        "time": "",
        "level": "error",
        "sweep": "s",
        "trial": 3,
        "state": "failed",
        "node": "10.0.0.2",
        "message": "no number",
    }
    assert watcher.said == ['"quoted"\nand broken', "trial 3 failed no number"]
    (tmp_path / "driver.jsonl").open("a").write('{"torn')
    assert len(list(read_log(tmp_path / "driver.jsonl"))) == 2


def test_running_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**60)
    assert ran_out_of_memory(told.value)
    assert ran_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not ran_out_of_memory(other.value)


@pytest.mark.parametrize(("batch", "workers"), [(16, 1), (6, 1), (10, 4), (8, 2)])
def test_a_micro_batch_is_halved_down_to_a_row(batch, workers):
    settings = TrainingSettings(steps=1, batch_size=batch, workers=workers)
    rows = [settings.micro_batch]
    while settings.micro_batch_divisible:
        settings = settings.with_micro_batch_halved(1)
        TrainingSettings.model_validate(settings.model_dump())  # still allowed
        rows.append(settings.micro_batch)
    assert rows == sorted(set(rows), reverse=True)
    assert settings.workers * settings.gradient_accumulation <= batch < workers * (settings.gradient_accumulation + 1)


def test_a_command_is_sent_on_as_typed_without_what_is_for_this_machine(monkeypatch):
    typed = [
        "sweep",
        "launch",
        "my.yaml",
        "--wheel",
        "a.whl",
        "--seed=3",
        "--address=http://h:1",
        "--detach",
        "--set",
        "a=b",
    ]
    monkeypatch.setattr("sys.argv", ["halora", *typed])
    sent = _arguments(("--address", "--wheel", "--follow", "--detach"))
    assert sent == ["sweep", "launch", "my.yaml", "--seed=3", "--set", "a=b"]


def test_a_process_of_its_own_carries_a_command_out_and_says_how_it_ended():
    shown = []
    assert carry_out(Cluster("auto"), ["sweep", "status", "none"], shown.append) == 2
    assert "no sweep 'none' in" in "".join(shown)
    assert BEGINS not in "".join(shown)


def test_a_command_of_another_version_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(CLIENT, "another")
    with pytest.raises(UnreachableError, match="on the machine that asks another"):
        check_client()
    assert capsys.readouterr().out == f"{BEGINS}\n"
