"""`python -m stg_engine` is the command `stg-engine`."""

import sys

from stg_engine.cli import main

sys.exit(main())
