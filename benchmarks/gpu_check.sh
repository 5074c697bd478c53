#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes, without network:
#   benchmarks/gpu_check.sh [FOLDER]      default FOLDER: benchmarks/results/gpu-<GPU>-<commit>
# Builds against the PyTorch that is there, then tests, latencies, benchmarks, memory. A step that
# fails is recorded and the rest still runs; the exit code is 1 if any failed, 2 if nothing can run.
# Needs: PyTorch 2.11 or newer with CUDA, nvcc of the same major version, g++, pytest, numpy.
# PYTHON picks the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 FASTWM_CUDA=1

stop() {
  echo "gpu_check: $1" >&2
  exit 2
}

ask() { "$PYTHON" -c "import torch; print($1)" 2>/dev/null; }

"$PYTHON" -c "import torch" 2>/dev/null || stop "expected PyTorch in $PYTHON, found none; set PYTHON"
[ "$(ask 'torch.cuda.is_available()')" = True ] ||
  stop "expected a GPU that PyTorch $(ask 'torch.__version__') can use, found none"
"$PYTHON" -c "import pytest, numpy" 2>/dev/null ||
  stop "expected pytest and numpy in $PYTHON; pip install pytest numpy"
home="${CUDA_HOME:-/usr/local/cuda}"
nvcc="$home/bin/nvcc"
[ -x "$nvcc" ] || nvcc=$(command -v nvcc) || stop "expected nvcc in $home/bin or on PATH; set CUDA_HOME"

gpu=$(ask 'torch.cuda.get_device_name()')
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
name=$(tr -cs 'A-Za-z0-9\n' '-' <<<"$gpu-$commit" | tr '[:upper:]' '[:lower:]')
out="${1:-benchmarks/results/gpu-$name}"
mkdir -p "$out" || stop "cannot write to $out"
out=$(cd "$out" && pwd)
arch=$(ask '"%d.%d" % torch.cuda.get_device_capability()')
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}"
{
  echo "gpu: $gpu, capability $arch"
  echo "driver: $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)"
  echo "torch: $(ask 'torch.__version__')"
  echo "nvcc: $("$nvcc" --version | tail -1)"
  echo "commit: $commit$(git diff --quiet HEAD 2>/dev/null || echo ' with local changes')"
  echo "date: $(date -u +%FT%TZ)"
} | tee "$out/machine.txt"

failed=0
: >"$out/summary.txt"
step() { # step NAME SECONDS COMMAND...; output goes to NAME.log
  local name=$1 limit=$2 start=$SECONDS verdict=ok code
  shift 2
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  if [ $code -ne 0 ]; then
    verdict="FAILED ($code)" failed=1
    tail -n 15 "$out/$name.log" | sed 's/^/    /'
  fi
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - start)) "$verdict" | tee -a "$out/summary.txt"
}

latencies() {
  "$nvcc" -O3 -std=c++20 -arch=native -rdc=true benchmarks/gpu_latencies.cu -o "$out/latencies" &&
    "$out/latencies"
  local code=$?
  rm -f "$out/latencies"
  return $code
}

bench() { # bench NAME FILES...: kernels on the GPU, eager reference beside them
  local name=$1
  shift
  "$PYTHON" -m pytest -q -p no:cacheprovider "$@" --benchmark-json="$out/$name.json"
}
export -f latencies bench
export nvcc out PYTHON

step build 240 "$PYTHON" setup.py build_ext --inplace
step doctor 60 "$PYTHON" -m fastwm.doctor
step selftest 90 "$PYTHON" -m fastwm.selftest --device cuda
step tests 240 "$PYTHON" -m pytest -q -m cuda tests
step latencies 90 bash -c latencies
if "$PYTHON" -c "import pytest_benchmark" 2>/dev/null; then
  export FASTWM_BENCH_COMPILE="${FASTWM_BENCH_COMPILE:-0}"
  limit=(--benchmark-max-time=0.2 --benchmark-min-rounds=5)
  step kernels 150 bash -c 'bench kernels benchmarks/bench_{lambda_return,twohot,latent,norm,gmm,upconv,gather}.py "$@"' _ "${limit[@]}"
  step replay 90 bash -c 'bench replay benchmarks/bench_replay.py -k learner_batch "$@"' _ "${limit[@]}"
  step update 120 bash -c 'bench update benchmarks/bench_train.py'
else
  echo "kernels, replay, update: need pytest-benchmark; timed by gpu_update.py alone" | tee -a "$out/summary.txt"
fi
step whole 150 "$PYTHON" benchmarks/gpu_update.py "$out/whole.json"
echo "results in $out"
exit $failed
