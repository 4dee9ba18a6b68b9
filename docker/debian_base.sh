#!/usr/bin/env bash
# Make a base image for Dockerfile.cpu from Debian's packages, where python:3.12-slim cannot be pulled:
#
#   docker/debian_base.sh && docker/build.sh cpu --build-arg BASE=localhost/debian-python
#
# Inputs: root, debootstrap, docker or podman; $MIRROR of Debian. Outputs: localhost/debian-python, with
# Debian 13 and its Python 3.13 under the name python, as in python:3.13-slim-trixie.
set -euo pipefail

mirror=${MIRROR:-http://deb.debian.org/debian}

fail() {
    printf 'docker/debian_base.sh: %s\n' "$1" >&2
    exit 2
}

[ "$(id -u)" = 0 ] || fail "user $(id -un) may not make a root file system; call it as root."
command -v debootstrap >/dev/null ||
    fail "no debootstrap found; install it (Debian, Ubuntu: apt-get install debootstrap) and call again."
for engine in docker podman; do
    if "$engine" info >/dev/null 2>&1; then break; fi
    engine=
done
[ -n "$engine" ] ||
    fail "no docker with a running daemon and no podman found; install one (Debian, Ubuntu: apt-get install podman) and call again."

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv trixie "$root" "$mirror"
ln -s /usr/bin/python3 "$root/usr/local/bin/python"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar --create --directory "$root" --numeric-owner . | "$engine" import - localhost/debian-python
