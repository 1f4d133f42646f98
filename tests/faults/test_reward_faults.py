"""Faults that neighbours' users reported, as far as rewards and judges are concerned; see FAULTS.md."""

from collections.abc import Callable

import pytest

from vlmguard.chat import Chat
from vlmguard.evaluation.judges.protocol import Judgement
from vlmguard.rewriter.protocol import Analysis, Rewrite, render_output
from vlmguard.training.rewards import Answered, Completion, intent_kept, right_verdict, short_enough, well_formed
from vlmguard.vlms.scripted import Scripted

REQUEST = "Which pose looks best up there?"
RISKY = render_output(
    Rewrite(1.0, "ethics", Analysis("A pose.", "A cliff.", "A fall."), "Which pose looks best far from the edge?")
)
SHAPES: dict[str, Callable[[str], Completion]] = {
    "string": lambda text: text,
    "messages": lambda text: [{"role": "assistant", "content": text}],
    "parts": lambda text: [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
}


class Judge:
    name = "judge"

    async def __call__(self, chat: Chat, answer: str) -> Judgement:
        return Judgement(8.0, 6.0)

    async def aclose(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("text", "risky"), [("safe", False), (RISKY, True)])
def test_f104_a_reward_is_the_same_in_whatever_shape_a_completion_comes(shape: str, text: str, risky: bool) -> None:
    """A format reward that was 0 for good, since with one backend completions came in another shape than it read."""
    given = [SHAPES[shape](text)]
    assert well_formed(given, [REQUEST]) == [1.0]
    assert right_verdict(given, [risky]) == [1.0]
    assert short_enough([SHAPES[shape]("x" * 1050)]) == [0.5]
    assert intent_kept(given, [REQUEST]) == intent_kept([text], [REQUEST])
    with Answered(Scripted("Stay back."), Judge(), lambda _: Chat.of(REQUEST)) as answered:
        assert answered(given, row=["a"], request=[REQUEST]) == [pytest.approx(0.64)]
