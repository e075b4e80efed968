"""`python -m kuiperllm` is the command `kuiper`."""

import sys

from kuiperllm.cli import main

sys.exit(main())
