"""What a rewrite is held against before it becomes a row: verification beyond the paper, one check a file.

A check is called with a sample and its rewrite and gives a `Finding`: a reason to drop the row, or None. A model that
fails raises: that says nothing of the row.
"""

from vlmguard.synthesis.checks.better_answer import BetterAnswer
from vlmguard.synthesis.checks.finding import Finding
from vlmguard.synthesis.checks.form import Form
from vlmguard.synthesis.checks.intent_kept import IntentKept
from vlmguard.synthesis.checks.judged_safe import JudgedSafe
from vlmguard.synthesis.checks.language_kept import LanguageKept

__all__ = ["BetterAnswer", "Finding", "Form", "IntentKept", "JudgedSafe", "LanguageKept"]
