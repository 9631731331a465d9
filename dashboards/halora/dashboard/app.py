"""The page over a store, as an ASGI application."""

from collections.abc import Awaitable, Callable, Collection

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from halora.dashboard import adapters, chip, compare, readiness, sweep, sweeps, trial
from halora.dashboard.security import Guard
from halora.dashboard.site import PLOTLY, STATIC, Site
from halora.errors import UnreachableError, UserError
from halora.records.store import Store

_FOREVER = "public, max-age=31536000, immutable"  # the address changes with the content


def create_app(
    store: Store, *, hosts: Collection[str] | None = (), allow_register: bool = False, allow_certify: bool = False
) -> FastAPI:
    """The application.

    Args:
        store: The store to show.
        hosts: Names it is asked for by, besides addresses and `localhost`; none where a server around it checks that.
        allow_register: Whether adapters can be registered from the page.
        allow_certify: Whether they can be certified from the page, which registers those that pass.
    """
    site = Site(store, allow_register, allow_certify)
    app = FastAPI(title="HaLoRA Sweep", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.certifier = site.certifier
    for part in (sweeps, sweep, trial, readiness, adapters, chip, compare):
        app.include_router(part.routes(site))

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        known = {path.name: path for path in STATIC.iterdir()} | {PLOTLY.name: PLOTLY}
        if name not in known:
            raise HTTPException(404, "no such file")
        return FileResponse(known[name], headers={"cache-control": _FOREVER})

    def refused(request: Request, status: int, problems: list[str], next_step: str = "") -> Response:
        return site.page(request, "error", status, problems=problems, next_step=next_step)

    async def user_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        status = 503 if isinstance(error, UnreachableError) else 404
        return refused(request, status, error.problems, error.next_step)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refused(request, error.status_code, [str(error.detail)])

    async def not_an_address(request: Request, error: Exception) -> Response:
        return refused(request, 404, ["there is no such page"])

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        UserError: user_error,
        HTTPException: http_error,
        RequestValidationError: not_an_address,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Guard, hosts=hosts)
    return app
