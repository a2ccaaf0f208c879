# Shared by the scripts of this folder, which source it:
#
#     source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
#
# It sets ROOT (the clone), VENV and VENV_PYTHON, changes nothing, and defines
#     info TEXT...            say what happens
#     die TEXT...             say why not, and exit 1
#     setup_venv              make .venv, install the project into it when pyproject.toml changed
#     setup_proton            build Qpid Proton for .venv, with the compiler that it needs
#     need_servers NAME...    install or ask for postgresql, mariadb, rabbitmq, redis
#     lint                    format, lint, types, imports, spelling
#
# PYTHON names the interpreter that .venv is made with (default: python3); VENV another place for it,
# EXTRAS what is installed with the project (default: test,dev).
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}
VENV_PYTHON=$VENV/bin/python
EXTRAS=${EXTRAS:-test,dev}

info() { printf '==> %s\n' "$*" >&2; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Install Debian packages as root; otherwise say which line to run.
_need_packages() {
    local line="apt-get install -y $*"
    command -v apt-get >/dev/null || die "please install: $*"
    [ "$(id -u)" = 0 ] || die "please run: sudo $line"
    info "$line"
    # RUNLEVEL=1: packages start no services; the tests start servers of their own.
    local apt=(env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -o Acquire::Retries=3)
    # The lists may be absent or too old to be of use: then once more, with new ones.
    "${apt[@]}" install -y "$@" </dev/null >/dev/null 2>&1 && return
    "${apt[@]}" update </dev/null >&2 || die "apt-get update failed"
    "${apt[@]}" install -y "$@" </dev/null >&2 || die "failed: $line"
}

_has_postgresql() { command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; }
_has_rabbitmq() { { [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || command -v rabbitmq-server >/dev/null; } && command -v epmd >/dev/null; }
_has_mariadb() { [ -x /usr/sbin/mariadbd ] || command -v mariadbd >/dev/null; }
_has_redis() { command -v redis-server >/dev/null; }

need_servers() {
    local name missing=()
    for name in "$@"; do
        case $name in
            postgresql) _has_postgresql || missing+=(postgresql) ;;
            rabbitmq) _has_rabbitmq || missing+=(rabbitmq-server) ;;
            mariadb) _has_mariadb || missing+=(mariadb-server) ;;
            redis) _has_redis || missing+=(redis-server) ;;
            *) die "need_servers: unknown server $name" ;;
        esac
    done
    if [ ${#missing[@]} -gt 0 ]; then
        _need_packages "${missing[@]}"
    fi
}

setup_venv() {
    local python=${PYTHON:-python3} stamp=$VENV/.installed want
    if [ ! -x "$VENV_PYTHON" ]; then
        command -v "$python" >/dev/null || die "$python not found: Python 3.10 or newer is needed"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            die "Python 3.10 or newer is needed; this is $("$python" --version). Name another with PYTHON=..."
        # Debian keeps both out of its python3 package.
        "$python" -c 'import venv, ensurepip' 2>/dev/null || _need_packages python3-venv
        info "making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV" || die "could not make $VENV"
    fi
    want=$(cat "$ROOT/pyproject.toml" - <<<"$ROOT $EXTRAS" | sha256sum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
        info "installing celery-outbox and its tools into $VENV"
        "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --retries 5 \
            --editable "$ROOT[$EXTRAS]" </dev/null || die "pip install failed"
        printf '%s\n' "$want" >"$stamp"
    fi
}

# Qpid Proton comes as source only.
setup_proton() {
    "$VENV_PYTHON" -c 'import proton' 2>/dev/null && return
    local missing=()
    command -v gcc >/dev/null || missing+=(gcc libc6-dev)
    command -v pkg-config >/dev/null || missing+=(pkg-config)
    [ -f /usr/include/openssl/ssl.h ] || missing+=(libssl-dev)
    [ -f "$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
        missing+=(python3-dev)
    if [ ${#missing[@]} -gt 0 ]; then
        _need_packages "${missing[@]}"
    fi
    info "building Qpid Proton"
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --retries 5 \
        --editable "$ROOT[proton]" </dev/null ||
        die "pip install of Qpid Proton failed"
}

# Run in a subshell with the environment's programs first on PATH; says which check failed.
lint() (
    cd "$ROOT" || exit
    if [ -d "$VENV/bin" ]; then
        PATH=$VENV/bin:$PATH
    fi
    local failed=()
    _check() {
        info "$*"
        "$@" >&2 || failed+=("$1${2:+ $2}")
    }
    _check ruff format --check .
    _check ruff check .
    _check mypy
    _check lint-imports --no-cache
    _check codespell
    [ ${#failed[@]} -eq 0 ] || die "failed: $(printf '%s; ' "${failed[@]}")"
)
