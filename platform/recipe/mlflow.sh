#!/usr/bin/env bash
# MLflow's server with authentication, its records in PostgreSQL. What runs already is left alone.
#
# The user `admin` has the password in secrets/mlflow-admin (mode 600): drawn at the first run, or that of
# $HALORA_MLFLOW_PASSWORD then. It is in no command line and is never printed.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
enter_state

if runs mlflow; then
    say "mlflow runs already"
    exit
fi
[[ -s $PGPASSFILE ]] || fail "PostgreSQL is not there yet: run postgresql.sh first"
if [[ -n ${HALORA_MLFLOW_PASSWORD:-} && ! -s $HALORA_STATE/secrets/mlflow-admin ]]; then
    (umask 077 && printf '%s' "$HALORA_MLFLOW_PASSWORD" >"$HALORA_STATE/secrets/mlflow-admin")
fi
MLFLOW_AUTH_ADMIN_PASSWORD=$(<"$(secret mlflow-admin)")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(<"$(secret mlflow-sessions)")
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_AUTH_ADMIN_USERNAME=$MLFLOW_TRACKING_USERNAME
export MLFLOW_AUTH_CONFIG_PATH=$HALORA_STATE/mlflow-auth.ini
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
unset HALORA_MLFLOW_PASSWORD MLFLOW_TRACKING_PASSWORD

cat >"$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = READ
database_uri = $database/tracking
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
[[ $HALORA_ARTIFACTS == *://* ]] || mkdir -p -- "$HALORA_ARTIFACTS"

begin mlflow "$HALORA_VENV/bin/python" -m mlflow server --app-name basic-auth --host "$HALORA_SERVICE_HOST" \
    --port "$HALORA_MLFLOW_PORT" --workers 2 --backend-store-uri "$database/tracking" \
    --artifacts-destination "$HALORA_ARTIFACTS"
wait_until mlflow 240 answers "$HALORA_TRACKING_URI/health"
say "mlflow answers at $HALORA_TRACKING_URI; user admin, password in $HALORA_STATE/secrets/mlflow-admin"
