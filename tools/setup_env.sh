#!/usr/bin/env bash
# Makes .venv with the project (editable, with its dev tools) at the versions of constraints.txt.
#
# Inputs: $PYTHON, optional: the interpreter to use. Outputs: .venv.
# Design notes: a stamp, which is written last, holds a checksum of the files that determine the
# install. If the checksum is unchanged, a call does nothing (milliseconds), so every make target can
# start with it. An environment without a stamp is incomplete and is replaced.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

need_gb=8 # GiB: 6.3 for .venv, the rest for the wheels while they are unpacked
venv=.venv
stamp=$venv/.stamp
log=$venv/setup.log

fail() {
    printf 'setup: %s\n' "$1" >&2
    exit 1
}

# Prints "checksum bytes folder". Console scripts contain the absolute path of the folder.
key() {
    printf '%s %s\n' "$(cat pyproject.toml constraints.txt tools/setup_env.sh | cksum)" "$(pwd -P)"
}

# Prints "3.12.1 /path/of/the/interpreter". It runs the candidate, because pyenv has shims on PATH
# for versions that are not active. It prints the base interpreter, so that .venv never depends on
# another virtual environment, or on itself.
probe() {
    "$1" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3], getattr(sys, "_base_executable", sys.executable))' \
        2>/dev/null </dev/null
}

# megatron-core has wheels only for these two versions.
supported() {
    case $1 in 3.12.* | 3.13.*) ;; *) return 1 ;; esac
}

pyenv_pythons() {
    local root=${PYENV_ROOT:-${HOME:-}/.pyenv} version
    for version in "$root"/versions/*; do
        version=${version##*/}
        # Only final releases match, but not "3.13.0rc2", "3.13t" and named environments.
        if [[ $version =~ ^3\.1[23]\.[0-9]+$ ]]; then printf '%s\n' "$version"; fi
    done | sort -t. -k2,2nr -k3,3nr | while read -r version; do
        printf '%s\n' "$root/versions/$version/bin/python"
    done
}

# Prints the line of probe for the first supported interpreter.
find_python() {
    local probed candidate
    if [ -n "${PYTHON:-}" ]; then
        probed=$(probe "$PYTHON") ||
            fail "PYTHON=$PYTHON does not run; set it to a Python 3.12 or 3.13, or unset it."
        supported "$probed" ||
            fail "PYTHON=$PYTHON is Python ${probed%% *}, but 3.12 or 3.13 is needed; set it to one of them, or unset it."
        printf '%s\n' "$probed"
        return
    fi
    while read -r candidate; do
        if probed=$(probe "$candidate") && supported "$probed"; then
            printf '%s\n' "$probed"
            return
        fi
    done < <(printf '%s\n' python3.12 python3.13 python3 && pyenv_pythons)
    fail "no Python 3.12 or 3.13 found; install one (Debian, Ubuntu: apt-get install python3.12 python3.12-venv; anywhere: pyenv install 3.12) or set PYTHON to its path."
}

# True if .venv was completely installed in this folder. If PYTHON is set, the argument is the line
# that find_python printed for it, and .venv must have its version; if empty, any version is right.
complete() {
    [ -x $venv/bin/python ] && [ -f $stamp ] && [[ $(cat $stamp) == *" $(pwd -P)" ]] &&
        { [ -z "$1" ] || grep -qx "version = ${1%% *}" $venv/pyvenv.cfg; }
}

make_venv() {
    local version=${1%% *} python=${1#* } free_kb
    if [ -e $venv ]; then
        printf 'setup: replacing %s, which is incomplete or for another Python or folder\n' "$venv"
        rm -rf $venv
    fi
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    if [ "$free_kb" -lt $((need_gb * 1024 * 1024)) ]; then
        fail "$((free_kb / 1024 / 1024)) GB are free here, but the install needs about $need_gb GB; free some space or move the checkout to a larger disk."
    fi
    printf 'setup: installing into %s with Python %s: 2 to 5 minutes, 1.9 GB to download, 6.8 GB on disk\n' \
        "$venv" "$version"
    mkdir $venv
    "$python" -m venv $venv >$log 2>&1 ||
        fail "$python cannot make a virtual environment (log: $log); install its venv module (Debian, Ubuntu: apt-get install python${version%.*}-venv) and call again."
}

# Writes all output to the log, and only the slow steps to the terminal.
install() {
    mkdir -p $venv/tmp
    # pip unpacks in TMPDIR: use the disk whose free space was checked, because /tmp may be small.
    TMPDIR=$PWD/$venv/tmp $venv/bin/python -m pip install --disable-pip-version-check \
        --no-input --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 |
        tee -a $log |
        awk '/^ *(Downloading|Using cached) .*\(([0-9][0-9][0-9][.0-9]* MB|[.0-9]+ GB)\)/ {
                 sub(/^ */, ""); print "setup:   " $0; fflush() }
             /^Installing collected packages/ {
                 print "setup:   unpacking " NF - 3 " packages"; fflush() }'
}

# Prints " (error message of pip)", or nothing if the log has none.
pip_error() {
    sed -n 's/^ *[Ee][Rr][Rr][Oo][Rr]: */ (/p' $log | sed -n '1s/[. ]*$/)/p'
}

main() {
    local python="" current_key former_key=""
    if [ -n "${PYTHON:-}" ]; then python=$(find_python); fi
    current_key=$(key)
    if complete "$python" && [ "$(cat $stamp)" = "$current_key" ]; then return; fi

    # Only one set-up of this folder runs at a time. The kernel releases the lock when the last
    # process ends, so that a pip that survives an interrupted call still holds it.
    exec 9<pyproject.toml
    if command -v flock >/dev/null && ! flock -n 9; then
        printf 'setup: waiting for another set-up of this folder to end\n'
        flock 9
        if complete "$python" && [ "$(cat $stamp)" = "$current_key" ]; then return; fi
    fi

    # After an interrupt pip exits as after an error, but a package may be partly replaced.
    trap 'fail "interrupted; call again to install anew."' INT
    if complete "$python"; then
        printf 'setup: the requirements changed, updating %s\n' "$venv"
        former_key=$(cat $stamp)
        : >$log
    else
        if [ -z "$python" ]; then python=$(find_python); fi
        make_venv "$python"
    fi
    rm -f $stamp
    if ! install; then
        # If pip itself fails, all packages are complete, and the next call can update them.
        if [ -n "$former_key" ]; then printf '%s\n' "$former_key" >$stamp; fi
        fail "pip could not install the requirements$(pip_error); repair the cause, often the network or pip's index settings, and call again (full log: $log)."
    fi
    rm -rf $venv/tmp
    printf '%s\n' "$current_key" >$stamp
    printf 'setup: %s is ready\n' "$venv"
}

main "$@"
