#!/usr/bin/env bash
# Trains on every host of a Cloud TPU pod slice: copies the last commit there, installs it, and starts
# one command on all of them, which find each other (--multihost).
#
#   scripts/tpu_pod.sh [--dry-run] TPU_NAME ZONE train --config experiments/pspnet.py \
#       --workdir /mnt/shared/runs/pspnet
#
# The workdir and the data, JAXSEG_DATA, lie on a file system that all hosts mount. After a preemption
# (exit code 42 or 75) the same command goes on. --dry-run prints the commands and runs none.
set -euo pipefail
run() { "$@"; }
if [ "${1:-}" = --dry-run ]; then
    run() { printf '%q ' "$@"; echo; }
    shift
fi
if [ $# -lt 3 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD

on_all() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
run gcloud compute tpus tpu-vm scp "$archive" "$name:jaxseg.tar.gz" --zone="$zone" --worker=all
on_all "mkdir -p jaxseg && tar -xzf jaxseg.tar.gz -C jaxseg && cd jaxseg && EXTRAS=tpu . scripts/venv.sh"
on_all "cd jaxseg && JAXSEG_DATA=$(printf %q "${JAXSEG_DATA:-}") .venv/bin/python -m jaxseg.main$(printf ' %q' "$@") --multihost"
