#!/bin/bash
# Sets up one node of a Ray cluster out of the checkout that `ray up` has copied to it; run again, it changes nothing.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/../.." && pwd)
make -C "$checkout" setup

# `ray submit` runs plain `python` in a login shell, and forwards no environment.
profile="$checkout/.ray-profile"
{
    echo "export PATH=\"$checkout/.venv/bin:\$PATH\""
    echo "export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0"
    # Without a GPU, DeepSpeed has to be told.
    nvidia-smi -L >/dev/null 2>&1 || echo "export DS_ACCELERATOR=cpu"
} >"$profile"
line="[ ! -f '$profile' ] || . '$profile'"
grep -qsxF "$line" ~/.bashrc || echo "$line" >>~/.bashrc
