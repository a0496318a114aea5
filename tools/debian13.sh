#!/usr/bin/env bash
# Runs a part of the tests on Debian 13, which has Python 3.13, on an older host.
#
#   sudo apt-get install debootstrap
#   sudo tools/debian13.sh /var/tmp/debian13
#
# The folder becomes a root of Debian, about 4 GB with all that pip installs, and is
# used again by the next call. Delete it by `rm -rf --one-file-system`.
set -euo pipefail
root=${1:?"Expected: a folder for the root, such as /var/tmp/debian13"}
shift
here=$(cd "$(dirname "$0")/.." && pwd)
mirror=${MIRROR:-http://deb.debian.org/debian}

if [ ! -e "$root/etc/debian_version" ]; then
    debootstrap --variant=minbase \
        --include=python3-venv,ca-certificates,git,make,libgl1 trixie "$root" "$mirror"
fi
mkdir -p "$root/work"
# A copy: what the tests write stays there.
tar -C "$here" --exclude=.venv --exclude=build --exclude=dist -cf - . |
    tar -C "$root/work" -xf -
# The network as the host has it: names, certificates, index of packages.
for file in etc/resolv.conf etc/ssl/certs/ca-certificates.crt etc/pip.conf; do
    [ ! -e "/$file" ] || cp "/$file" "$root/$file"
done
mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
mountpoint -q "$root/dev" || mount --bind /dev "$root/dev"
trap 'umount "$root/proc" "$root/dev"' EXIT
chroot "$root" bash -euc '
    cd /work
    [ -e /venv ] || python3 -m venv /venv
    . /venv/bin/activate
    python --version
    pip install -q -e ".[jax,train,eval,hf]" pytest pytest-xdist hypothesis import-linter hatchling
    tools/test_a_part.sh "$@"
' bash "$@"
