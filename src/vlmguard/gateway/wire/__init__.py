"""The APIs that the gateway speaks, one a file: a request to a chat for the guard, and the way back."""

from vlmguard.gateway.wire.chat import ChatCompletions
from vlmguard.gateway.wire.messages import Messages
from vlmguard.gateway.wire.protocol import Conversation, Wire
from vlmguard.gateway.wire.responses import Responses

__all__ = ["CHAT", "WIRES", "Conversation", "Wire"]

CHAT = ChatCompletions()
WIRES: tuple[Wire, ...] = (CHAT, Responses(), Messages())
