#!/usr/bin/env bash
# Everything a GPU session should do, in one walk: build, GPU tests, ceilings, benches. A part that fails is
# reported at the end and does not stop the others.
#
#   bench/gpu.sh [--dry] [OUT]     OUT (default bench/results/<device>) takes the logs and JSON files
#
# For a bare GPU machine: its own python (PYTHON=...), no network, nothing installed but this package.
# --dry walks the same way on the CPU, with few rounds, in the active or the checkout's .venv.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

dry=0
if [ "${1:-}" = "--dry" ]; then dry=1; shift; fi

if [ -n "${PYTHON:-}" ]; then python=$PYTHON
elif [ "$dry" = 1 ] && [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then python=$PWD/.venv/bin/python
else python=python3
fi

export OMP_WAIT_POLICY=passive
if [ "$dry" = 1 ]; then export CUDA_VISIBLE_DEVICES=""; fi

device=$("$python" - <<'PY'
import re
try:
    import torch
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
except Exception:
    name = "unknown"
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))
PY
)
out=${1:-bench/results/$device}
[ "$dry" = 1 ] && out=${1:-$(mktemp -d)}
mkdir -p "$out"

if [ "$dry" = 0 ] && { [ "$device" = cpu ] || [ "$device" = unknown ]; }; then
  echo "no GPU is visible to torch in $python: use --dry for a walk on the CPU"; exit 1
fi

failed=()
part() {  # part NAME COMMAND...
  local name=$1 start=$SECONDS; shift
  echo "== $name: $*"
  if "$@" 2>&1 | tee "$out/$name.log"; then echo "== $name: ok, $((SECONDS - start)) s"
  else failed+=("$name"); echo "== $name: FAILED, $((SECONDS - start)) s"; fi
}

rounds=(); ceilings=(); tests=(tests)
if [ "$dry" = 1 ]; then
  rounds=(--benchmark-disable)
  ceilings=(--rounds 2 --mib 64 --matmul 256)
  tests=(tests/test_riemann_accumulate.py tests/test_reference.py)
fi

part build "$python" -m pip install -e . --no-build-isolation --no-deps
part backends "$python" -c 'from mipfast import backend; [print(*row) for row in backend.status()]'
part ceilings "$python" bench/ceilings.py "${ceilings[@]}"
part tests "$python" -m pytest -q "${tests[@]}"
part bench "$python" -m pytest -q bench "${rounds[@]}" --benchmark-json="$out/bench.json"

echo "results: $out"
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
echo "all parts passed"
