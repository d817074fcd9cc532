"""Memory bandwidth on a given number of threads. What is copied and added: common/bandwidth.py."""

from ..common.bandwidth import BYTES, measure
from ..common.machine import Load
from ..common.results import arguments, write


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--numel", type=int, default=100_000_000, help="floats in each of the four arrays")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    numel = 1 << 20 if options.quick else options.numel
    load = Load()
    rows = [measure(threads, numel, 3 if options.quick else 15) for threads in options.threads]
    for row in rows:
        speeds = ", ".join(f"{name} {row[name]['gb_per_s']:.1f}" for name in BYTES if row[name])
        print(f"{row['threads']} threads ({row['method']}): {speeds} GB/s")
    print(write("bandwidth", options, {"load": load.report(), "rows": rows}))


if __name__ == "__main__":
    main()
