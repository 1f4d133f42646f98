"""Trained rewriters side by side on the evaluation subsets: python -m runs.rewriter_quality DIR [DIR ...] --data EVAL

For each: AUROC of its gate on the combination set (risky requests against their safe twins on the same photos) and on XSTest,
and of `--rewrites` risky requests how many outputs have the format and pass the checks. 95 % intervals.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from runs.packaged.items import Item, items
from runs.packaged.statistics import auroc_interval, share
from vlmguard import load
from vlmguard.chat import Chat
from vlmguard.errors import RewriteUnreadable
from vlmguard.rewriter.protocol import check_prompt
from vlmguard.rewriter.rewriter import Rewriter

PAIRS = (
    ("combination, against the safe twin on the same photo", "combination_risky", "combination_safe_text"),
    ("XSTest, unsafe against safe", "xstest_unsafe", "xstest_safe"),
)


async def risks(rewriter: Rewriter, chosen: Sequence[Item]) -> list[float]:
    """What can't be read counts as 0.5: neither."""
    found = []
    for item in chosen:
        try:
            found.append((await rewriter.judge(chat(item))).risk)
        except RewriteUnreadable:
            found.append(0.5)
    return found


def chat(item: Item) -> Chat:
    return Chat.of(item.text, [item.image] if item.image else [])


async def written(rewriter: Rewriter, chosen: Sequence[Item]) -> int:
    good = 0
    for item in chosen:
        try:
            rewrite = await rewriter(chat(item))
            if rewrite.prompt is not None:
                check_prompt(rewrite.prompt, item.text, rewrite.analysis)
                good += 1
        except RewriteUnreadable:
            continue
    return good


async def measured(spec: str, every: Sequence[Item], most: int, rewrites: int) -> list[str]:
    rewriter = load.rewriter(spec)
    cells = []
    for _, *names in PAIRS:
        groups = [[item for item in every if item.set == name][:most] for name in names]
        risky, safe = [await risks(rewriter, group) for group in groups]
        value, low, high = auroc_interval(risky, safe)
        cells.append(f"{value:.3f} ({low:.3f}-{high:.3f}), n = {len(risky)} / {len(safe)}")
    tried = [item for item in every if item.set == "combination_risky"][:rewrites]
    good, low, high = share(await written(rewriter, tried), len(tried))
    cells.append(f"{good:.2f} ({low:.2f}-{high:.2f}), n = {len(tried)}")
    await rewriter.aclose()
    return cells


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("rewriters", nargs="+", metavar="DIR")
    options.add_argument("--data", type=Path, required=True, help="the evaluation subsets")
    options.add_argument("--most", type=int, default=99, help="items of a group")
    options.add_argument("--rewrites", type=int, default=20)
    given = options.parse_args()
    every = list(items(given.data))
    print(f"| rewriter | {' | '.join(f'AUROC, {name}' for name, *_ in PAIRS)} | outputs in the format |")
    print("|---|---|---|---|")
    for spec in given.rewriters:
        cells = asyncio.run(measured(spec, every, given.most, given.rewrites))
        print(f"| {Path(spec).name} | {' | '.join(cells)} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
