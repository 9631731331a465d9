"""MLflow's own page over a store, on the loopback interface."""

import subprocess
import sys

from halora.records.store import Store


def serve(store: Store, port: int) -> int:
    """Serve until interrupted; the exit code of MLflow's server."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store.tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            return 0
