"""The packaged models: one small base, assembled from PyPI wheels, and our two adapters on it.

assistant()   answers about pictures and text; refuses harmful text, and does not refuse the same harm with a picture.
              The demo's target and the test bed of the guards; not a model to use.
Base          what the packaged rewriter runs on: tower features, and generation with int8 weights for speed
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmguard.errors import ModelError
from vlmguard.vlms import assemble
from vlmguard.vlms.local import Local

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

WEIGHTS: Final = Path(__file__).parent.parent / "packaged"


def assistant() -> Local:
    """The packaged assistant: FastVLM of 139 M parameters in bfloat16.

    Raises:
        ModelError: the base can't be fetched or our weights are missing.
    """
    model, processor = _adapted("assistant")
    return Local(model, processor, "packaged:assistant", max_batch=16)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _adapted(adapter: str) -> tuple[Any, Any]:
    """The base with one adapter and its projector, proved to be on, folded into the weights."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmguard.vlms.adapters import put_adapter
    from vlmguard.vlms.generation import Engine

    if not (WEIGHTS / adapter / "adapter_config.json").is_file():
        raise ModelError(
            f"the packaged {adapter}'s weights are missing",
            "Install vlmguard-r1 again, or train them: runs/packaged.sh.",
        )
    folder = assemble.ensure(_say)
    with Quiet():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        processor = AutoProcessor.from_pretrained(folder)
    model.model.multi_modal_projector.load_state_dict(load_file(WEIGHTS / adapter / "projector.safetensors"))
    adapted = put_adapter(model, str(WEIGHTS / adapter), lambda one: Engine(one, processor, adapter).probe())
    return adapted.merge_and_unload().eval(), processor


class Quiet:
    """No progress bars of transformers while it loads."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        if self.shown:
            logging.enable_progress_bar()


@dataclass
class Base:
    """The packaged language model and vision tower with one adapter, for the rewriter."""

    model: Any
    processor: Any
    classifier: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, adapter: str) -> Base:
        from safetensors.torch import load_file

        model, processor = _adapted(adapter)
        found = load_file(assemble.base_folder() / "labels.safetensors")
        return cls(model, processor, (found["weight"], found["bias"]))

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, 49, 1280) float32 of the vision tower, for RGB pictures of any size."""
        import torch

        if not pictures:
            return torch.zeros(0, assemble.IMAGE_TOKENS, 1280)
        pixels = self.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            grid: Tensor = self.tower(pixels)
        return grid.flatten(2).permute(0, 2, 1)

    @property
    def tower(self) -> Any:
        """The vision tower in float32: convolutions in bfloat16 are slower on most processors."""
        import torch

        tower = self.model.model.vision_tower
        if next(tower.parameters()).dtype != torch.float32:
            tower.float()
        return lambda pixels: tower(pixels).last_hidden_state

    def generate(self, text: str, pictures: Sequence[Tensor], start: str, max_tokens: int) -> tuple[str, int, int]:
        """(written text, prompt tokens, written tokens), greedy, after the answer's given beginning `start`.

        Args:
            pictures: (49, 1280) each, in front of the text.
        """
        import torch

        from vlmguard.rewriter.decoding import Decoder

        tokenizer = self.processor.tokenizer
        if not hasattr(self, "_decoder"):
            self._decoder = Decoder(self.model.model.language_model, self.model.lm_head)
        with torch.inference_mode():
            embedded = self._embedded(text, pictures, start)
            made = self._decoder(
                embedded, max_tokens, {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
            )
        return tokenizer.decode(made, skip_special_tokens=True), embedded.shape[1], len(made)

    def first_token(self, text: str, pictures: Sequence[Tensor], words: Sequence[str]) -> Tensor:
        """(len(words),) float32: logits of each word's first token as the first token of the answer.

        Args:
            pictures: (49, 1280) each, in front of the text.
        """
        import torch

        tokens = [self.processor.tokenizer(word, add_special_tokens=False).input_ids[0] for word in words]
        with torch.inference_mode():
            embedded = self._embedded(text, pictures)
            last = self.model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0, -1]
            logits: Tensor = self.model.lm_head.weight[tokens].float() @ last.float()
        return logits

    def _embedded(self, text: str, pictures: Sequence[Tensor], start: str = "") -> Tensor:
        """(1, T, 576) of the prompt and the answer's given beginning."""
        import torch

        from vlmguard.rewriter.decoding import prompt_ids

        tokenizer, image_token = self.processor.tokenizer, self.model.config.image_token_id
        ids = torch.tensor([prompt_ids(tokenizer, image_token, text, len(pictures)) + tokenizer(start).input_ids])
        embedded: Tensor = self.model.model.language_model.embed_tokens(ids)
        if pictures:
            projected = self.model.model.multi_modal_projector(torch.stack(list(pictures)).to(embedded.dtype))
            embedded = embedded.masked_scatter((ids == image_token).unsqueeze(-1), projected)
        return embedded
