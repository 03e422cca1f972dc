"""``python -m reglib``: the command line."""

import sys

from reglib.cli import main

sys.exit(main())
