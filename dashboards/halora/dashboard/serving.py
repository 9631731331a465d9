"""The page's own server."""

import ipaddress
import signal
import socket
import sys

import uvicorn

from halora.dashboard.app import create_app
from halora.errors import UserError
from halora.records.store import Store


def serve(store: Store, host: str, port: int, *, allow_register: bool = False, allow_certify: bool = False) -> None:
    """Serve until interrupted.

    Args:
        store: The store to show.
        host: Address or name to listen on; also what browsers may call it by.
        port: Port; 0 for any free one.
        allow_register: Whether adapters can be registered from the page.
        allow_certify: Whether they can be certified there, which registers those that pass.

    Raises:
        UserError: The address is taken, or not of this machine.
    """
    listening = _listen(host, port)
    listening.listen()  # whoever reads the address below may come at once
    names = {host, socket.gethostname(), socket.getfqdn()}
    app = create_app(store, hosts=names, allow_register=allow_register, allow_certify=allow_certify)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}/", file=sys.stderr, flush=True)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: None)  # uvicorn's own, which it raises again once it has ended, end nothing more
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, lifespan="off")).run([listening])
    finally:
        app.state.certifier.cancel()


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}",
            "name another with --port or --host; --port 0 takes a free one",
        ) from None
    return listening
