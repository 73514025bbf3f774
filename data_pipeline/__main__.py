"""`python -m data_pipeline`: hands over to `cli.py`."""

import sys

from data_pipeline.cli import main

if __name__ == "__main__":  # worker processes import this file again
    sys.exit(main())
