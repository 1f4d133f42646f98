"""Tiny random vision-language models, one a family, built offline from their configs and saved as a
checkpoint folder.

They answer nonsense, deterministically: enough to prove batching, hooks, adapters and processors on every
real code path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    TimmWrapperConfig,
)

HIDDEN, LAYERS, CONTEXT = 32, 2, 2048
SENTENCES = (
    "safe risky yes no the request is harmful and the picture shows a knife",
    " safe risky yes no what is in this picture? describe the image in one word",
    "system user assistant You are a helpful assistant. a cat sits on a red chair",
)

# ChatML with pictures in place; each family puts its own placeholder for IMAGE.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens that knows ChatML and the given special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=named,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *special],
    )


def _text(words: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words), "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id,
    } | more  # fmt: skip


def fast_vlm() -> tuple[Any, Any]:
    """As the packaged base is made: a timm tower, 49 image tokens for 224 pixels; the layers of Llama."""
    words = tokenizer("<image>")
    config = FastVlmConfig(
        text_config=LlamaConfig(**_text(words)).to_dict(),
        vision_config=TimmWrapperConfig(
            architecture="tf_efficientnet_lite0",
            do_pooling=False,
            hidden_size=1280,
            num_classes=0,
            model_args={"in_chans": 3},
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    model = FastVlmForConditionalGeneration(config)
    _wake(model.model.vision_tower)
    return model, _llava_processor(words, 224, 32)


def _wake(tower: torch.nn.Module) -> None:
    """Set batch-norm statistics from noise: a random tower with the default ones gives nearly nothing."""
    norms = [module for module in tower.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        tower.train()(torch.randn(2, 3, 64, 64))
    tower.eval()


def llava() -> tuple[Any, Any]:
    words = tokenizer("<image>")
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(words)),
        vision_config=CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
        ),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config), _llava_processor(words, 56, 14, additional=1)


def _llava_processor(words: PreTrainedTokenizerFast, side: int, patch: int, additional: int = 0) -> LlavaProcessor:
    pixels = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=words,
        patch_size=patch,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=additional,
        chat_template=TEMPLATE.replace("IMAGE", "<image>\\n"),
    )


def _idefics(config: Any, model: Any, processor: Any, pixels: Any, **more: Any) -> tuple[Any, Any]:
    marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    words = tokenizer(*marks, *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)))
    built = config(
        text_config=LlamaConfig(**_text(words)).to_dict(),
        vision_config={
            "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        scale_factor=2,
    )  # fmt: skip
    images = pixels(do_image_splitting=True, size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    template = TEMPLATE.replace("IMAGE", "<image>")
    return model(built), processor(images, words, image_seq_len=4, chat_template=template, **more)


def idefics3() -> tuple[Any, Any]:
    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, Idefics3ImageProcessor)


def smolvlm() -> tuple[Any, Any]:
    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, Idefics3Processor, Idefics3ImageProcessor)


def _qwen(config: Any, model: Any, processor: Any, video: Any, vision: dict[str, Any], **text: Any) -> tuple[Any, Any]:
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    marks = {"image": "image_pad", "video": "video_pad"} | dict.fromkeys(("vision_start", "vision_end"), "")
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{mark or name}|>") for name, mark in marks.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    built = config(text_config=_text(words, rope_parameters=rope, **text), vision_config=vision, **ids)
    patch = vision["patch_size"]
    pixels = Qwen2VLImageProcessor(
        patch_size=patch,
        merge_size=2,
        size={"shortest_edge": 4 * patch * patch, "longest_edge": 64 * patch * patch},
    )
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return model(built), processor(pixels, words, video(), chat_template=template)


def qwen2_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2,
        "embed_dim": HIDDEN,
        "hidden_size": HIDDEN,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, Qwen2VLVideoProcessor, vision)


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2, "hidden_size": HIDDEN, "out_hidden_size": HIDDEN, "num_heads": 4, "intermediate_size": 64,
        "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        vision,
    )


def qwen3_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2, "hidden_size": HIDDEN, "out_hidden_size": HIDDEN, "num_heads": 4, "intermediate_size": 64,
        "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _qwen(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        vision,
        head_dim=8,
    )


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "fast_vlm": fast_vlm,
    "llava": llava,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}


def build(family: str) -> tuple[Any, Any]:
    """A model in float32 with spread-out random weights (so that its answers differ with the question) and
    its processor."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "vision_tower" not in name:
                weight.normal_(0, 0.2)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.float().eval(), processor


@cache
def _saved(family: str, folder: Path) -> Path:
    model, processor = build(family)
    model.save_pretrained(folder / family)
    processor.save_pretrained(folder / family)
    return folder / family


def save(family: str, folder: Path) -> Path:
    """The family's checkpoint under `folder`, written once a folder."""
    return _saved(family, folder)
