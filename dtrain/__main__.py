"""``python -m dtrain``: the command without its script."""

import sys

from dtrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
