"""Real servers and a browser for tests, each on a free loopback port or in a folder of its own, ended by process id."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy

if TYPE_CHECKING:
    from selenium import webdriver

STARTING_S = 240.0


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def required(program: str, found: str | None) -> str:
    """The program's path; a test that has none is skipped, or fails where CI says that it must be there."""
    if found:
        return found
    reason = f"{program} is not installed; see `make services`"
    if os.environ.get("HALORA_REQUIRE_SERVICES"):
        pytest.fail(reason)
    pytest.skip(reason)


class PostgresServer:
    """A PostgreSQL server with an empty database, that can be stopped and started again on the same data.

    Args:
        host: Address it listens on; anybody who reaches it may enter.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        initdb = required("PostgreSQL", max(glob("/usr/lib/postgresql/*/bin/initdb"), default=shutil.which("initdb")))
        self._programs, self._host, self._port = Path(initdb).parent, host, free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="halora-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        account = "postgres" if os.geteuid() == 0 else getpass.getuser()  # the server refuses to run as root
        if os.geteuid() == 0:
            shutil.chown(self._folder, account)
        self._user = {"user": account} if os.geteuid() == 0 else {}
        as_owner = ["--username", "halora", "--auth", "trust", "--no-sync", "--encoding", "UTF8"]
        subprocess.run(
            [initdb, "--pgdata", self._data, *as_owner],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self._folder,
            **self._user,  # type: ignore[call-overload]
        )
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet trust\n")

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def uri(self) -> str:
        """SQLAlchemy's address of its database."""
        return f"postgresql://halora@{self._host}:{self._port}/t"

    def start(self) -> None:
        """Start it, and return once it answers."""
        options = {
            "listen_addresses": self._host,
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "60",
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        command = [str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self._port), *settings]
        log = (self._folder / "log").open("a")
        self._process = subprocess.Popen(command, stderr=log, cwd=self._folder, **self._user)  # type: ignore[call-overload]
        end = time.monotonic() + STARTING_S
        while self._ask("pg_isready", "-q").returncode:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        self._ask("createdb", "-U", "halora", "t")  # refused where the database is there already

    def stop(self) -> None:
        """End it as an administrator would who cannot wait: clients lose their connections, the data stay."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        """Stop it and remove its data."""
        self.stop()
        shutil.rmtree(self._folder)

    def _ask(self, program: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [str(self._programs / program), "-h", self._host, "-p", str(self._port), *arguments]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


@contextmanager
def postgres_server(host: str = "127.0.0.1") -> Iterator[PostgresServer]:
    """A running PostgreSQL server."""
    server = PostgresServer(host)
    try:
        server.start()
        yield server
    finally:
        server.close()


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL server with an empty database; its SQLAlchemy URI."""
    with postgres_server() as server:
        yield server.uri


def new_database(uri: str, name: str) -> str:
    """Another database on the server that `uri` names; its SQLAlchemy URI."""
    engine = sqlalchemy.create_engine(uri, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f'create database "{name}"'))
    engine.dispose()
    return sqlalchemy.make_url(uri).set(database=name).render_as_string(hide_password=False)


class MlflowServer:
    """An MLflow tracking server that can be killed and started again.

    Args:
        backend: URI of its database.
        folder: For its artifacts and its log.
        host: Address it listens on.
        options: Further ones of its command.
    """

    def __init__(self, backend: str, folder: Path, *options: str, host: str = "127.0.0.1") -> None:
        self._backend, self._folder, self._host, self._port = backend, folder, host, free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Its tracking URI."""
        return f"http://{self._host}:{self._port}"

    def start(self) -> None:
        """Start it, and return once it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._backend, "--workers", "1"]
        command += ["--host", self._host, "--port", str(self._port)]
        command += ["--artifacts-destination", str(self._folder / "artifacts"), *self._options]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = (self._folder / "server.log").open("a")
        self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + STARTING_S
        while not self._healthy():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.3)

    def kill(self) -> None:
        """End it and its workers at once, as a crash would."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its own session, started here
            self._process.wait()
            self._process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def mlflow_server(backend: str, folder: Path, *options: str, host: str = "127.0.0.1") -> Iterator[MlflowServer]:
    """A running MLflow server."""
    server = MlflowServer(backend, folder, *options, host=host)
    try:
        server.start()
        yield server
    finally:
        server.kill()


AXE_CORE = Path(__file__).parents[1] / ".cache" / "axe-core" / "axe.min.js"


@contextmanager
def chrome(log_folder: Path) -> Iterator["webdriver.Chrome"]:
    """Headless Chromium that knows no host but this machine's addresses, driven by Selenium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = required("Chromium", shutil.which("chromium"))
    driver = required("Chromium's driver", shutil.which("chromedriver"))
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"):
        options.add_argument(flag)
    options.add_argument("--disable-component-update")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(driver, log_output=str(log_folder / "chromedriver.log")))
    try:
        yield browser
    finally:
        browser.quit()


def axe_core() -> str:
    """The code of axe-core; a test is skipped where it is not there."""
    if not AXE_CORE.exists():
        pytest.skip(f"axe-core is not at {AXE_CORE}; `make services` fetches it where there is npm")
    return AXE_CORE.read_text()


def browse(page: Path, picture: Path, *, height: int = 3000) -> Sequence[str]:
    """Open a page in headless Chromium, without a network, and take its picture; what its console said.

    A request that the page's own policy refuses is said there too.
    """
    chromium = required("Chromium", shutil.which("chromium"))
    with tempfile.TemporaryDirectory(prefix="halora-chromium-") as profile:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=8000"]
        command += [f"--window-size=1100,{height}", f"--screenshot={picture}", page.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return [line for line in run.stderr.splitlines() if "CONSOLE" in line]


class S3Server:
    """A moto server, which speaks the language of S3 and forgets its objects when it ends."""

    def __init__(self, log: Path) -> None:
        self._log, self._port = log, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which every client finds it."""
        own = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}", "AWS_DEFAULT_REGION": "us-east-1"}
        return own | {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_MAX_ATTEMPTS": "1"}

    def start(self) -> None:
        """Start it with an empty bucket named `bucket`, and return once it answers."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = subprocess.Popen(command, stdout=self._log.open("a"), stderr=subprocess.STDOUT)
        end = time.monotonic() + STARTING_S
        bucket = urllib.request.Request(f"http://127.0.0.1:{self._port}/bucket", method="PUT")
        while True:
            with suppress(OSError):
                urllib.request.urlopen(bucket, timeout=5).close()
                return
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end
            time.sleep(0.1)

    def kill(self) -> None:
        """End it, and with it all objects."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def s3_server(log: Path) -> Iterator[S3Server]:
    """A running S3 server."""
    server = S3Server(log)
    try:
        server.start()
        yield server
    finally:
        server.kill()
