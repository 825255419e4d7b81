#!/usr/bin/env bash
# Collect what a bare GPU machine needs for tools/gpu_check.py, where no package index can be reached from there.
#
#     tools/pack_gpu_check.sh [DIR]        # default: wheels
#
# The machine is expected to have Python (PYTHON_VERSION, default 3.12), torch, triton, transformers, numpy, safetensors,
# pytest and what those need. DIR then holds the rest as wheels, about 8 MB. Copy the repository and DIR there, and run
#
#     python3 -m pip install --no-index --no-deps --target /tmp/site DIR/*.whl
#     PYTHONPATH=/tmp/site python3 tools/gpu_check.py --budget 600
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
wheels=${1:-wheels}
python=${PYTHON:-$root/.venv/bin/python}
target=${PYTHON_VERSION:-3.12}

pinned() { grep -E "^$1==" "$root/requirements.txt"; }
installed() { "$python" -c "from importlib.metadata import version; print('$1==' + version('$1'))"; }

mkdir -p "$wheels"
platforms=()
for glibc in 2_28 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
# Pure wheels, and those that are compiled for the other Python.
"$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --python-version "$target" \
	--implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 -d "$wheels" \
	"$(pinned megatron-core)" "$(pinned tyro)" "$(installed hjson)" "$(installed pydantic)" \
	"$(installed pydantic_core)" "$(installed annotated-types)" "$(installed typing-inspection)" \
	"$(installed docstring-parser)" "$(installed typeguard)"
# DeepSpeed is published as source only. Without its compiled operators, which are not used, its wheel is pure.
DS_BUILD_OPS=0 "$python" -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation -w "$wheels" \
	"$(pinned deepspeed)"
du -sh "$wheels"
