"""`halora dashboard`: the page over a store."""

from typing import Annotated

import typer

from halora.cli.output import ServerOption, StoreOption, open_store, talk


def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8050,
    host: Annotated[
        str, typer.Option(help="Address or name to listen on. Others than loopback let the network read the store.")
    ] = "127.0.0.1",
    allow_register: Annotated[
        bool, typer.Option("--allow-register", help="Let the page register certified adapters.")
    ] = False,
    allow_certify: Annotated[
        bool,
        typer.Option("--allow-certify", help="Let the page certify trials here, and register those that pass."),
    ] = False,
    store: StoreOption = None,
    tracking_uri: ServerOption = None,
) -> None:
    """Browse the store's sweeps and pick an adapter, until Ctrl-C; the address is printed."""
    from halora.dashboard.serving import is_loopback, serve

    if not is_loopback(host):
        talk.print(f"note: whoever reaches {host} can read this store", markup=False, highlight=False)
    serve(open_store(store, tracking_uri), host, port, allow_register=allow_register, allow_certify=allow_certify)
