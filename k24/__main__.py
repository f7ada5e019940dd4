"""``python -m k24``."""

import sys

from k24.cli import main

sys.exit(main())
