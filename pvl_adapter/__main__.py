"""`python -m pvl_adapter`, the same as `pvl-adapter`."""

import sys

from pvl_adapter.cli import main

if __name__ == "__main__":
    sys.exit(main())
