"""`python -m graddrop_kernels.demo`: train with each method that was asked for, test in every language, report."""

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the demo. Returns 0, or 1 after one line on stderr that says what is missing or cannot be used."""
    try:
        from .arguments import parse
        from .run import run

        run(parse(argv))
        return 0
    except ModuleNotFoundError as error:
        print(f"error: the demo needs {error.name}: pip install 'graddrop_kernels[demo]'", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def start_again_with_passive_waiting() -> None:
    """Lets idle OpenMP threads sleep, unless the user has chosen, by starting the program again.

    By default they spin. With 2 threads and 2 busy neighbours on 2 cores, 15 steps then took 47 s of processor time
    instead of 24, and 57 s instead of 36 to 43. On an idle machine sleeping costs up to 15 %. OpenMP reads the variable
    when it is loaded, and importing the library (torch) has already loaded it, hence the new start.
    """
    if os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    start_again_with_passive_waiting()
    sys.exit(main())
