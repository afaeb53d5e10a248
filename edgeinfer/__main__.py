"""`python -m edgeinfer` is the `edgeinfer` command."""

import sys

if __name__ == "__main__":
    try:
        from edgeinfer.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
