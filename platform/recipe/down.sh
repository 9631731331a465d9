#!/usr/bin/env bash
# Ends what the other scripts began on this machine, by process id: nodes, then the head, MLflow, PostgreSQL.
#
#   down.sh [NAME...]   ray-worker, ray-head, mlflow, postgresql; by default all. Data and secrets stay in HALORA_STATE.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
enter_state

begun=()
for file in "$HALORA_STATE"/*.pid; do
    name=$(basename -- "$file" .pid)
    [[ $name == '*' || $name == ray-head || $name == mlflow ]] || begun+=("$name")
done
[[ $# -gt 0 ]] || set -- "${begun[@]}" ray-head mlflow postgresql

for name in "$@"; do
    data=$HALORA_STATE/postgresql/data
    if [[ $name != postgresql ]]; then
        end "$name"
    elif [[ -e $data ]]; then
        find_postgresql
        if as_server "$programs/pg_ctl" status --pgdata "$data" >/dev/null; then
            as_server "$programs/pg_ctl" stop --mode fast --wait --silent --pgdata "$data"
            say "postgresql has ended"
        fi
    fi
done
