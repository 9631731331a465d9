#!/usr/bin/env bash
# A node that runs trials, joined to a head by its token. What runs already is left alone.
#
#   ray-worker.sh HEAD:PORT [further arguments of `ray start`]
#
#   HALORA_NODE_NAME   tells apart several on one machine (ray-worker)

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
enter_state

name=${HALORA_NODE_NAME:-ray-worker}
[[ ${1:-} =~ ^[^:]+:[0-9]+$ ]] || fail "say where the head is: ray-worker.sh HEAD:PORT"
if runs "$name"; then
    say "$name runs already"
    exit
fi
[[ -s $RAY_AUTH_TOKEN_PATH ]] || fail "no token in '$RAY_AUTH_TOKEN_PATH': copy the head's token file there, mode 600"
address=$1
shift
ulimit -n "$(ulimit -Hn)"

joined() { grep -q 'Ray runtime started' -- "$HALORA_STATE/$name.log"; }

begin "$name" "$HALORA_VENV/bin/ray" start --block --address "$address" \
    ${HALORA_NODE_ADDRESS:+--node-ip-address "$HALORA_NODE_ADDRESS"} "$@"
wait_until "$name" 180 joined
say "$name has joined $address"
