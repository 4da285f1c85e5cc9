"""What the reference of the site needs to know of our docstrings and classes (a griffe extension).

* A doctest is code: in Markdown ``>>>`` would be a quotation in a quotation.
* ``::`` announces a literal block; Markdown needs no more than its indentation.
* A class of attrs is made with its fields. griffe knows that of dataclasses only.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# From a prompt to the next empty line. Indented ones are code already.
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
_LITERAL = re.compile(r"^::\n|(?<=:):$", re.MULTILINE)
_ATTRS = ("attrs.frozen", "attrs.define", "attrs.mutable")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            fenced = _DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = _LITERAL.sub("", fenced)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if "__init__" in cls.members or not _is_of_attrs(cls):
            return
        itself = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        fields = [_parameter(one) for one in cls.members.values() if _is_field(one)]
        init = griffe.Function("__init__", parameters=griffe.Parameters(itself, *fields))
        cls.set_member("__init__", init)


def _is_of_attrs(cls: griffe.Class) -> bool:
    names = {str(decorator.value).partition("(")[0] for decorator in cls.decorators}
    return not names.isdisjoint(_ATTRS)


def _is_field(member: Any) -> bool:
    """Whether a member is a public argument of the class."""
    return (
        isinstance(member, griffe.Attribute)
        and member.annotation is not None
        and not member.name.startswith("_")
        and "instance-attribute" in member.labels  # no ClassVar
        and "property" not in member.labels
        and str(_options(member).get("init")) != "False"
    )


def _options(field: griffe.Attribute) -> dict[str, Any]:
    """The arguments of ``attrs.field(...)``."""
    value = field.value
    if isinstance(value, griffe.ExprCall) and str(value.function) == "attrs.field":
        keywords = (one for one in value.arguments if isinstance(one, griffe.ExprKeyword))
        return {one.name: one.value for one in keywords}
    return {}


def _parameter(field: griffe.Attribute) -> griffe.Parameter:
    options = _options(field)
    if "factory" in options:
        default: Any = f"{options['factory']}()"
    elif str(field.value).startswith("attrs.field("):
        default = options.get("default")
    else:
        default = field.value
    only = str(options.get("kw_only")) == "True"
    kind = griffe.ParameterKind.keyword_only if only else griffe.ParameterKind.positional_or_keyword
    return griffe.Parameter(
        field.name, annotation=field.annotation, kind=kind, default=default and str(default)
    )
