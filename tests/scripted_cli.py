"""`python -m tests.scripted_cli ARGUMENTS` is `vlmguard ARGUMENTS` on the scripted rewriter, in a process of its own.

$SLOW_SECONDS is how long a "slow" request takes.
"""

import os

import pytest

from tests.stand_ins import Rewriter, install
from vlmguard.cli import main

if __name__ == "__main__":
    install(pytest.MonkeyPatch(), Rewriter(float(os.environ.get("SLOW_SECONDS", "0.2"))))
    main()
