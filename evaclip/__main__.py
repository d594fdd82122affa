"""`python -m evaclip`, which is what torchrun starts: `torchrun --nproc-per-node 8 -m evaclip train RECIPE`."""

import sys

from evaclip.cli import main

sys.exit(main())
