#!/usr/bin/env bash
# The op and replay tests on libraries built with AddressSanitizer and UndefinedBehaviorSanitizer.
#   tests/asan.sh [pytest arguments]     default: tests/ops and the replay, without torch.compile
# Builds in build/asan (kept: the next run compiles only what changed) and leaves the checkout alone.
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/asan
mkdir -p "$work"
# Files of this checkout, new ones too, with their times, so that nothing compiles twice.
git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null |
  tar -cf - -T - | tar -xf - -C "$work"
cd "$work"
export FASTWM_SANITIZE=address,undefined FASTWM_CUDA=0 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python setup.py -q build_ext --inplace
compiler=${CXX:-g++}
# Python and torch do not free everything at exit; the interpreter itself is not instrumented.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
libraries="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so)"
if [ $# -eq 0 ]; then
  set -- -q tests/ops tests/test_replay.py tests/test_selftest.py -k "not compile and not opcheck"
fi
LD_PRELOAD="$libraries" PYTHONPATH="$PWD" python -m pytest -p no:cacheprovider "$@"
