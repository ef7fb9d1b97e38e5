#!/usr/bin/env bash
# Times the dense CRF beside pydensecrf2, which it builds from source in an environment of its own,
# .venv-crf. Needs a C++ compiler. Arguments go to bench_crf.py.
# shellcheck source=scripts/venv.sh
. "$(dirname "$0")/venv.sh"
if ! .venv-crf/bin/python -c "import pydensecrf.densecrf" 2>/dev/null; then
    echo "building pydensecrf2 in .venv-crf"
    "$python" -m venv .venv-crf
    .venv-crf/bin/python -m pip install --quiet --disable-pip-version-check \
        --no-binary pydensecrf2 numpy pydensecrf2
fi
python scripts/bench_crf.py --peer .venv-crf/bin/python "$@"
