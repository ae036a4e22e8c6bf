"""Conversations as text: the file's own Jinja template, in a sandbox, because a file may come from anywhere."""

import datetime
import json
from typing import Any

from limbeck.errors import LimbeckError


class ChatTemplate:
    """Turns to text.

    Args:
        source: the template.
        bos, eos: texts of the tokens at a text's begin and end, which templates write themselves.

    Raises:
        LimbeckError: it is no template.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._words = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise LimbeckError(f"the file's chat template can not be read: {error}.") from error

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """The conversation up to where the model's turn begins.

        Raises:
            LimbeckError: the template refuses the conversation, with its reason.
        """
        from jinja2 import TemplateError

        try:
            text: str = self._template.render(messages=messages, tools=tools, add_generation_prompt=True, **self._words)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise LimbeckError(f"the chat template refuses this conversation: {error}.") from error
        return text


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
