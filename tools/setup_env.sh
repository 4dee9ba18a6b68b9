#!/usr/bin/env bash
# Makes .venv with the project (editable, with its dev tools) at the versions of constraints.txt.
#
# Enters: nothing but $PYTHON, optional: the interpreter to use. Leaves: .venv, complete.
# Choice: a stamp, written last, holds a checksum of what decides the install. A call that
# finds it unchanged does nothing (milliseconds), so every make target can start here; an
# environment without a stamp was cut short and is made anew.
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

# "checksum bytes folder": the folder, because console scripts hold its absolute path.
key() {
    printf '%s %s\n' "$(cat pyproject.toml constraints.txt tools/setup_env.sh | cksum)" "$(pwd -P)"
}

# Prints "3.12.1 /path/of/the/interpreter". Runs the candidate, because a name on PATH
# proves nothing: pyenv's shims exist for versions that are not active. The base interpreter
# is asked for, so that .venv never stands on another virtual environment, or on itself.
probe() {
    "$1" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3], getattr(sys, "_base_executable", sys.executable))' \
        2>/dev/null </dev/null
}

# megatron-core has wheels for these two only.
supported() {
    case $1 in 3.12.* | 3.13.*) ;; *) return 1 ;; esac
}

pyenv_pythons() {
    local root=${PYENV_ROOT:-${HOME:-}/.pyenv} version
    for version in "$root"/versions/*; do
        version=${version##*/}
        # Final releases only: "3.13.0rc2", "3.13t" and named environments do not match.
        if [[ $version =~ ^3\.1[23]\.[0-9]+$ ]]; then printf '%s\n' "$version"; fi
    done | sort -t. -k2,2nr -k3,3nr | while read -r version; do
        printf '%s\n' "$root/versions/$version/bin/python"
    done
}

# Prints what probe prints, for the first interpreter that will do.
find_python() {
    local found candidate
    if [ -n "${PYTHON:-}" ]; then
        found=$(probe "$PYTHON") ||
            fail "PYTHON=$PYTHON does not run; set it to a Python 3.12 or 3.13, or unset it."
        supported "$found" ||
            fail "PYTHON=$PYTHON is Python ${found%% *}, but 3.12 or 3.13 is needed; set it to one of them, or unset it."
        printf '%s\n' "$found"
        return
    fi
    while read -r candidate; do
        if found=$(probe "$candidate") && supported "$found"; then
            printf '%s\n' "$found"
            return
        fi
    done < <(printf '%s\n' python3.12 python3.13 python3 && pyenv_pythons)
    fail "no Python 3.12 or 3.13 found; install one (Debian, Ubuntu: apt-get install python3.12 python3.12-venv; anywhere: pyenv install 3.12) or set PYTHON to its path."
}

# Whether .venv was once installed to the end, in this folder. The argument is what find_python
# printed for a PYTHON that is set, which then must be .venv's version; empty: any will do.
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

# The log gets everything; the terminal only what takes long.
install() {
    mkdir -p $venv/tmp
    # pip unpacks in TMPDIR: here, on the disk that was checked, rather than in a small /tmp.
    TMPDIR=$PWD/$venv/tmp $venv/bin/python -m pip install --disable-pip-version-check \
        --no-input --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 |
        tee -a $log |
        awk '/^ *(Downloading|Using cached) .*\(([0-9][0-9][0-9][.0-9]* MB|[.0-9]+ GB)\)/ {
                 sub(/^ */, ""); print "setup:   " $0; fflush() }
             /^Installing collected packages/ {
                 print "setup:   unpacking " NF - 3 " packages"; fflush() }'
}

# " (pip's own words)", or nothing when pip did not get as far as an error.
pip_error() {
    sed -n 's/^ *[Ee][Rr][Rr][Oo][Rr]: */ (/p' $log | sed -n '1s/[. ]*$/)/p'
}

main() {
    local python="" wanted former=""
    if [ -n "${PYTHON:-}" ]; then python=$(find_python); fi
    wanted=$(key)
    if complete "$python" && [ "$(cat $stamp)" = "$wanted" ]; then return; fi

    # One set-up of this folder at a time. The lock is the kernel's: none is left behind,
    # and a pip that outlived an interrupted call still holds it.
    exec 9<pyproject.toml
    if command -v flock >/dev/null && ! flock -n 9; then
        printf 'setup: waiting for another set-up of this folder to end\n'
        flock 9
        if complete "$python" && [ "$(cat $stamp)" = "$wanted" ]; then return; fi
    fi

    # pip ends an interrupt like a failure of its own, but may leave a package half replaced.
    trap 'fail "interrupted; call again to install anew."' INT
    if complete "$python"; then
        printf 'setup: the requirements changed, updating %s\n' "$venv"
        former=$(cat $stamp)
        : >$log
    else
        if [ -z "$python" ]; then python=$(find_python); fi
        make_venv "$python"
    fi
    rm -f $stamp
    if ! install; then
        # pip that fails by itself leaves whole packages, which the next call can update.
        if [ -n "$former" ]; then printf '%s\n' "$former" >$stamp; fi
        fail "pip could not install the requirements$(pip_error); repair the cause, often the network or pip's index settings, and call again (full log: $log)."
    fi
    rm -rf $venv/tmp
    printf '%s\n' "$wanted" >$stamp
    printf 'setup: %s is ready\n' "$venv"
}

main "$@"
