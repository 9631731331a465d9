#!/usr/bin/env bash
# PostgreSQL with two databases: `tracking` for MLflow, `studies` for Optuna. What runs already is left alone.
#
# It enters by a password that is drawn once and is in secrets/pgpass (mode 600), never in a command line.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
enter_state
find_postgresql

folder=$HALORA_STATE/postgresql
password=$(secret postgresql)
mkdir -p -- "$folder"
if [[ $EUID == 0 ]]; then
    chown postgres -- "$folder"
    as_server test -w "$folder" ||
        fail "the account 'postgres', as which PostgreSQL runs for root, cannot reach '$folder': set HALORA_STATE"
fi

if [[ ! -e $folder/data ]]; then
    rm -rf -- "$folder/data.new"
    (umask 077 && cat "$password" >"$folder/password")
    [[ $EUID != 0 ]] || chown postgres -- "$folder/password"
    as_server "$programs/initdb" --pgdata "$folder/data.new" --username halora --auth scram-sha-256 \
        --pwfile "$folder/password" --encoding UTF8 --locale C >"$HALORA_STATE/initdb.log"
    rm -- "$folder/password"
    echo 'host all all samenet scram-sha-256' >>"$folder/data.new/pg_hba.conf"
    mv -- "$folder/data.new" "$folder/data" # whole, or not there
fi
(umask 077 && printf '*:%s:*:halora:%s\n' "$HALORA_POSTGRESQL_PORT" "$(<"$password")" >"$PGPASSFILE")

if as_server "$programs/pg_ctl" status --pgdata "$folder/data" >/dev/null; then
    say "postgresql runs already"
else
    options="-p $HALORA_POSTGRESQL_PORT -c listen_addresses=$HALORA_SERVICE_HOST -c unix_socket_directories="
    as_server "$programs/pg_ctl" start --wait --timeout 120 --silent --pgdata "$folder/data" \
        --log "$folder/log" --options "$options" 9>&- || fail "PostgreSQL does not start; its log: $folder/log"
    say "postgresql runs on $HALORA_SERVICE_HOST:$HALORA_POSTGRESQL_PORT"
fi

query() { "$programs/psql" -h "$HALORA_SERVICE_HOST" -p "$HALORA_POSTGRESQL_PORT" -U halora -d postgres -wAtc "$1"; }
for name in tracking studies; do
    [[ $(query "select 1 from pg_database where datname = '$name'") == 1 ]] || query "create database $name" >/dev/null
done
