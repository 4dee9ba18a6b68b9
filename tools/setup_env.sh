#!/usr/bin/env bash
# Makes .venv with the project (editable) at the versions of constraints.txt, or adds extras to it:
#
#   tools/setup_env.sh plot        make env-light: what training and the quick start need
#   tools/setup_env.sh plot dev    make env: what tests and checks need as well
#
# Inputs: extras of pyproject.toml; $PYTHON, optional: the interpreter to use; $TORCH_INDEX,
# optional: a package index beside pip's own, for torch; $TORCH_BUILD, optional: the build of torch,
# such as cpu or cu126. Outputs: .venv.
# Design notes: a stamp, which is written last, holds a checksum of the files that determine the
# install, and the extras that are installed. If the checksum is unchanged and no extra is missing, a
# call does nothing (milliseconds), so every make target can start with it. An environment without a
# stamp is incomplete and is replaced; any other is extended in place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

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
    [ -x $venv/bin/python ] && [ -f $stamp ] && [[ $(sed -n 1p $stamp) == *" $(pwd -P)" ]] &&
        { [ -z "$1" ] || grep -qx "version = ${1%% *}" $venv/pyvenv.cfg; }
}

# Prints the extras of .venv, sorted; nothing if it has none.
installed_extras() {
    if [ -f $stamp ]; then sed -n 2p $stamp; fi
}

# Prints the extras of .venv and those of the arguments, sorted, in one line.
all_extras() {
    # shellcheck disable=SC2046  # one word for each extra
    printf '%s\n' $(installed_extras) "$@" | sort -u | awk '{ printf "%s%s", separator, $0; separator = " " }'
}

# Arguments: the line of find_python, if PYTHON is set, the key, and extras.
ready() {
    complete "$1" && [ "$(sed -n 1p $stamp)" = "$2" ] &&
        [ "$(all_extras "${@:3}")" = "$(installed_extras)" ]
}

check_extras() {
    local known extra
    known=$(sed -n '/^\[project.optional-dependencies\]/,/^\[/s/^\([a-z]*\) = \[.*/\1/p' pyproject.toml)
    for extra; do
        grep -qx -e "$extra" <<<"$known" ||
            fail "extra '$extra' is not in pyproject.toml; choose among $(printf '%s' "$known" | tr '\n' ' ')."
    done
}

make_venv() {
    local version=${1%% *} python=${1#* }
    if [ -e $venv ]; then
        printf 'setup: replacing %s, which is incomplete or for another Python or folder\n' "$venv"
        rm -rf $venv
    fi
    printf 'setup: making %s with Python %s\n' "$venv" "$version"
    mkdir $venv
    "$python" -m venv $venv >$log 2>&1 ||
        fail "$python cannot make a virtual environment (log: $log); install its venv module (Debian, Ubuntu: apt-get install python${version%.*}-venv) and call again."
}

has_gpu() {
    [ -e /dev/nvidiactl ] || nvidia-smi -L >/dev/null 2>&1
}

# Sets `torch` to pip's arguments about torch: its index, and its build where that is not left to pip.
choose_torch() {
    local version installed build versions
    version=$(sed -n 's/^torch==//p' constraints.txt)
    torch=()
    if [ -n "${TORCH_INDEX:-}" ]; then torch+=(--extra-index-url "$TORCH_INDEX"); fi

    # An environment keeps its build: another one would leave the libraries of the former behind.
    installed=$(compgen -G "$venv/lib/python*/site-packages/torch-*.dist-info" || true)
    case $installed in
    *+*) build=${installed##*+} && torch+=("torch==$version+${build%.dist-info}") ;;
    esac
    build=${TORCH_BUILD-$(has_gpu || printf cpu)}
    if [ -n "$installed" ] || [ -z "$build" ]; then return; fi

    versions=$($venv/bin/python -m pip index versions torch "${torch[@]}" 2>>$log | tr -s ', ' '\n')
    if grep -Fqx "$version+$build" <<<"$versions"; then
        torch+=("torch==$version+$build")
        printf 'setup: torch is the build for %s\n' "$build"
    elif [ -n "${TORCH_BUILD:-}${TORCH_INDEX:-}" ]; then
        fail "no index has torch $version+$build for this Python; name one that has it in TORCH_INDEX, or unset TORCH_INDEX and TORCH_BUILD."
    else
        printf 'setup: no GPU found, and no CPU build of torch in the indexes of pip: torch comes with CUDA; TORCH_INDEX=URL names an index that has the CPU build\n'
    fi
}

# Ends with an error if the disk has no space for .venv with all of its extras, and for the wheels
# while they are unpacked. docs/install.md has the sizes that were measured; these are bounds.
check_space() {
    local need_gb=8 free_kb used_kb
    case " ${torch[*]} " in *+cpu\ *) need_gb=3 ;; esac
    case " $1 " in *" dev "*) need_gb=$((need_gb + 2)) ;; esac
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    used_kb=$(du -sk $venv | awk '{ print $1 }')
    if [ $((free_kb + used_kb)) -lt $((need_gb * 1024 * 1024)) ]; then
        [ -f $stamp ] || rm -rf $venv
        fail "$((free_kb / 1024 / 1024)) GB are free here, but $venv needs up to $need_gb GB; free some space or move the checkout to a larger disk."
    fi
}

# Writes all output to the log, and only the slow steps to the terminal.
install() {
    mkdir -p $venv/tmp
    # pip unpacks in TMPDIR: use the disk whose free space was checked, because /tmp may be small.
    TMPDIR=$PWD/$venv/tmp $venv/bin/python -m pip install --disable-pip-version-check \
        --no-input --progress-bar off -c constraints.txt -e ".${1:+[${1// /,}]}" "${torch[@]}" 2>&1 |
        tee -a $log |
        awk '/^ *(Downloading|Using cached) .*\(([0-9][0-9][0-9][.0-9]* MB|[.0-9]+ GB)\)/ {
                 sub(/^ */, ""); print "setup:   " $0; fflush() }
             /^Installing collected packages/ {
                 print "setup:   unpacking " NF - 3 " packages"; fflush() }'
}

# Prints what was measured: the size of .venv, and what pip's log says about the size of wheels.
report() {
    awk -v kilobytes="$(du -sk $venv | awk '{ print $1 }')" -v seconds="$SECONDS" '
        /^ *(Downloading|Using cached) .*\([.0-9]+ [kMG]B\)/ && !/\.metadata \(/ {
            size = $(NF - 1); sub(/\(/, "", size)
            bytes[$1] += size * ($NF ~ /^G/ ? 1e9 : $NF ~ /^M/ ? 1e6 : 1e3) }
        /^Successfully installed / { packages = NF - 2 }
        END { printf "setup: %d packages in %d s, %.2f GB downloaded, %.2f GB from the cache of pip; .venv has %.1f GB\n",
                  packages, seconds, bytes["Downloading"] / 1e9, bytes["Using"] / 1e9, kilobytes * 1024 / 1e9 }' $log
}

# Prints " (error message of pip)", or nothing if the log has none.
pip_error() {
    sed -n 's/^ *[Ee][Rr][Rr][Oo][Rr]: */ (/p' $log | sed -n '1s/[. ]*$/)/p'
}

main() {
    local python="" current_key former_stamp="" extras
    check_extras "$@"
    if [ -n "${PYTHON:-}" ]; then python=$(find_python); fi
    current_key=$(key)
    if ready "$python" "$current_key" "$@"; then return; fi

    # Only one set-up of this folder runs at a time. The kernel releases the lock when the last
    # process ends, so that a pip that survives an interrupted call still holds it.
    exec 9<pyproject.toml
    if command -v flock >/dev/null && ! flock -n 9; then
        printf 'setup: waiting for another set-up of this folder to end\n'
        flock 9
        if ready "$python" "$current_key" "$@"; then return; fi
    fi

    # After an interrupt pip exits as after an error, but a package may be partly replaced.
    trap 'fail "interrupted; call again to install anew."' INT
    if complete "$python"; then
        extras=$(all_extras "$@")
        printf 'setup: updating %s, so that it has %s\n' "$venv" "${extras:-no extras}"
        former_stamp=$(cat $stamp)
        : >$log
    else
        if [ -z "$python" ]; then python=$(find_python); fi
        make_venv "$python"
        extras=$(all_extras "$@")
    fi
    choose_torch
    check_space "$extras"
    rm -f $stamp
    if ! install "$extras"; then
        # If pip itself fails, all packages are complete, and the next call can update them.
        if [ -n "$former_stamp" ]; then printf '%s\n' "$former_stamp" >$stamp; fi
        fail "pip could not install the requirements$(pip_error); repair the cause, often the network or pip's index settings, and call again (full log: $log)."
    fi
    rm -rf $venv/tmp
    printf '%s\n' "$current_key" "$extras" >$stamp
    report
}

main "$@"
