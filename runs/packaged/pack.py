"""The last stage: what ships, into src/vlmguard/packaged, in bfloat16, with the card's facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from runs.packaged import calibrate
from vlmguard.vlms.adapters import write_fingerprint

if TYPE_CHECKING:
    from runs.packaged.__main__ import Run

TARGET = Path(__file__).parents[2] / "src/vlmguard/packaged"


def pack(run: Run) -> None:
    TARGET.mkdir(exist_ok=True)
    head = run.get("nouns")
    _save({"weight": head["weight"], "bias": head["bias"]}, "nouns.safetensors")
    (TARGET / "nouns.json").write_text(json.dumps(head["words"]))
    for stage in ("assistant", "rewriter"):
        model, adapted, _ = run.adapted(run.get(stage))
        adapted.save_pretrained(TARGET / stage)
        _save(run.get(stage)["projector"], f"{stage}/projector.safetensors")
        for leftover in (TARGET / stage).glob("README*"):
            leftover.unlink()
        config = json.loads((TARGET / stage / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "vlmguard packaged base"
        (TARGET / stage / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        write_fingerprint(model, TARGET / stage)
    states = run.get("gate")
    names = [f"gate-{number}.safetensors" for number in range(len(states))]
    for name, state in zip(names, states, strict=True):
        _save(state["state"], name)
    cases = run.get("cases")
    held = [index for index, case in enumerate(cases) if case.held]
    networks = torch.stack([state["scores"][held, 0] for state in states]).mean(0)
    judged = torch.stack([networks, run.get("verdicts")[held]], 1)
    found = calibrate.fit(judged.tolist(), [cases[index] for index in held])
    gate = {
        "networks": names,
        "rank": calibrate.RANK,
        "weights": found.weights,
        "offsets": found.offsets,
        "doubt": calibrate.DOUBT,
        "expected": found.expected,
        "threshold": calibrate.THRESHOLD,
    }
    (TARGET / "gate.json").write_text(json.dumps(gate, indent=1))
    print(found)
    size = sum(path.stat().st_size for path in TARGET.rglob("*.safetensors"))
    print(f"{size / 2**20:.1f} MiB of weights in {TARGET.name}")


def _save(state: dict[str, Any], name: str) -> None:
    save_file({key: value.detach().to(torch.bfloat16).contiguous() for key, value in state.items()}, TARGET / name)
