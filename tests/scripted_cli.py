"""`python -m tests.scripted_cli ARGUMENTS` is `vlmguard ARGUMENTS` on the scripted rewriter, in a process of its own.

$SLOW_SECONDS is how long a "slow" request takes; with $ANNOUNCE it says on standard error that it has begun.
"""

import os
import signal
import sys

import pytest

from tests.stand_ins import Rewriter, install
from vlmguard.chat import Chat
from vlmguard.cli import main
from vlmguard.rewriter.protocol import Rewrite


class Announcing(Rewriter):
    async def judge(self, chat: Chat) -> Rewrite:
        if os.environ.get("ANNOUNCE"):
            sys.stderr.write("begun\n")
        return await super().judge(chat)


if __name__ == "__main__":
    # tests that were started in the background would hand their deafness to Ctrl-C on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    install(pytest.MonkeyPatch(), Announcing(float(os.environ.get("SLOW_SECONDS", "0.2"))))
    main()
