"""What the rewriter is told of a picture beside its image tokens: what the vision tower calls it, and the words found in it.

Symbols carry what a projector trained on few photos cannot. Both stand in the request to the rewriter as quoted data.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlmguard.errors import missing_extra
from vlmguard.rewriter.protocol import Seen

OCR_SIDE_PIXELS = 800  # larger pictures are shrunk to this longer side before text is looked for
OCR_LINES = 24
LABELS = 3
LEAST_LABEL = 0.08  # softmax over ImageNet's 1,000 classes
LEAST_NOUN = 0.25  # sigmoid of each word of our own head


def name_features(
    pooled: Any, classifier: tuple[Any, Any], nouns: tuple[Any, Any], names: Sequence[str], words: Sequence[str]
) -> list[tuple[str, ...]]:
    """Labels of pictures, most likely first, from pooled tower features (N, 1280) float32.

    Args:
        classifier: ImageNet's weight (1000, 1280) and bias, called `names`.
        nouns: our head's weight (W, 1280) and bias, called `words`; people, places and everyday scenes.
    """
    return merge_labels(
        (pooled @ classifier[0].T + classifier[1]).softmax(-1), (pooled @ nouns[0].T + nouns[1]).sigmoid(), names, words
    )


def merge_labels(imagenet: Any, own: Any, names: Sequence[str], words: Sequence[str]) -> list[tuple[str, ...]]:
    """As `name_features`, from the two heads' probabilities (N, 1000) and (N, W)."""
    made = []
    for first, second in zip(imagenet, own, strict=True):
        top = first.topk(LABELS)
        labels = [names[i] for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True) if p >= LEAST_LABEL]
        likely = second.topk(LABELS)
        labels += [
            words[i] for p, i in zip(likely.values.tolist(), likely.indices.tolist(), strict=True) if p >= LEAST_NOUN
        ]
        made.append(tuple(dict.fromkeys(labels or [names[int(first.argmax())]])))
    return made


def imagenet_names() -> list[str]:
    """The first name of each of ImageNet's 1,000 classes."""
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError as error:
        raise missing_extra("timm", "local") from error
    info = ImageNetInfo()
    return [str(info.index_to_description(index)).split(",")[0] for index in range(1000)]


@dataclass
class Reader:
    """Finds and reads text in pictures (RapidOCR: PP-OCR models inside its wheel, run by ONNX Runtime).

    Detection comes first; recognition runs only where it found something.
    """

    side: int = OCR_SIDE_PIXELS
    threads: int = 2
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @cached_property
    def engine(self) -> Any:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise missing_extra("rapidocr-onnxruntime", "local") from error
        # "max" leaves a picture in its size instead of blowing it up to 736 pixels: three times as fast on photos
        return RapidOCR(intra_op_num_threads=self.threads, det_limit_type="max", use_cls=False, print_verbose=False)

    def __call__(self, frame: Image.Image) -> str:
        """The words of an RGB picture in reading order, lines joined by blanks; "" where there are none."""
        return " ".join(str(line[1]) for line in self._lines(frame)[:OCR_LINES])

    def boxes(self, frame: Image.Image) -> list[list[list[float]]]:
        """The four corners (x, y) in pixels of every line of text."""
        return [line[0] for line in self._lines(frame)]

    def _lines(self, frame: Image.Image) -> list[Any]:
        factor = max(1.0, max(frame.size) / self.side)
        shrunk = (
            frame.resize((max(1, round(frame.width / factor)), max(1, round(frame.height / factor))))
            if factor > 1
            else frame
        )
        with self._lock:
            import numpy as np  # comes with the engine; the light install has neither

            found, _ = self.engine(np.asarray(shrunk), use_cls=False)
        lines = [[[[x * factor, y * factor] for x, y in line[0]], line[1]] for line in found or []]
        return sorted(
            lines, key=lambda line: (round(min(p[1] for p in line[0]) / (12 * factor)), min(p[0] for p in line[0]))
        )


@dataclass
class Sight:
    """Pictures -> `Seen`: labels from tower features, words from the reader."""

    reader: Reader
    classifier: tuple[Any, Any]
    nouns: tuple[Any, Any]
    names: Sequence[str]
    words: Sequence[str]

    @classmethod
    def load(cls, folder: Path, classifier: tuple[Any, Any]) -> Sight:
        """From the packaged folder: our own head (nouns.safetensors) and its words (nouns.json)."""
        from safetensors.torch import load_file

        own = load_file(folder / "nouns.safetensors")
        words: list[str] = json.loads((folder / "nouns.json").read_text())
        return cls(Reader(), classifier, (own["weight"].float(), own["bias"].float()), imagenet_names(), words)

    def __call__(self, frames: Sequence[Image.Image], pooled: Any) -> list[Seen]:
        """One `Seen` a frame; `pooled` (N, 1280) float32 are their mean tower features."""
        if not len(frames):
            return []
        labels = name_features(pooled, self.classifier, self.nouns, self.names, self.words)
        return [Seen(label, self.reader(frame)) for label, frame in zip(labels, frames, strict=True)]
