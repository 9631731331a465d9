"""MLflow's own page over a store, on the loopback interface."""

import os
import signal
import subprocess
import sys

from halora.records.store import Store


def serve(store: Store, port: int) -> int:
    """Serve until interrupted; the exit code of MLflow's server."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store.tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # MLflow's background jobs are for GenAI scoring; their eight processes take longer to start than the page.
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the server with this process
    with subprocess.Popen(command, env=env) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            return 0
