# Sourced by the other scripts: makes .venv in the repository, installs jaxseg with the extras in
# EXTRAS (such as "dev") unless that was done before, and activates it. PYTHON names another
# interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is $("$python" --version 2>&1); jaxseg needs Python 3.11 or later: set PYTHON" >&2
    exit 2
fi
[ -f .venv/bin/activate ] || "$python" -m venv .venv
. .venv/bin/activate
done=.venv/installed${EXTRAS:+-$EXTRAS}
if [ ! "$done" -nt pyproject.toml ]; then
    echo "installing jaxseg into .venv (the first time about 300 MB of packages)"
    python -m pip install --quiet --disable-pip-version-check --editable ".${EXTRAS:+[$EXTRAS]}"
    touch "$done"
fi

# On a CPU: pages of 2 MB for the large arrays save a tenth of the time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
