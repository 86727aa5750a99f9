"""`torchrun … -m harness.train --config RECIPE`."""

import sys

from harness.train.run import main

sys.exit(main())
