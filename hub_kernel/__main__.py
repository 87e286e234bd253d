"""Write the kernel repository, and with `--build` compile its CPU variant for this machine."""

import argparse
from pathlib import Path

from hub_kernel.tree import write_tree
from hub_kernel.variant import build_variant


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hub_kernel", description=__doc__)
    parser.add_argument("output", type=Path, help="the folder to write; an older tree there is replaced")
    parser.add_argument(
        "--build", action="store_true", help="compile the CPU variant too, which takes minutes"
    )
    given = parser.parse_args()
    tree = write_tree(given.output)
    print(f"{tree}: build.toml, csrc, torch-ext")
    if given.build:
        print(build_variant(tree))


if __name__ == "__main__":
    main()
