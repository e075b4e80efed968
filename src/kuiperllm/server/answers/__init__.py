"""Takes apart what a chat model writes, while it is written: reasoning, answer, calls of functions."""

from kuiperllm.server.answers.formats import TOOL_FORMATS, ToolFormat, detect_tool_format
from kuiperllm.server.answers.parser import AnswerParser
from kuiperllm.server.answers.pieces import Arguments, Call, Content, Piece, Reasoning
from kuiperllm.server.answers.reasoning import Thinking, ThinkingState

__all__ = [
    "TOOL_FORMATS",
    "AnswerParser",
    "Arguments",
    "Call",
    "Content",
    "Piece",
    "Reasoning",
    "Thinking",
    "ThinkingState",
    "ToolFormat",
    "detect_tool_format",
]
