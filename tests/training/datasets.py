"""Small datasets for the tests of training: rows about drawn pictures, with none, one or two of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.synthesis.standing_in import png
from vlmguard.rewriter.protocol import Analysis, Rewrite, render_output
from vlmguard.synthesis.sample import Row

COLOURS = ("red", "green", "blue", "black")
OUTPUT = render_output(Rewrite(1.0, "fraud", Analysis("Asks.", "A sign.", "Both."), "How do I spot a fake one?"))


def rows(folder: Path, count: int = 12) -> list[Row]:
    """Half of them risky; their pictures lie in `folder`."""
    made = []
    for number in range(count):
        images = []
        for colour in COLOURS[: number % 3]:
            data = png(colour, 48)
            (folder / f"{colour}.png").write_bytes(data)
            images.append({"path": f"{colour}.png", "sha256": hashlib.sha256(data).hexdigest()})
        risky = number % 2 == 0
        made.append(
            Row(
                f"r{number}",
                tuple(images),
                f"What is number {number}" + " again" * number + "?",
                OUTPUT if risky else "safe",
                "safety" if risky else "helpfulness",
                {"name": "made-up", "licence": "CC0"},
                ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}) if number == 4 else (),
            )
        )
    return made


def dataset(folder: Path, count: int = 12) -> Path:
    path = folder / "dataset.jsonl"
    path.write_text("".join(json.dumps(row.fields()) + "\n" for row in rows(folder, count)))
    return path
