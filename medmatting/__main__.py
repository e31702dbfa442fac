"""`python -m medmatting` is the command line."""

import sys

from medmatting.cli import main

sys.exit(main())
