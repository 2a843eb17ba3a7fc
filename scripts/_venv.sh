# Sourced by quickstart.sh and test.sh: `use_venv EXTRA` makes .venv once, installs the package with the extra once, and activates it.
# Again only when setup.cfg or pyproject.toml changes. PYTHON chooses the interpreter that makes .venv (default: python3).

use_venv() {
    local extra=$1 root=$2
    local venv="$root/.venv"
    local stamp="$venv/.installed-$extra"
    if [ ! -x "$venv/bin/python" ]; then
        local python="${PYTHON:-python3}"
        if ! command -v "$python" >/dev/null 2>&1; then
            echo "error: no '$python' here; install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.11 bash $0" >&2
            return 1
        fi
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: $("$python" --version) is too old; attention_zoo needs 3.11 or newer. Name one: PYTHON=python3.12 bash $0" >&2
            return 1
        fi
        echo "making $venv with $("$python" --version)"
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            echo "error: could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2
            return 1
        fi
    fi
    local key
    key=$(cat "$root/setup.cfg" "$root/pyproject.toml" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        echo "installing attention-zoo[$extra] into $venv (once; PyTorch is large)"
        PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet --editable "$root[$extra]" || return 1
        echo "$key" >"$stamp"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
