"""A transformers vision-language model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmguard.chat import Chat, Response
from vlmguard.errors import ConfigError, ModelError, missing_extra
from vlmguard.vlms.batching import Batcher, Task
from vlmguard.vlms.generation import Engine, Processor, Row
from vlmguard.vlms.protocol import Capability
from vlmguard.vlms.settings import Settings, seed_of
from vlmguard.vlms.steering import Contrast, Patch, Rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ONE_TOKEN = Settings(max_tokens=1)


class Local:
    """Any image-text model of transformers: batched, steerable for one call.

    Calls that wait together and have equal settings, processors and patches run as one batch, with the
    answers they would have had alone (in bfloat16 up to rounding). What a request may set: max_tokens
    (max_completion_tokens; default 256), temperature (default 0: greedy), top_p, seed, stop, logprobs,
    top_logprobs. A checkpoint's own generation defaults do not apply.

    Args:
        model: an AutoModelForImageTextToText; it is put into evaluation mode.
        processor: its AutoProcessor.
        max_batch: rows a batch.
        wait_seconds: how long a call waits for others to join its batch.
    """

    can = frozenset(Capability)

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str = "local",
        *,
        max_batch: int = 8,
        wait_seconds: float = 0.005,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.name = name
        self._engine = Engine(self.model, processor, name)
        self._batcher = Batcher(max_batch, wait_seconds)

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        revision: str | None = None,
        *,
        merge: bool = False,
        max_batch: int = 8,
    ) -> Local:
        """A checkpoint folder or hub name, with a PEFT adapter that is proved to be on (see `adapters`).

        Args:
            device: by default the GPU where there is one.
            merge: fold the adapter into the weights: faster, but it cannot be trained further.

        Raises:
            ModelError: it cannot be loaded. AdapterError: the adapter does not fit it.
        """
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise missing_extra(error.name or "torch", "local") from error
        path = str(path_or_id)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, revision=revision)
            processor = AutoProcessor.from_pretrained(path, revision=revision)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"{path} cannot be loaded as an image-text model: {str(error).strip().splitlines()[0]}",
                "Check the name, and that it is a model of transformers' image-text-to-text kind.",
            ) from error
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        name = Path(path).name if Path(path).exists() else path
        if adapter is not None:
            from vlmguard.vlms.adapters import put_adapter

            model = put_adapter(model, str(adapter), lambda adapted: Engine(adapted, processor, name).probe())
            model = model.merge_and_unload() if merge else model
            name += f"+{Path(adapter).name}"
        return cls(model, processor, name, max_batch=max_batch)

    async def __call__(
        self,
        chat: Chat,
        *,
        processors: Sequence[Processor] = (),
        patches: Sequence[Patch] = (),
        contrast: Contrast | None = None,
        seed: int | None = None,
    ) -> Response:
        """The answer to a chat.

        Args:
            processors: applied to the logits in order, after `contrast` and before temperature.
            patches: applied to hidden states, during this call only.
            contrast: a second conversation to decode against.
            seed: in place of the request's own.

        Raises:
            ContextTooLong: the conversation, or with it the asked-for max_tokens, does not fit.
            TargetError: the model cannot take the conversation, or fails.
        """
        row = self._row(chat, processors, patches, contrast, seed)
        response: Response = await self._batcher.do(row)
        return response

    async def stream(
        self,
        chat: Chat,
        *,
        processors: Sequence[Processor] = (),
        patches: Sequence[Patch] = (),
        contrast: Contrast | None = None,
        seed: int | None = None,
    ) -> AsyncGenerator[str | Response, None]:
        """The answer's text as it comes, then the whole Response. Closing the stream ends the generation."""
        arrived: asyncio.Queue[str | None] = asyncio.Queue()
        row = self._row(chat, processors, patches, contrast, seed)
        row.emit = send = _sender(row, asyncio.get_running_loop(), arrived)
        row.future.add_done_callback(lambda _: send(None))
        self._batcher.submit(row)
        try:
            while (text := await arrived.get()) is not None:
                yield text
            yield row.future.result()
        finally:
            row.future.cancel()

    async def aclose(self) -> None:
        """Fail the calls that wait, and let the running batch end."""
        await self._batcher.aclose()

    async def first_token(
        self,
        chat: Chat,
        choices: Sequence[str],
        *,
        processors: Sequence[Processor] = (),
        patches: Sequence[Patch] = (),
        contrast: Contrast | None = None,
    ) -> dict[str, float]:
        """The probability that the answer starts with each choice, of the whole vocabulary, from one prefill.

        A choice counts by its first token, spelled with and without a space before it.

        Raises:
            ConfigError: two choices start with the same token.
        """
        tokens = {choice: self._engine.first_tokens(choice) for choice in choices}
        counted = [token for found in tokens.values() for token in found]
        if len(counted) != len(set(counted)):
            raise ConfigError(
                f"of {', '.join(choices)} two start with the same token",
                "Choose words that begin differently.",
            )
        probabilities: list[Tensor] = []
        row = Row(self._engine, chat, ONE_TOKEN, tuple(processors), tuple(patches), contrast)
        row.inspect = lambda logits: probabilities.append(logits.float().softmax(-1))
        await self._batcher.do(row)
        return {choice: float(probabilities[0][list(found)].sum()) for choice, found in tokens.items()}

    async def hidden_states(
        self, chat: Chat, layers: Sequence[int], *, patches: Sequence[Patch] = ()
    ) -> dict[int, Tensor]:
        """The prompt's hidden states after each of the decoder layers `layers` (0 is the first, -1 the last).

        Returns:
            (T, d) float32 on the CPU, [-1] being the last prompt token; after the given patches, before the
            model's final norm.
        """
        states: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[[Tensor, Rows], Tensor]:
            def function(hidden: Tensor, rows: Rows) -> Tensor:
                if rows.prefill:
                    states[layer] = hidden[0, rows.mask[0]].float().cpu()
                return hidden

            return function

        keeping = [Patch(layer, keep(layer)) for layer in layers]
        await self._batcher.do(Row(self._engine, chat, ONE_TOKEN, (), (*patches, *keeping)))
        return states

    async def pixel_gradient(
        self,
        chat: Chat,
        target: str,
        *,
        images: Sequence[Tensor] | None = None,
        patches: Sequence[Patch] = (),
    ) -> tuple[float, Any]:
        """How the pictures would have to change for the answer to become `target`.

        Args:
            images: the chat's pictures as (3, H, W) float32 in [0, 1], in their order and sizes; the gradient
                then goes through the processor's resizing and normalising to them.

        Returns:
            The mean negative log-likelihood of target's tokens, and its gradient (float32): of `pixel_values`
            as the processor makes them, or a list, one of each of `images`. Step against it to make `target`
            likelier.

        Raises:
            ConfigError: no picture in the chat, an empty target, or images that do not match the chat's.
        """
        from vlmguard.vlms.gradients import pixel_gradient

        engine = self._engine
        return await self._batcher.do(Task(lambda: pixel_gradient(engine, chat, target, images, patches)))  # type: ignore[no-any-return]

    def _row(
        self,
        chat: Chat,
        processors: Sequence[Processor],
        patches: Sequence[Patch],
        contrast: Contrast | None,
        seed: int | None,
    ) -> Row:
        seed = seed_of(chat.extra) if seed is None else seed
        wanted = Settings.of(chat.extra)
        return Row(self._engine, chat, wanted, tuple(processors), tuple(patches), contrast, seed)


def _sender(
    row: Row, loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[str | None]
) -> Callable[[str | None], None]:
    """Hands text from the worker to the event loop; when the loop is gone, so is the caller."""

    def send(text: str | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, text)
        except RuntimeError:
            row.future.cancel()

    return send
