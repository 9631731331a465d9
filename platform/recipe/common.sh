# shellcheck shell=bash
# Where things are, and how a process is begun, looked at and ended; the other scripts source this.
#
#   HALORA_STATE          folder of data, secrets, logs and process ids (root: /var/lib/halora; else ~/halora-state)
#   HALORA_VENV           the Python environment with Ray, MLflow and this package (the .venv beside `platform`)
#   RAY_AUTH_TOKEN_PATH   file of Ray's token (~/.ray/auth_token, as Ray itself has it)
#   HALORA_NODE_ADDRESS   address by which other nodes reach this one (what Ray finds)
#   RAY_TMPDIR            parent of Ray's folder of sessions and logs (/tmp)

recipe=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ $EUID == 0 ]]; then home=/var/lib/halora; else home=$HOME/halora-state; fi
export HALORA_STATE=${HALORA_STATE:-$home}
export HALORA_VENV=${HALORA_VENV:-${recipe%/platform/recipe}/.venv}
export PATH=$HALORA_VENV/bin:$PATH
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
export RAY_worker_niceness=0 # trials at Ray's 15 starve beside any other process
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true

say() { printf '%s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Makes the state folder, and lets one script at a time work in it; the lock ends with the script.
enter_state() {
    [[ -x $HALORA_VENV/bin/python ]] || fail "no Python in '$HALORA_VENV': set HALORA_VENV, or run \`make setup\`"
    mkdir -p -- "$HALORA_STATE" || fail "cannot make the folder '$HALORA_STATE': set HALORA_STATE"
    install -d -m 700 -- "$HALORA_STATE/secrets"
    exec 9>"$HALORA_STATE/lock"
    flock 9
}

# secret NAME: path of a file, mode 600, with a secret that is drawn once.
secret() {
    local path=$HALORA_STATE/secrets/$1
    if [[ ! -s $path ]]; then
        (umask 077 && "$HALORA_VENV/bin/python" -c 'import secrets; print(secrets.token_hex(24), end="")' >"$path.new")
        mv -- "$path.new" "$path"
    fi
    printf '%s' "$path"
}

# born PID: when the process began, in ticks since boot; with its number it names one process for good.
born() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -r -a stat <<<"${stat##*) }"
    [[ ${stat[0]} != Z ]] && printf '%s' "${stat[19]}"
}

# runs NAME: whether the process that `begin NAME` began still runs; its number is then in $pid.
runs() {
    local since
    [[ -s $HALORA_STATE/$1.pid ]] && read -r pid since <"$HALORA_STATE/$1.pid" && [[ $(born "$pid") == "$since" ]]
}

# begin NAME COMMAND...: run it in the background, in a session of its own, with a log.
begin() {
    local name=$1 log=$HALORA_STATE/$1.log pid
    shift
    [[ ! -e $log ]] || mv -- "$log" "$log.1"
    setsid "$@" >"$log" 2>&1 </dev/null 9>&- &
    pid=$!
    disown "$pid"
    printf '%s %s\n' "$pid" "$(born "$pid")" >"$HALORA_STATE/$name.pid"
}

# wait_until NAME SECONDS COMMAND...: wait until the command succeeds; an error if NAME ends, or the time does.
wait_until() {
    local name=$1 end=$((SECONDS + $2)) pid
    shift 2
    until "$@"; do
        if ! runs "$name"; then
            tail -n 25 -- "$HALORA_STATE/$name.log" >&2
            rm -f -- "$HALORA_STATE/$name.pid"
            fail "$name has ended; its log: $HALORA_STATE/$name.log"
        fi
        if ((SECONDS > end)); then
            end "$name"
            fail "$name does not answer; its log: $HALORA_STATE/$name.log"
        fi
        sleep 0.5
    done
}

# end NAME: end what `begin NAME` began, and all that is in its session.
end() {
    local pid
    if runs "$1"; then
        pkill -TERM --session "$pid" || true
        for _ in {1..20}; do
            pgrep --session "$pid" >/dev/null || break
            sleep 0.5
        done
        pkill -KILL --session "$pid" || true
        say "$1 has ended"
    fi
    rm -f -- "$HALORA_STATE/$1.pid"
}

# answers URL: whether a server answers, if only with a refusal.
answers() {
    "$HALORA_VENV/bin/python" - "$1" <<'PYTHON'
import sys, urllib.error, urllib.request

try:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=5)
except urllib.error.HTTPError as error:
    sys.exit(error.code >= 500)
except OSError:
    sys.exit(1)
PYTHON
}

# find_postgresql: $programs, the folder of the programs of the newest PostgreSQL that is installed.
find_postgresql() {
    programs=$(find /usr/lib/postgresql/*/bin -name initdb -printf '%h\n' 2>/dev/null | sort --version-sort | tail -n 1)
    programs=${programs:-$(dirname -- "$(command -v initdb || echo /nowhere/initdb)")}
    [[ -x $programs/initdb ]] || fail "PostgreSQL is not installed (Debian, Ubuntu: apt-get install postgresql)"
}

# as_server COMMAND...: run it as the account that may run PostgreSQL's server, which refuses to run as root.
as_server() {
    if [[ $EUID == 0 ]]; then (cd / && runuser -u postgres -- "$@"); else "$@"; fi
}
