"""`python -m transformers_ma2mba.command_line`."""

import sys

from . import main

sys.exit(main())
