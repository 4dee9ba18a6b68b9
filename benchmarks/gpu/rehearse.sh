#!/usr/bin/env bash
# The dry runs of benchmarks.gpu under the versions of a GPU machine: make gpu-rehearsal.
#
# Inputs: $PYTHON, optional: a Python 3.12. Outputs: .venv-torch211, made once, and the output of the
# test of the dry runs. The environment has the packages that docs/gpu.md expects on such a machine,
# and the wheels that it tells to bring, without their dependencies: an import of any other package
# fails.
# numpy is limited, because the interpreter of Triton 3.6 does not know newer versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=.venv-torch211
installed=("torch==2.11.*" "triton==3.6.*" "numpy<2.4" transformers pytest)
brought=("megatron-core==0.19.2" orjson backports.zstd psutil)
stamp=$venv/.stamp
key=$(printf '%s\n' "${installed[@]}" "${brought[@]}" "$PWD" | cksum)

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 "${HOME:-}"/.pyenv/versions/3.12.*/bin/python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "rehearsal: no Python 3.12 found, which the wheels of a GPU machine are for; install it or set PYTHON to its path." >&2
    exit 1
}

if [ "$(cat $stamp 2>/dev/null)" != "$key" ]; then
    python=$(find_python)
    echo "rehearsal: installing torch 2.11 and Triton 3.6 into $venv: 2 to 4 minutes, 4.9 GB on disk"
    rm -rf $venv
    "$python" -m venv $venv
    mkdir $venv/tmp
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input)
    # Modules are compiled when they are imported, and most of them never are.
    TMPDIR=$PWD/$venv/tmp "${pip[@]}" --no-compile "${installed[@]}"
    "${pip[@]}" --no-deps "${brought[@]}"
    printf '%s\n' "$key" >$stamp
fi

echo "rehearsal: the dry runs of check, time and tune, about 5 minutes on 2 cores"
$venv/bin/python -m pytest tests/benchmarks/test_gpu.py
