"""Vision-language models, one backend a file; `protocol.py` says what each must do."""

# The forms of a VLM's name, for `vlmguard.load.vlm` and its error messages.
VLMS: dict[str, str] = {
    "packaged:assistant": "the small assistant that comes with VLMGuard",
    "packaged:rewriter": "the small rewriter that comes with VLMGuard",
    "http://HOST/v1#MODEL": "a model behind an OpenAI-compatible server (https:// too)",
    "hf:ID": "a model of the Hugging Face hub or a folder, in this process",
    "hf:ID+ADAPTER": "the same with a PEFT adapter",
    "FOLDER": "a checkpoint folder with a config.json",
    "scripted:TEXT": "answers TEXT to everything, for trying out",
    "FILE.py:NAME": "your own: a VLM, or what gives one when called without arguments",
    "PACKAGE.MODULE:NAME": "the same, from an installed package",
}
