"""`python -m hmar_mega` is the command `hmar-mega`."""

import sys

from hmar_mega.cli import main

sys.exit(main())
