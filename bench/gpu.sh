#!/usr/bin/env bash
# Everything a GPU session should do, in one walk: build, GPU tests, ceilings, benches. A part that fails is
# reported at the end and does not stop the others. The parts take 600 s at most.
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
part() {  # part NAME SECONDS COMMAND...: stopped after SECONDS as by ctrl-C, so that pytest still writes its report
  local name=$1 limit=$2 start=$SECONDS; shift 2
  echo "== $name: $*"
  if timeout -s INT -k 20 "$limit" "$@" 2>&1 | tee "$out/$name.log"; then echo "== $name: ok, $((SECONDS - start)) s"
  else failed+=("$name"); echo "== $name: FAILED, $((SECONDS - start)) s"; fi
}

build() {  # the CUDA C++ kernel too where nvcc is, else without
  if command -v nvcc >/dev/null; then
    MIPFAST_BUILD=cuda "$python" -m pip install -e . --no-build-isolation --no-deps && return
    echo "MIPFAST_BUILD=cuda failed; building without"
  fi
  "$python" -m pip install -e . --no-build-isolation --no-deps
}
export -f build; export python

bench=(--ignore=bench/test_bench_locate.py --ignore=bench/test_bench_large.py)
ceilings=(); large=(); locate=(bench/test_bench_locate.py)
tests=(tests/test_riemann_*.py tests/test_project_accumulate.py tests/test_misdirection_loss.py tests/test_swiglu.py)
tests+=(tests/test_locate_backends.py)
if [ "$dry" = 1 ]; then
  bench+=(--benchmark-disable -k "eager or cpp")
  ceilings=(--rounds 2 --mib 64 --matmul 256)
  large=(--large-dry)
  locate=("bench/test_bench_locate.py::test_memory[text]" "bench/test_bench_locate.py::test_captum[riemann_right]")
  tests=(tests/test_riemann_accumulate.py tests/test_reference.py)
fi

part build 75 bash -c build
part backends 15 "$python" -c 'from mipfast.ops import backends; [print(*row) for row in backends.status()]'
part ceilings 15 "$python" bench/ceilings.py "${ceilings[@]}"
part tests 70 "$python" -m pytest -q "${tests[@]}"
part large 215 "$python" -m pytest -q bench/test_bench_large.py "${large[@]}" --locate-json="$out/large.json"
part locate 90 "$python" -m pytest -q "${locate[@]}" --locate-json="$out/locate.json"
part ops 120 "$python" -m pytest -q bench "${bench[@]}" --benchmark-json="$out/ops.json"

echo "results: $out"
[ -s "$out/ops.json" ] && "$python" bench/compare.py "$out/ops.json"
sed -n '/baseline \/ ours/,/^$/p' "$out/locate.log" "$out/large.log"
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
echo "all parts passed"
