#!/usr/bin/env bash
# Ray's head, with its token authentication on. What runs already is left alone.
#
#   ray-head.sh [further arguments of `ray start`]
#
# It offers no CPU, so no trial lands on it; it runs the drivers of sweeps, which find everything in their environment.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
enter_state

if runs ray-head; then
    say "ray-head runs already"
    exit
fi
if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
    [[ -d ${RAY_AUTH_TOKEN_PATH%/*} ]] || install -d -m 700 -- "${RAY_AUTH_TOKEN_PATH%/*}"
    cp -- "$(secret ray-token)" "$RAY_AUTH_TOKEN_PATH"
    say "drew a token for Ray: nodes and users of the cluster need a copy of $RAY_AUTH_TOKEN_PATH"
fi
chmod 600 -- "$RAY_AUTH_TOKEN_PATH"
ulimit -n "$(ulimit -Hn)"
mkdir -p -- "$HALORA_STORE"
export GRPC_ENABLE_FORK_SUPPORT=0 # gRPC's care for forks aborts, now and then, the child that is to serve a Ray client

# Not `--block`, by which the head would end with its autoscaler, which gives up after some errors of the cloud. This
# lives as long as the head's control store, and leaves nothing behind.
# shellcheck disable=SC2016
guard='"$@" || exit; while pgrep --session $$ gcs_server >/dev/null; do sleep 2; done; pkill -KILL --session $$'
begin ray-head bash -c "$guard" ray-head "$HALORA_VENV/bin/ray" start --head --port "$HALORA_RAY_PORT" \
    --num-cpus 0 --num-gpus 0 --dashboard-host "$HALORA_DASHBOARD_HOST" --dashboard-port "$HALORA_DASHBOARD_PORT" \
    --ray-client-server-port "$HALORA_CLIENT_PORT" ${HALORA_NODE_ADDRESS:+--node-ip-address "$HALORA_NODE_ADDRESS"} "$@"
wait_until ray-head 180 answers "http://$HALORA_DASHBOARD_HOST:$HALORA_DASHBOARD_PORT/"
say "ray-head listens on port $HALORA_RAY_PORT; jobs at http://$HALORA_DASHBOARD_HOST:$HALORA_DASHBOARD_PORT"
