"""Entry of the `batchnorm` command and of `python -m batchnorm`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without its libraries, say in one line how to get them."""
    try:
        from batchnorm.cli import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("batchnorm"):
            raise
        print(f"batchnorm: {error.name} is missing: pip install 'batchnorm[lab]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())


if __name__ == "__main__":
    main()
