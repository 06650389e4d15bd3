#!/bin/sh
# Installs what FFCV compiles against (and a compiler) on Debian or Ubuntu, if it is missing and this user may.
# Otherwise says the one command to run, and fails. Used by `make setup`; run it on every node of a cluster too.
set -eu

missing=""
need() { # need PACKAGE TEST...: note PACKAGE unless the test succeeds
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}

need pkg-config command -v pkg-config
need g++ command -v c++
need libturbojpeg0-dev test -e /usr/include/turbojpeg.h
need libopencv-dev sh -c 'test -e /usr/include/opencv4/opencv2/core.hpp || test -e /usr/local/include/opencv4/opencv2/core.hpp'
need python3-venv "${PYTHON:-python3}" -c 'import ensurepip, venv'
need python3-dev "${PYTHON:-python3}" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_paths()["include"], "Python.h"))'

[ -z "$missing" ] && exit 0

if [ "$(id -u)" = 0 ]; then
    as_root=""
else
    as_root="sudo"
fi
if command -v apt-get >/dev/null 2>&1 && { [ -z "$as_root" ] || sudo -n true 2>/dev/null; }; then
    echo "installing:$missing"
    $as_root apt-get update -qq
    # env comes after sudo, which drops the caller's environment: a package that asks a question would wait for ever.
    # shellcheck disable=SC2086 # one word for each package
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "error: system libraries are missing; run: sudo apt-get update && sudo apt-get install -y$missing" >&2
    exit 1
fi
