"""`python -m fastwm.selftest`: every op, forward and backward, against float64 on this machine."""

from __future__ import annotations

import argparse
import sys
import time

LIMIT = 1e-4  # difference in norm, relative; float32 kernels stay one to three digits below


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastwm.selftest", description=__doc__)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    args, start = parser.parse_args(argv), time.perf_counter()

    import torch  # after --help, which does without

    from fastwm import ops
    from fastwm.ops._cases import CASES, compare

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # compare at full float32
    print(", ".join(f"{key} {value}" for key, value in ops.backend_info().items()))
    print(f"{'op on ' + device:<20}{'results':>10}{'gradients':>11}  path")
    failed = []
    for name in CASES:
        results, gradients, seen = compare(name, device)
        if max(results, gradients) > LIMIT:
            failed.append(name)
        verdict = "  FAILED" if name in failed else ""
        path = "fused" if seen else "reference"
        print(f"{name:<20}{results:>10.1e}{gradients:>11.1e}  {path}{verdict}")
    print(f"{len(CASES) - len(failed)} of {len(CASES)} agree within {LIMIT:g} ", end="")
    print(f"({time.perf_counter() - start:.1f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
