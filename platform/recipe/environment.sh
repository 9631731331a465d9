# shellcheck shell=bash
# What a process on the head needs to know; the head's scripts source it, and so may you: `source environment.sh`.
#
#   HALORA_SERVICE_HOST      where PostgreSQL and MLflow listen (127.0.0.1: only this machine and SSH tunnels reach them)
#   HALORA_POSTGRESQL_PORT   5432
#   HALORA_MLFLOW_PORT       5000
#   HALORA_RAY_PORT          6379, for nodes and drivers
#   HALORA_DASHBOARD_HOST    where Ray's dashboard and job submission listen (127.0.0.1, reached by SSH tunnels)
#   HALORA_DASHBOARD_PORT    8265
#   HALORA_CLIENT_PORT       10001, for ray:// addresses
#   HALORA_ARTIFACTS         folder or URL (s3://, gs://) of MLflow's artifacts (a folder of the state)
#   HALORA_STORE             folder of event logs, studies and pages of the sweeps that run here (a folder of the state)
#   HALORA_CHECKPOINT_URL           URL of checkpoints, which every node reaches; needed where the nodes share no file system
#
# Sets for `halora`: HALORA_TRACKING_URI, HALORA_STUDY_URL, and how to enter MLflow and PostgreSQL.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

export HALORA_SERVICE_HOST=${HALORA_SERVICE_HOST:-127.0.0.1}
export HALORA_POSTGRESQL_PORT=${HALORA_POSTGRESQL_PORT:-5432}
export HALORA_MLFLOW_PORT=${HALORA_MLFLOW_PORT:-5000}
export HALORA_RAY_PORT=${HALORA_RAY_PORT:-6379}
export HALORA_DASHBOARD_HOST=${HALORA_DASHBOARD_HOST:-127.0.0.1}
export HALORA_DASHBOARD_PORT=${HALORA_DASHBOARD_PORT:-8265}
export HALORA_CLIENT_PORT=${HALORA_CLIENT_PORT:-10001}
export HALORA_ARTIFACTS=${HALORA_ARTIFACTS:-$HALORA_STATE/artifacts}
export HALORA_STORE=${HALORA_STORE:-$HALORA_STATE/store}
export HALORA_CHECKPOINT_URL=${HALORA_CHECKPOINT_URL:-}

database=postgresql+psycopg://halora@$HALORA_SERVICE_HOST:$HALORA_POSTGRESQL_PORT # the password is in PGPASSFILE
export HALORA_TRACKING_URI=http://$HALORA_SERVICE_HOST:$HALORA_MLFLOW_PORT
export HALORA_STUDY_URL=$database/studies
export PGPASSFILE=$HALORA_STATE/secrets/pgpass
export MLFLOW_TRACKING_USERNAME=admin
if [[ -r $HALORA_STATE/secrets/mlflow-admin ]]; then
    MLFLOW_TRACKING_PASSWORD=$(<"$HALORA_STATE/secrets/mlflow-admin")
    export MLFLOW_TRACKING_PASSWORD
fi
