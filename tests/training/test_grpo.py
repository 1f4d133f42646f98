import doctest
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests import tiny
from tests.stand_ins import read_lines, write_lines
from vlmguard import load
from vlmguard.errors import AdapterError, ConfigError, VLMGuardError
from vlmguard.rewriter.protocol import Analysis, Rewrite, render_output
from vlmguard.synthesis.sample import Row
from vlmguard.training import curves, grpo_loop
from vlmguard.training.curves import draw, read_curves
from vlmguard.training.grpo import GRPO, _start, train_grpo
from vlmguard.training.grpo_loop import Examples, graded, learn, peft_quiet, schedule, wanted
from vlmguard.training.models import language_layers, load_base, lora
from vlmguard.training.rows import Rows, read
from vlmguard.training.sft import save, write_rewriter
from vlmguard.vlms.prompts import Prompter

# PEFT 0.21 asks transformers 5.24 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RISKY = render_output(
    Rewrite(1.0, "ethics", Analysis("A pose.", "A cliff.", "A fall."), "Which pose looks best far from the edge?")
)
MODELS = """
from vlmguard.errors import Timeout
from vlmguard.evaluation.judges.protocol import Judgement
from vlmguard.vlms.scripted import Scripted

closed = []
target = Scripted("Stay well back.")

class Judge:
    name = "strict"
    async def __call__(self, chat, answer):
        return Judgement(8.0, 5.0)
    async def aclose(self):
        closed.append(self.name)

class Gone(Scripted):
    def __init__(self):
        super().__init__(lambda chat: Timeout("no answer in 60 s"), name="gone")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a dataset of twelve rows, and a target and a judge in a file."""
    folder = tmp_path_factory.mktemp("grpo")
    tiny.save("llava", folder)
    Image.new("RGB", (56, 56), "teal").save(folder / "a.png")
    rows = [
        Row(
            f"row-{at}",
            ({"path": "a.png", "sha256": ""},) * (at % 3),
            f"Which pose, number {at}?",
            "safe" if at % 2 else RISKY,
            "helpfulness" if at % 2 else "safety",
            {"name": "made-up", "licence": "CC0"},
        )
        for at in range(12)
    ]
    write_lines(folder / "dataset.jsonl", *(row.fields() for row in rows))
    (folder / "models.py").write_text(MODELS)
    return folder


@pytest.fixture(scope="module")
def sft(place: Path) -> Path:
    """What an SFT run leaves."""
    from peft import get_peft_model

    out = place / "sft"
    base = load_base(str(place / "llava"), "float32")
    with peft_quiet():
        model = get_peft_model(base.model, lora(base, 4, 8, 0.0))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    save(model, base, out)
    write_rewriter(out, str(place / "llava"), 0.5, instructed=False)
    (out / "run.json").write_text(json.dumps({"held_out": 0.3, "half": False}))
    return out


@pytest.fixture
def learnable(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the rewards in a form that what a tiny model writes, which is nonsense, can differ in."""

    def short_enough(**given: Any) -> list[float | None]:
        return varied(**given)

    monkeypatch.setattr("vlmguard.training.grpo.short_enough", short_enough)


def options(place: Path, out: Path, **told: Any) -> GRPO:
    given: dict[str, Any] = {"base": str(place / "sft"), "target": f"{place / 'models.py'}:target"}
    given |= {"judge": f"{place / 'models.py'}:Judge", "steps": 2, "generations": 4, "batch": 2, "lr": 1e-3}
    given |= {"max_completion_tokens": 8}
    return GRPO(place, out=out, **{**given, **told})


def test_the_examples_hold() -> None:
    assert [doctest.testmod(module).failed for module in (curves, grpo_loop)] == [0, 0]
    assert doctest.testmod(curves).attempted == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps: expected a whole number from 1, got 0"),
        ({"generations": 1}, "generations: expected a whole number from 2"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
        ({"beta": math.nan}, "beta: expected a number from 0"),
        ({"weights": {"answer": 1.0}}, "weights: expected names of well_formed.*got 'answer'"),
        ({"weights": {"answered": -1.0}}, "weights: expected numbers from 0"),
        ({"weights": {"answered": 0.0}}, "nothing to learn"),
    ],
)
def test_a_wrong_option_is_refused_at_once(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options(tmp_path, tmp_path, **wrong)


@pytest.mark.usefixtures("learnable")
def test_an_adapter_is_trained_further_saved_proved_and_told_of(place: Path, sft: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    said: list[str] = []
    done = train_grpo(options(place, tmp_path), said.append)
    assert done is not None
    assert done.steps == 2
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (sft, tmp_path))
    assert before.keys() == after.keys()  # the same adapter, and no reference beside it
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert not (tmp_path / "ref").exists()
    held = [sum(row.risky == kind for row in read(place).split(0.3)[1]) for kind in (True, False)]
    assert [done.calibration.risky + done.calibration.harmless + done.calibration.unreadable] == [sum(held)]
    assert load.rewriter(str(tmp_path)).threshold == done.calibration.threshold

    lines = read_lines(tmp_path / "rewards.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    names = {"well_formed", "right_verdict", "answered", "intent_kept", "short_enough"}
    assert all(line["rewards"].keys() == names for line in lines)
    assert all(line["kl"] is not None for line in lines)
    assert (tmp_path / "rewards.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "README.md").read_text()
    assert "`vlmguard train grpo`" in card
    assert "| answered | 1 |" in card
    assert "CC0" in card
    assert "step 2 of 2: well_formed 0.00, right_verdict 0.00" in said[-2]
    assert load.named(f"{place / 'models.py'}:closed")[-1] == "strict"


@pytest.mark.usefixtures("learnable")
def test_of_several_processes_one_alone_writes(
    place: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    said: list[str] = []
    assert train_grpo(options(place, tmp_path, steps=1, weights={"short_enough": 1.0}), said.append) is None
    assert not said
    assert not {"run.json", "adapter_config.json", "rewriter.json"} & {path.name for path in tmp_path.iterdir()}


def test_a_base_model_gets_an_adapter_and_the_instructions(place: Path, tmp_path: Path) -> None:
    told = {
        "base": str(place / "llava"),
        "beta": 0.0,
        "rank": 4,
        "half": True,
        "weights": {"short_enough": 1.0, "well_formed": 1.0},
    }
    with pytest.raises(VLMGuardError, match="changes nothing"):  # all its rewards are equal
        train_grpo(options(place, tmp_path, target="never", judge="asked", steps=1, **told))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert read_curves(tmp_path / "rewards.jsonl")[0]["rewards"].keys() == {"short_enough", "well_formed"}


def test_a_run_in_which_all_completions_earn_the_same_is_none(place: Path, sft: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nothing was learned"):
        train_grpo(options(place, tmp_path, steps=1, beta=0.0, weights={"well_formed": 1.0}))


def test_what_an_sft_run_held_out_stays_so_over_several_runs(place: Path, sft: Path, tmp_path: Path) -> None:
    first, as_sft, adapter = _start(options(place, tmp_path))
    assert (first.held_out, first.half, as_sft.instructed, adapter) == (0.3, False, False, sft)
    (tmp_path / "rewriter.json").write_text((sft / "rewriter.json").read_text())
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / "run.json").write_text(json.dumps(first.told()))
    second, as_sft, adapter = _start(options(place, tmp_path / "second", base=str(tmp_path)))
    assert (second.held_out, second.half, as_sft.base, adapter) == (0.3, False, str(place / "llava"), tmp_path)
    plain, as_sft, adapter = _start(options(place, tmp_path, base="hf:some/model"))
    assert (plain.held_out, plain.half, as_sft.instructed, adapter) == (0.1, True, True, None)


def test_a_target_that_is_gone_ends_the_run_and_closes_the_judge(
    place: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = load.named(f"{place / 'models.py'}:closed")
    count = len(closed)
    monkeypatch.setattr("vlmguard.training.rewards.said", Written(RISKY))
    gone = options(place, tmp_path, target=f"{place / 'models.py'}:Gone", steps=9)
    with pytest.raises(VLMGuardError, match="3 batches in a row: no answer"):
        train_grpo(gone)
    assert len(closed) == count + 1
    assert not (tmp_path / "adapter_config.json").exists()


class Written:
    """In place of what a tiny model writes."""

    def __init__(self, text: str) -> None:
        self.text, self.count = text, 0

    def __call__(self, _: object) -> str:
        self.count += 1
        return self.text.replace("far", f"{self.count} steps")


@pytest.mark.usefixtures("learnable")
def test_a_run_goes_on_where_it_was(place: Path, sft: Path, tmp_path: Path) -> None:
    """Interrupted and gone on with, its adapter and curves are those of a run that was not."""
    from safetensors.torch import load_file

    def interrupted(line: str) -> None:
        if line.startswith("step 3"):
            raise KeyboardInterrupt

    whole, cut = (
        options(place, tmp_path / name, steps=4, lr=1e-2, weights={"short_enough": 1.0}) for name in ("whole", "cut")
    )
    train_grpo(whole)
    with pytest.raises(KeyboardInterrupt):
        train_grpo(cut, interrupted)
    assert [one["step"] for one in read_curves(cut.out / "rewards.jsonl")] == [1, 2, 3]
    with pytest.raises(ConfigError, match="holds a run already"):
        train_grpo(cut)
    with pytest.raises(ConfigError, match="other lr"):
        train_grpo(replace(cut, resume=True, lr=1.0))
    torn = cut.out / "checkpoint-4"  # what a kill leaves
    torn.mkdir()
    train_grpo(replace(cut, resume=True))
    first, second = ([one["reward"] for one in read_curves(run.out / "rewards.jsonl")] for run in (whole, cut))
    assert second == pytest.approx(first)
    ours, theirs = (load_file(run.out / "adapter_model.safetensors") for run in (whole, cut))
    assert all(torch.allclose(ours[name], theirs[name]) for name in ours)


def varied(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
    """The share of even tokens: something that any model can learn."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def policy(family: str) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model

    model, processor = tiny.build(family)
    torch.manual_seed(0)
    with peft_quiet():
        return get_peft_model(model, LoraConfig(r=8, target_modules=language_layers(model))), processor


SHOWN = [0, 1, 2, 0, 1, 2]


def rows(count: int = 6) -> list[Mapping[str, Any]]:
    picture = {"type": "image", "image": Image.new("RGB", (56, 56), "teal")}
    return [
        {"prompt": [{"role": "user", "content": [*[picture] * (at % 3), {"type": "text", "text": f"what {at}"}]}]}
        for at in range(count)
    ]


@pytest.mark.slow
def test_a_reward_moves_the_policy_and_none_leaves_it(tmp_path: Path) -> None:
    shares: dict[str, list[float]] = {"rewarded": [], "control": []}

    def watched(name: str, worth: float) -> Callable[..., list[float | None]]:
        def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
            found = varied(completion_ids)
            shares[name].append(sum(one or 0.0 for one in found) / len(found))
            return [(one or 0.0) * worth for one in found]

        return reward

    for name, worth in (("rewarded", 1.0), ("control", 0.0)):
        given: dict[str, Any] = {"steps": 30, "generations": 16, "batch": 1, "lr": 5e-2, "beta": 0.0}
        told = options(tmp_path, tmp_path / name, max_completion_tokens=2, **given)
        learn(*policy("llava"), rows(), SHOWN, {watched(name, worth): 1.0}, told)
    rewarded, control = (sum(found[-8:]) / 8 for found in shares.values())
    assert shares["rewarded"][0] == shares["control"][0]  # they begin alike
    assert rewarded > 0.7
    assert 0.35 < control < 0.65
    draw(read_curves(tmp_path / "rewarded" / "rewards.jsonl"), tmp_path / "plot.png")


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_rows_with_none_one_and_two_pictures_are_learned_from(family: str, tmp_path: Path) -> None:
    told = options(tmp_path, tmp_path, steps=6, generations=2, batch=2, lr=1e-3)
    done = learn(*policy(family), rows(), SHOWN, {varied: 1.0}, told)
    assert done.steps == 6
    assert done.tokens > 0


def test_every_batch_has_rows_of_equally_many_pictures_and_every_row_its_turn() -> None:
    pictures = [0] * 10 + [1] * 25 + [3] * 2
    order = schedule(pictures, steps=3000, batch=4, seed=7)
    assert len(order) == 12_000
    assert all(len({pictures[row] for row in order[at : at + 4]}) == 1 for at in range(0, len(order), 4))
    turns = Counter(order)
    assert all(200 < turns[row] < 450 for row in range(37))  # 12,000 / 37 = 324
    assert order == schedule(pictures, steps=3000, batch=4, seed=7)
    assert order != schedule(pictures, steps=3000, batch=4, seed=8)
    assert schedule([1], steps=1, batch=3, seed=0) == [0, 0, 0]


def test_a_judgement_that_cannot_be_read_neither_helps_nor_harms(tmp_path: Path) -> None:
    """In a plain sum of rewards a None would count as a 0, the worst of all."""
    seen: list[list[float]] = []

    def scored(completions: Sequence[object], **_: Any) -> list[float | None]:
        return [1.0, 0.5, None, 0.0]

    from trl import GRPOTrainer

    original = GRPOTrainer._generate_and_score_completions

    def watch(self: Any, inputs: Any) -> Any:
        made = original(self, inputs)
        seen.append(made["advantages"].tolist())
        return made

    def other(completions: Sequence[object], **_: Any) -> list[float | None]:
        return [0.5, 0.5, 0.5, 0.5]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_and_score_completions", watch)
        told = options(tmp_path, tmp_path, steps=1, generations=4, batch=1)
        learn(*policy("llava"), rows(1), [0], {scored: 1.0, other: 1.0}, told)
    best, middle, unread, worst = seen[0]
    assert best > 0 > worst
    assert unread == pytest.approx(middle, abs=1e-4) == pytest.approx(0.0, abs=1e-4)


def test_where_all_earn_the_same_nothing_is_learned(tmp_path: Path) -> None:
    """Groups of 7 equal rewards each, 0.3 and 0.225: their means, rounded, would be others than the rewards."""
    seen: list[float] = []

    def equal(request: Sequence[float], **_: Any) -> list[float | None]:
        return list(request)

    from trl import GRPOTrainer

    original = GRPOTrainer._generate_and_score_completions

    def watch(self: Any, inputs: Any) -> Any:
        made = original(self, inputs)
        seen.extend(made["advantages"].tolist())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_and_score_completions", watch)
        told = options(tmp_path, tmp_path, steps=1, generations=7, batch=2, max_completion_tokens=1)
        given = [{**row, "request": worth} for row, worth in zip((rows()[1], rows()[4]), (0.3, 0.225), strict=True)]
        learn(*policy("llava"), given, [1, 1], {equal: 1.0}, told)
    assert len(seen) == 14
    assert not any(seen)


def test_a_reward_is_told_what_ran_out_of_tokens() -> None:
    end, most = 2, 3
    told: list[Any] = []

    def reward(cut: Sequence[bool], **_: Any) -> list[float | None]:
        told.append(list(cut))
        return [0.1, None, 1.0, 0.0]

    found = graded(reward, most, {end})(completion_ids=[[5, 5, 5], [5, 5, end], [5, end], [end]], prompts=[])
    assert told == [[True, False, False, False]]
    assert found == [102 / 1024, None, 1.0, 0.0]
    assert graded(reward, most, {end}).__name__ == "reward"


@pytest.mark.parametrize("family", ["fast_vlm", "llava", "qwen2_vl", "qwen2_5_vl", "smolvlm"])
def test_the_policy_reads_what_the_guard_sends(family: str, place: Path) -> None:
    _, processor = tiny.build(family)
    found = read(place)
    examples = Examples(found, found.rows, Prompter(processor, None, family), instructed=True)
    examples.check(4)
    assert len(examples) == 12
    one = examples[2]
    assert (one["row"], one["risky"], one["request"]) == ("row-2", True, "Which pose, number 2?")
    assert one["wanted"] == "A pose. A cliff. Which pose, number 2?"
    assert wanted(found.rows[1]) == "Which pose, number 1?"


def test_another_prompt_than_the_guards_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = tiny.build("llava")
    found: Rows = read(place)
    examples = Examples(found, found.rows, Prompter(processor, None, "llava"), instructed=False)
    monkeypatch.setattr(Examples, "messages", lambda *_: [{"role": "user", "content": [{"type": "text", "text": "?"}]}])
    with pytest.raises(ConfigError, match="in another way than the guard"):
        examples.check()


def test_curves_are_kept_up_to_the_step_that_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    write_lines(path, *({"step": step, "rewards": {}} for step in (1, 2, 3)))
    with path.open("a") as file:
        file.write('{"step": 4, "rew')
    curves._forget_after(path, 2)
    assert [one["step"] for one in read_lines(path)] == [1, 2]
    curves._forget_after(path, 0)
    assert read_curves(path) == []
