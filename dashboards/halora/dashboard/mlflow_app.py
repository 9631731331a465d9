"""The page inside MLflow's own server, at `/halora`: `mlflow server --app-name halora`.

MLflow calls its interface for this experimental. The store is that of $HALORA_STORE, or `./halora-store`; Host headers
are MLflow's to check. Nothing can be registered from there.
"""

from fastapi import FastAPI
from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import create_fastapi_app
from starlette.routing import Mount

from halora.dashboard.app import create_app
from halora.records.store import Store

PREFIX = "/halora"


def create_mlflow_app() -> FastAPI:
    """MLflow's application with the page before its own catch-all."""
    app: FastAPI = create_fastapi_app(flask_app)
    app.router.routes.insert(0, Mount(PREFIX, create_app(Store.at(), hosts=None)))
    return app
