"""Greedy decoding of a small Llama on a CPU: prefill by transformers in bfloat16, then steps on int8 weights.

A step of one token is bound by the bytes of the weights, so they are kept a second time in int8 with one scale a row; and by
Python's calls, so a step is written out here with as few as it takes. `bench/rewriter.py` measures it beside `generate`.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_TOKENS = 49
ROWS_AT_ONCE = 4096


def prompt_ids(tokenizer: Any, image_token: int, text: str, pictures: int) -> list[int]:
    """Token ids of one user turn in the packaged chat template: the pictures, the text as plain data, the answer's place."""

    def ids(piece: str, special: bool) -> list[int]:
        found: list[int] = tokenizer(piece, add_special_tokens=False, split_special_tokens=not special).input_ids
        return found

    made = ids("<|im_start|>user\n", True)
    for _ in range(pictures):
        made += [image_token] * IMAGE_TOKENS + ids("\n", False)
    return made + ids(text, False) + ids("<|im_end|>\n<|im_start|>assistant\n", True)


class Int8:
    """x W^T with W (N, K) as int8 and one scale a row; x bfloat16."""

    def __init__(self, *weights: Tensor) -> None:
        scales, rounded = [], []
        for weight in weights:
            for piece in torch.split(
                weight.detach(), ROWS_AT_ONCE
            ):  # in float32 only a piece at a time: the head is large
                scale = piece.abs().amax(1).float().clamp(min=1e-8) / 127
                rounded.append((piece.float() / scale[:, None]).round().to(torch.int8))
                scales.append(scale.to(torch.bfloat16))
        self.weight, self.scale = torch.cat(rounded), torch.cat(scales)

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)


class Decoder:
    """Greedy continuation of embedded prompts by a LlamaModel and its head, one at a time."""

    def __init__(self, model: Any, head: Any) -> None:
        self.model, self.head = model, head
        config = model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.epsilon = config.rms_norm_eps
        self.layers = [_Layer(layer) for layer in model.layers]
        self.int8_head = Int8(head.weight)

    def __call__(self, embedded: Tensor, max_tokens: int, stops: Set[int]) -> list[int]:
        """Token ids after `embedded` (1, T, d) bfloat16, without the stop token."""
        from transformers import DynamicCache

        length = embedded.shape[1]
        cache = DynamicCache()
        hidden = self.model(inputs_embeds=embedded, cache=cache, use_cache=True).last_hidden_state[:, -1]
        token = int(self.head(hidden).argmax())
        room = length + max_tokens
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for layer in cache.layers:
            for store, have in ((keys, layer.keys), (values, layer.values)):
                full = have.new_zeros(1, self.groups, room, self.size)
                full[:, :, :length] = have
                store.append(full)
        positions = torch.arange(room)[None]
        cosines, sines = self.model.rotary_emb(embedded, positions)
        made: list[int] = []
        while token not in stops and len(made) < max_tokens:
            made.append(token)
            if len(made) == max_tokens:
                break
            at = length + len(made) - 1
            hidden = self._step(
                self.model.embed_tokens.weight[token][None], at, cosines[:, at], sines[:, at], keys, values
            )
            token = int(self.int8_head(hidden).argmax())
        return made

    def _step(
        self, hidden: Tensor, at: int, cosine: Tensor, sine: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """The hidden state (1, d) after one more token at position `at`; its key and value go into the caches."""
        count, groups, size = self.heads, self.groups, self.size
        for layer, key, value in zip(self.layers, keys, values, strict=True):
            mixed = layer.qkv(functional.rms_norm(hidden, hidden.shape[-1:], layer.norm_in, self.epsilon)).view(
                1, count + 2 * groups, 1, size
            )
            turned = mixed[:, : count + groups]
            turned = turned * cosine + torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1) * sine
            key[:, :, at] = turned[:, count:, 0]
            value[:, :, at] = mixed[:, count + groups :, 0]
            seen = functional.scaled_dot_product_attention(
                turned[:, :count], key[:, :, : at + 1], value[:, :, : at + 1], enable_gqa=True
            )
            hidden = hidden + layer.out(seen.reshape(1, -1))
            gate, up = layer.gate_up(
                functional.rms_norm(hidden, hidden.shape[-1:], layer.norm_out, self.epsilon)
            ).chunk(2, -1)
            hidden = hidden + layer.down(functional.silu(gate) * up)
        return functional.rms_norm(hidden, hidden.shape[-1:], self.model.norm.weight, self.epsilon)


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = Int8(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        self.out = Int8(attention.o_proj.weight)
        self.gate_up = Int8(mlp.gate_proj.weight, mlp.up_proj.weight)
        self.down = Int8(mlp.down_proj.weight)
        self.norm_in, self.norm_out = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
