#!/usr/bin/env bash
# Build an image; for hosts without a GPU, also run the quick start and tests in it.
#
#   docker/build.sh cpu [options of `build`]    megatron-sffn:cpu
#   docker/build.sh gpu [options of `build`]    megatron-sffn:gpu
#
# Inputs: docker, else podman, else buildah, which can only build; $IMAGE, $TESTS, $QUICKSTART and
# $RUN_OPTIONS, below. Outputs: the image.
# Design notes: runs in the image have no network, so that a missing package shows, and they write
# into folders that are deleted with the container.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kind=${1:-}
image=${IMAGE:-megatron-sffn:$kind} # the name of the image
# Tests to run in the image, arguments of the quick start (such as --train-iters 20), options of the
# engine's `run` (such as --ulimit host).
read -ra tests <<<"${TESTS:-tests/nn/routers tests/integration}"
read -ra quickstart <<<"${QUICKSTART:-}"
read -ra run_options <<<"${RUN_OPTIONS:-}"
# In the build, pip trusts the certificates of this host; no layer keeps them.
certificates=${PIP_CERT:-${SSL_CERT_FILE:-}}

fail() {
    printf 'docker/build.sh: %s\n' "$1" >&2
    exit 2
}

say() { printf 'docker/build.sh: %s\n' "$*"; }

# Print the engine. A client without its daemon answers --version, but not info.
find_engine() {
    local engine
    for engine in docker podman; do
        if "$engine" info >/dev/null 2>&1; then
            printf '%s\n' "$engine"
            return
        fi
    done
    if buildah --version >/dev/null 2>&1; then
        printf 'buildah\n'
        return
    fi
    fail "no docker with a running daemon, podman or buildah found; install one (Debian, Ubuntu: apt-get install podman) and call again."
}

build() {
    local name=$1
    shift
    say "building $name"
    "$engine" build "${format[@]}" "${secret[@]}" --file "$file" \
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --tag "$name" "$@" .
}

# A health check is for containers that run for days, and podman needs systemd for it.
run() {
    "$engine" run --rm --no-healthcheck --network none --shm-size 1g "${run_options[@]}" "$@"
}

case $kind in
cpu) file=docker/Dockerfile.cpu ;;
gpu) file=docker/Dockerfile ;;
*) fail "the first argument '$kind' is neither cpu nor gpu; give one of them." ;;
esac
shift
engine=$(find_engine)
# The default format of podman and buildah has no health check, and buildah keeps no layers by default.
export BUILDAH_LAYERS=true
format=() && [ "$engine" = docker ] || format=(--format docker)
secret=() && [ -z "$certificates" ] || secret=(--secret "id=ca,src=$certificates")
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || printf 'unknown')

say "$("$engine" --version)"
build "$image" "$@"
if [ "$kind" = gpu ]; then
    say "$image is ready; what it finds on a host with GPUs: $engine run --rm --gpus all $image"
    exit
fi
if [ "$engine" = buildah ]; then
    say "$image is ready; to run the quick start and tests in it, install podman and call again."
    exit
fi
build "$image-test" --target test "$@"

say "doctor in $image"
run "$image" python -m megatron_sffn.doctor --no-smoke
say "quick start in $image"
run "$image" python -m examples.quickstart "${quickstart[@]}"
say "${tests[*]} in $image-test"
run "$image-test" python -m pytest -p no:cacheprovider "${tests[@]/#//opt/megatron-sffn/}"
say "$image is ready: doctor, quick start and ${tests[*]} passed in it as user 10001, without a network"
