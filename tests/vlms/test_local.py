"""Local models on tiny random ones: every family, batching, steering, and what a request may ask for."""

import asyncio
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import tiny
from vlmguard.chat import Chat, Response
from vlmguard.errors import BadRequest, ConfigError, ContextTooLong, ModelError, TargetError
from vlmguard.vlms.local import Local
from vlmguard.vlms.prompts import merged
from vlmguard.vlms.steering import Contrast, Patch, Rows, decoder_layers


def picture(seed: int, width: int = 60, height: int = 90) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(text: str, shown: int | None = None, **extra: Any) -> Chat:
    """A chat of 10 tokens at most, with the picture of seed `shown`."""
    extra.setdefault("max_tokens", 10)
    return Chat.of(text, [] if shown is None else [picture(shown)], **extra)


def made(family: str, **options: Any) -> Local:
    model, processor = tiny.build(family)
    return Local(model, processor, family, **options)


@pytest.fixture(scope="module")
def llava() -> Local:
    return made("llava")


@pytest.fixture(params=tiny.FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Local:
    folder = tmp_path_factory.getbasetemp() / "tiny"
    return Local.load(tiny.save(request.param, folder), device="cpu")


# Every family


async def test_a_batch_answers_as_each_call_alone(family: Local) -> None:
    chats = [
        ask("what is in this picture?", 0),
        ask("describe", 1),
        ask("is it safe or risky? say yes or no", 2, system="You are a helpful assistant."),
        Chat.of("two pictures", [picture(3), picture(4, 120, 50)], max_tokens=10),
        ask("no picture"),
        ask("no picture either, but a longer text"),
    ]
    alone = [await family(chat) for chat in chats]
    together = await asyncio.gather(*(family(chat) for chat in chats))
    assert [response.text for response in together] == [response.text for response in alone]
    assert len({response.text for response in alone}) > 1
    assert all(response.usage.calls == 1 for response in together)
    assert [response.usage.prompt_tokens for response in together] == [it.usage.prompt_tokens for it in alone]


async def test_the_picture_reaches_the_model(family: Local) -> None:
    first, other, again = [(await family.hidden_states(ask("what is it?", seed), [-1]))[-1][-1] for seed in (0, 1, 0)]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


async def test_hidden_states_are_those_of_transformers(family: Local) -> None:
    chat = ask("what is it?", 5)
    states = await family.hidden_states(chat, [0, 1])
    prompt = family._engine.prompt(chat)
    with torch.no_grad():
        reference = family.model(**prompt.tensors, output_hidden_states=True).hidden_states
    assert states[0].shape == (prompt.tokens, tiny.HIDDEN)
    if family.name == "qwen3_vl":  # it adds vision features after the first layers
        assert torch.allclose(states[0][-1], reference[1][0, -1], atol=1e-5)
    else:
        assert torch.allclose(states[0], reference[1][0], atol=1e-5)


async def test_a_pixel_gradient_is_the_slope_of_the_loss(family: Local) -> None:
    chat = ask("what is it?", 6)
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(picture(6))))).permute(2, 0, 1).float() / 255
    loss, (gradient,) = await family.pixel_gradient(chat, "yes", images=[image])
    assert gradient.shape == image.shape
    step = 0.001 / gradient.norm() * gradient
    lower, _ = await family.pixel_gradient(chat, "yes", images=[image - step])
    higher, _ = await family.pixel_gradient(chat, "yes", images=[image + step])
    slope = (higher - lower) / (2 * 0.001)
    assert slope == pytest.approx(float(gradient.norm()), rel=0.1)
    assert lower < loss < higher
    own, processed = await family.pixel_gradient(chat, "yes")
    assert processed.shape == family._engine.prompt(chat).tensors["pixel_values"].shape
    assert own > 0
    assert processed.abs().max() > 0


# What a request may ask for


async def test_max_tokens_and_its_newer_name(llava: Local) -> None:
    short = await llava(ask("count", max_tokens=3))
    assert (short.usage.completion_tokens, short.finish_reason) == (3, "length")
    newer = await llava(ask("count", max_tokens=9, max_completion_tokens=2))
    assert newer.usage.completion_tokens == 2


async def test_stop_ends_before_the_text_and_never_shows_its_beginning(llava: Local) -> None:
    whole = (await llava(ask("stop here", 1, max_tokens=20))).text
    stop = whole[6:9]
    pieces = [piece async for piece in llava.stream(ask("stop here", 1, max_tokens=20, stop=[stop, "never"]))]
    response = pieces[-1]
    assert isinstance(response, Response)
    assert response.text == whole[: whole.index(stop)] == "".join(map(str, pieces[:-1]))
    assert response.finish_reason == "stop"


async def test_end_of_sequence_stops(llava: Local) -> None:
    end = llava.processor.tokenizer.eos_token_id

    def say_end(ids: Tensor, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([end]), 0.0)

    response = await llava(ask("go", logprobs=True), processors=[say_end])
    assert (response.text, response.finish_reason, response.usage.completion_tokens) == ("", "stop", 1)
    assert response.logprobs == ()


async def test_a_seed_gives_one_answer_whatever_the_batch(llava: Local) -> None:
    chats = [ask("tell", 1, temperature=1.5, top_p=0.9, seed=seed) for seed in range(6)]
    alone = [(await llava(chat)).text for chat in chats]
    together = [response.text for response in await asyncio.gather(*map(llava, chats))]
    assert together == alone
    assert len(set(alone)) == 6
    assert (await llava(chats[0], seed=5)).text == alone[5]


async def test_without_a_seed_samples_differ(llava: Local) -> None:
    chat = ask("tell", temperature=2)
    assert len({response.text for response in await asyncio.gather(*[llava(chat) for _ in range(6)])}) > 1


async def test_a_small_top_p_is_greedy(llava: Local) -> None:
    greedy = await llava(ask("tell", 1))
    assert (await llava(ask("tell", 1, temperature=1, top_p=1e-6))).text == greedy.text


async def test_logprobs_are_those_of_the_whole_vocabulary(llava: Local) -> None:
    response = await llava(ask("tell", 1, logprobs=True, top_logprobs=3))
    ended = response.finish_reason == "stop"  # by a token that is no text
    assert len(response.logprobs) == response.usage.completion_tokens - ended
    for entry in response.logprobs:
        assert list(entry.top.values()) == sorted(entry.top.values(), reverse=True)
        assert entry.logprob == max(entry.top.values())
    with torch.no_grad():
        logits = llava.model(**llava._engine.prompt(ask("tell", 1)).tensors).logits[0, -1]
    assert response.logprobs[0].logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


async def test_first_token_counts_both_spellings(llava: Local) -> None:
    chat = ask("is it safe?", 1)
    found = await llava.first_token(chat, ["safe", "risky"])
    with torch.no_grad():
        share = llava.model(**llava._engine.prompt(chat).tensors).logits[0, -1].softmax(-1)
    words = llava.processor.tokenizer
    for choice, probability in found.items():
        tokens = {words.encode(choice)[0], words.encode(f" {choice}")[0]}
        assert len(tokens) == 2
        assert probability == pytest.approx(float(share[list(tokens)].sum()), rel=1e-3)
    with pytest.raises(ConfigError, match="the same token"):
        await llava.first_token(chat, ["safe", "safely"])


@pytest.mark.parametrize(
    "extra",
    [
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"temperature": -1},
        {"temperature": True},
        {"top_p": 0},
        {"top_logprobs": 21},
        {"stop": [1]},
        {"stop": 5},
        {"n": 2},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"1": 5}},
    ],
)
async def test_what_cannot_be_done_is_refused(llava: Local, extra: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        await llava(Chat.of("go", **extra))
    assert caught.value.param == next(iter(extra))


async def test_context(llava: Local) -> None:
    with pytest.raises(ContextTooLong, match="takes 2048"):
        await llava(Chat.of("go", max_tokens=2048))
    with pytest.raises(ContextTooLong, match="Shorten it"):
        await llava(Chat.of("word " * 3000))
    room = 2048 - llava._engine.prompt(Chat.of("word " * 600)).tokens
    nearly = "word " * 600 + "w" * (room - 4)
    tokens = llava._engine.prompt(Chat.of(nearly)).tokens
    assert (await llava(Chat.of(nearly))).usage.completion_tokens <= 2048 - tokens


# Streams and cancelling


async def test_closing_a_stream_ends_the_generation(llava: Local) -> None:
    steps: list[int] = []

    def count(ids: Tensor, logits: Tensor) -> Tensor:
        steps.append(1)
        return logits.index_fill(1, torch.tensor(sorted(llava._engine.stop_tokens)), -torch.inf)

    stream = llava.stream(ask("go", 1, max_tokens=1500), processors=[count])
    await anext(stream)
    await stream.aclose()
    assert (await llava(ask("next", max_tokens=2))).usage.completion_tokens == 2
    assert len(steps) < 1000


async def test_cancelled_calls_leave_the_others_alone(llava: Local) -> None:
    chats = [ask(f"question {number}", 1) for number in range(6)]
    alone = [(await llava(chat)).text for chat in chats]
    tasks = [asyncio.create_task(llava(chat)) for chat in chats]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in done[::2])
    assert [it.text for it in done[1::2] if isinstance(it, Response)] == alone[1::2]


async def test_a_long_call_is_cancelled_midway(llava: Local) -> None:
    def no_end(ids: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor(sorted(llava._engine.stop_tokens)), -torch.inf)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(llava(ask("go", max_tokens=1900), processors=[no_end]), 0.2)
    response = await asyncio.wait_for(llava(ask("next", max_tokens=2)), 20)
    assert response.usage.completion_tokens == 2


def test_one_model_serves_several_event_loops(llava: Local) -> None:
    async def once() -> str:
        return (await llava(ask("hello"))).text

    assert asyncio.run(once()) == asyncio.run(once())


def test_a_process_that_ends_waits_for_its_worker() -> None:
    """Ended inside torch, it would take the process down with it."""
    code = (
        "import time\nfrom vlmguard.vlms.batching import Batcher, Task\n"
        "Batcher().submit(Task(lambda: (time.sleep(0.3), print('done'))))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", *sys.path])}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, b"done"), ended.stderr


async def test_aclose_fails_what_waits() -> None:
    vlm = made("llava")
    calls = [asyncio.create_task(vlm(ask(f"q {number}", max_tokens=200 + number))) for number in range(3)]
    await asyncio.sleep(0.05)
    await vlm.aclose()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failed = [outcome for outcome in outcomes if not isinstance(outcome, Response)]
    assert failed
    assert all("was closed" in str(outcome) for outcome in failed)
    assert vlm._batcher._worker is None
    assert (await vlm(ask("again", max_tokens=1))).usage.calls == 1


# Steering


def push(amount: float) -> Callable[[Tensor, Rows], Tensor]:
    direction = torch.linspace(-1, 1, tiny.HIDDEN)
    return lambda hidden, rows: hidden + amount * direction


def ban(token: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, logits: logits.index_fill(1, torch.tensor([token]), -torch.inf)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
async def test_interleaved_calls_with_other_arguments_answer_as_alone(name: str) -> None:
    vlm = made(name, max_batch=4)
    plain = await vlm(ask("which one?", 0))
    banned = vlm.processor.tokenizer.encode(plain.text)[0]
    arguments: list[dict[str, Any]] = [
        {"patches": [Patch(0, push(2.0))]},
        {"patches": [Patch(1, push(-2.0))]},
        {"processors": [ban(banned)]},
        {},
    ]
    calls = [(ask("which one?", number % 3), arguments[number % 4]) for number in range(16)]
    alone = [(await vlm(chat, **how)).text for chat, how in calls]
    together = await asyncio.gather(*(vlm(chat, **how) for chat, how in calls))
    assert [response.text for response in together] == alone
    assert len({alone[0], alone[1], alone[3]}) == 3
    assert not any(layer._forward_hooks for layer in decoder_layers(vlm.model))


async def test_equal_patches_share_a_batch_whose_rows_are_told_apart(llava: Local) -> None:
    seen: list[Rows] = []

    def watch(hidden: Tensor, rows: Rows) -> Tensor:
        seen.append(rows)
        assert rows.mask.shape == hidden.shape[:2]
        return hidden

    patch = Patch(0, watch)
    chats = [ask("a", 0, max_tokens=3), ask("a longer question", 0, max_tokens=3)]
    await asyncio.gather(*(llava(chat, patches=[patch]) for chat in chats))
    assert [rows.step for rows in seen] == [0, 1, 2]
    assert [rows.prefill for rows in seen] == [True, False, False]
    assert seen[0].mask.all(1).tolist() == [False, True]
    assert seen[0].mask[:, -1].all()
    assert seen[0].image.tolist() == [True, True]
    await llava(ask("none", max_tokens=1), patches=[patch])
    assert seen[-1].image.tolist() == [False]


async def test_layers_that_return_tuples(llava: Local) -> None:
    patch = Patch(0, push(2.0))
    expected = (await llava(ask("which?", 1), patches=[patch])).text
    layer = decoder_layers(llava.model)[0]
    original = layer.forward
    handle = layer.register_forward_hook(lambda module, arguments, output: (output,))
    unwrap = decoder_layers(llava.model)[1].register_forward_pre_hook(
        lambda module, arguments: (arguments[0][0], *arguments[1:]) if isinstance(arguments[0], tuple) else None
    )
    try:
        assert (await llava(ask("which?", 1), patches=[patch])).text == expected
    finally:
        handle.remove()
        unwrap.remove()
    assert layer.forward == original


async def test_wrong_patches_say_so(llava: Local) -> None:
    with pytest.raises(ConfigError, match="expected 0 to 1, got 7"):
        await llava(ask("go"), patches=[Patch(7, push(1))])
    with pytest.raises(ConfigError, match="expected shape"):
        await llava(ask("go"), patches=[Patch(0, lambda hidden, rows: hidden[:, :, :3])])
    with pytest.raises(TargetError, match="not numbers"):
        await llava(ask("go"), patches=[Patch(0, lambda hidden, rows: hidden * torch.nan)])
    assert (await llava(ask("go"))).text == (await llava(ask("go"))).text


async def test_hidden_states_see_the_patches_before_them(llava: Local) -> None:
    chat = ask("which?", 1)
    plain = (await llava.hidden_states(chat, [0]))[0]
    pushed = (await llava.hidden_states(chat, [0], patches=[Patch(0, push(3.0))]))[0]
    assert torch.allclose(pushed - plain, 3 * torch.linspace(-1, 1, tiny.HIDDEN).expand_as(plain), atol=1e-4)


async def test_a_contrast_is_transformers_guidance(llava: Local) -> None:
    """ROSE with alpha is guidance with scale 1 / (1 - alpha): equal greedy tokens on text."""
    chat, reverse = ask("is it safe?", system="You are helpful"), ask("is it safe?", system="You are harmful")
    alpha = 0.5
    found = await llava(chat, contrast=Contrast(reverse, lambda logits, other: logits - alpha * other))
    prompt, other = (llava._engine.prompt(it).tensors for it in (chat, reverse))
    with torch.no_grad():
        ids = llava.model.generate(
            **prompt,
            max_new_tokens=10,
            do_sample=False,
            guidance_scale=1 / (1 - alpha),
            negative_prompt_ids=other["input_ids"],
            negative_prompt_attention_mask=other["attention_mask"],
        )
    expected = llava.processor.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found.text == expected
    assert found.usage.calls == 2
    assert found.usage.prompt_tokens == prompt["input_ids"].shape[1] + other["input_ids"].shape[1]


async def test_contrasts_batch_and_see_pictures(llava: Local) -> None:
    def weigh(logits: Tensor, other: Tensor) -> Tensor:
        return logits - 0.5 * other

    pairs = [(ask("safe?", seed), ask("risky?", seed + 1)) for seed in range(4)]
    alone = [(await llava(chat, contrast=Contrast(other, weigh))).text for chat, other in pairs]
    calls = [llava(chat, contrast=Contrast(other, weigh)) for chat, other in pairs]
    assert [response.text for response in await asyncio.gather(*calls)] == alone
    assert alone[0] != (await llava(pairs[0][0])).text
    same = await llava(pairs[0][0], contrast=Contrast(pairs[0][0], weigh))
    assert same.text == (await llava(pairs[0][0])).text


def test_unknown_layers_fail_loudly() -> None:
    model, _ = tiny.build("llava")
    model.config.text_config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="LAYER_PATHS"):
        decoder_layers(model)


async def test_images_of_other_sizes_are_refused(llava: Local) -> None:
    with pytest.raises(ConfigError, match="chat's pictures"):
        await llava.pixel_gradient(ask("what?", 1), "yes", images=[torch.zeros(3, 90, 60)] * 2)
    with pytest.raises(ConfigError, match="needs a picture"):
        await llava.pixel_gradient(ask("what?"), "yes")


# Loading


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        Local.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="image-text"):
        Local.load(tmp_path)


def test_merged_layout() -> None:
    def turn(role: str, *texts: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}

    system, user, again, answer = (
        turn("system", "s"),
        turn("user", "u"),
        turn("user", "v"),
        turn("assistant", "a"),
    )
    assert merged([system, user, again, answer]) == [turn("user", "s", "\n\n", "u", "\n\n", "v"), answer]
    assert merged([system, answer]) == [turn("user", "s", "\n\n"), answer]
    assert merged([user, answer, system, again]) == [turn("user", "s", "\n\n", "u"), answer, again]
