"""What was saved, loaded again from disk and held against the base: an adapter that does nothing must not pass (F105-F109)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmguard.errors import AdapterError, ImageError, RewriteUnreadable, TargetError
from vlmguard.rewriter.rewriter import Prompted
from vlmguard.training.calibration import Calibration, calibrated, judged
from vlmguard.training.models import Base, load_base, servable
from vlmguard.vlms.adapters import FINGERPRINT_FILE, put_adapter
from vlmguard.vlms.generation import Engine
from vlmguard.vlms.local import Local

if TYPE_CHECKING:
    from vlmguard.training.sft import SFT, Prepared

MOST_TRIED: Final = 4  # rows whose output is generated: each may take as long as a step


def with_adapter(base: Base, folder: Path) -> Any:
    """The base with the adapter of a folder on it. Raises AdapterError unless it is proved to be on."""
    processor = base.processor
    return put_adapter(base.model, str(folder), lambda model: Engine(model, processor, folder.name).probe())


def prove(options: SFT, ready: Prepared, say: Callable[[str], None]) -> tuple[Calibration, tuple[int, int], str | None]:
    """Loads what was saved, calibrates its gate, and tries its format.

    Returns:
        the calibration; (outputs in the format, rows tried); why vLLM cannot serve it as it is, or None.

    Raises:
        AdapterError: what was saved gives the base's own logits.
    """
    from vlmguard.training.sft import write_rewriter

    dtype = "bfloat16" if options.half else "float32"
    if options.method == "full":
        model, why = _whole(options, ready, dtype), None
    else:
        base = load_base(options.base, dtype, fresh=True)
        note = options.out / FINGERPRINT_FILE
        if not note.exists():  # it was trained in 4 bits
            note.write_text(json.dumps({"base": base.fingerprint}))
        model, why = with_adapter(base, options.out), servable(options.out)
    local = Local(model.to(_device()), ready.base.processor, options.out.name)
    rewriter = Prompted(local, instructed=options.instructed)
    say("Calibrating the gate")

    async def measured() -> tuple[Calibration, tuple[int, int]]:
        risks = await judged(rewriter, ready.rows, ready.held)
        found = calibrated(risks, [row.risky for row in ready.held], options.false_positive_rate)
        parsed = await _parsed(rewriter, options, ready)
        await local.aclose()
        return found, parsed

    calibration, parsed = asyncio.run(measured())
    base_name = str(options.out) if options.method == "full" else options.base
    write_rewriter(options.out, base_name, calibration.threshold, instructed=options.instructed)
    return calibration, parsed, why


def _whole(options: SFT, ready: Prepared, dtype: str) -> Any:
    """The trained model, once its logits are known to be others than the base's; one of the two is held at a time."""
    import torch

    def probed(spec: str) -> tuple[Any, Any]:
        model = load_base(spec, dtype).model.eval()
        with torch.no_grad():
            return model, Engine(model, ready.base.processor, "probe").probe()

    before = probed(options.base)[1]
    trained, after = probed(str(options.out))
    if torch.equal(before, after):
        raise AdapterError(f"{options.out} gives the base's own logits", "Train longer, or at a higher rate.")
    return trained


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


async def _parsed(rewriter: Prompted, options: SFT, ready: Prepared) -> tuple[int, int]:
    """How many outputs have the format, of held-out risky rows (of learned ones where none is held out)."""
    tried = [row for row in ready.held if row.risky] or [row for row in ready.learn if row.risky]
    good = 0
    for row in tried[:MOST_TRIED]:
        try:
            good += (await rewriter(ready.rows.chat(row))).prompt is not None
        except (RewriteUnreadable, TargetError, ImageError):
            continue
    return good, len(tried[:MOST_TRIED])
