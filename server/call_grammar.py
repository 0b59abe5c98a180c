"""Tools as a grammar of the chat template's calls: `call:NAME{key:<|"|>text<|"|>,n:5}` with arguments by the schema.

The result is Lark for llguidance, in which `<[52]>` is the token with that id. It is made for `tool_calls.parse_calls`
in its exact reading: text between quote tokens is a string whatever it looks like, anything bare is what it says.
Properties come in the order in which templates write them, sorted by name, and nothing stands between the parts.

A schema may say less than JSON Schema would allow (an object's unnamed properties only where it asks for them, numbers
of at most 18 digits, references that lead back to themselves followed only so far), never more. Keywords that this
cannot keep are refused. Knows JSON Schema and Lark; no tokenizer beyond the ids it is given.
Invariant: what follows the grammar is read back as arguments that are valid against the schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, regex_to_lark

from server.automaton import BadGrammar, line
from server.json_grammar import FORMATS, UNREADABLE
from server.schema_algebra import ALL_TYPES, NUMERIC, both, exclusive, kinds_of, same
from server.tool_schema import kind_of, resolve

Json = dict[str, Any]

MAX_RULES = 20_000  # of all tools together
DEPTH = 24  # brackets within brackets
ANY_DEPTH = 4  # the same, where a schema says nothing

_NOTHING = '""'
_PLAIN_KEY = re.compile(r"[\w.$-]{1,100}")
_KEY = "[A-Za-z_][A-Za-z0-9_]{0,63}"
_TERMINALS = {
    "TEXT": r"/(?s:.*)/",
    "INTEGER": "/-?(0|[1-9][0-9]{0,17})/",
    "NUMBER": r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/",
}
_HOUR, _DAY = r"([01][0-9]|2[0-3])", r"(0[1-9]|1[0-9]|2[0-8])"
_DATE = rf"[0-9]{{4}}-(0[1-9]|1[0-2])-{_DAY}"
_TIME = rf"{_HOUR}:[0-5][0-9]:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_HOUR}:[0-5][0-9])"
_LABEL = "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
# Not every text of a format, but none that is not of it; the rarest forms are left out.
_FORMAT_REGEXES = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": r"P([0-9]{1,6}W|[0-9]{1,6}D(T[0-9]{1,6}H([0-9]{1,6}M)?)?|T[0-9]{1,6}[HMS])",
    "email": rf"[A-Za-z0-9_+-]{{1,30}}(\.[A-Za-z0-9_+-]{{1,30}}){{0,3}}@({_LABEL}\.){{1,4}}[a-z]{{2,12}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,4}}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": "([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": rf"[a-z][a-z0-9+.-]{{0,15}}://{_LABEL}(\.{_LABEL}){{0,4}}(:[0-9]{{2,4}})?(/[A-Za-z0-9._~%-]{{0,60}})*"
    r"(\?[A-Za-z0-9._~&=-]{0,80})?",
}
_LARGEST = 10**15
_NOTES = frozenset(
    "title description default examples deprecated readOnly writeOnly $comment $defs definitions $schema $id $anchor "
    "contentMediaType contentEncoding discriminator nullable".split()
)
_KEPT = frozenset(
    "type enum const anyOf oneOf allOf $ref properties required additionalProperties items prefixItems minItems "
    "maxItems minLength maxLength pattern format".split()
) | set(NUMERIC)
_REFUSED = frozenset(
    "not if then else contains minContains maxContains uniqueItems unevaluatedItems unevaluatedProperties "
    "patternProperties propertyNames minProperties maxProperties dependencies dependentRequired dependentSchemas "
    "additionalItems $dynamicRef $recursiveRef".split()
)


def call_rules(tools: Mapping[str, Any], quote_id: int) -> tuple[str, list[str]]:
    """Lark for one call without its markers: the name of its rule, and all rules. `tools` are schemas by name.

    Raises BadGrammar naming the tool and the keyword.
    """
    rules = _Rules(quote_id)
    calls = []
    for name, schema in tools.items():
        try:
            arguments = _Schema(schema, rules).arguments()
        except (BadGrammar, *UNREADABLE) as error:
            raise BadGrammar(f"the parameters of '{name}': {error}"[:500]) from error
        calls.append(f"{literal(f'call:{name}')} {arguments}")
    return rules.add(" | ".join(calls)), rules.lines()


class _Rules:
    """The rules and terminals written so far."""

    def __init__(self, quote_id: int) -> None:
        self.quote = f"<[{quote_id}]>"
        self._rules: list[str] = []
        self._terminals: dict[str, str] = {}  # name by definition
        self._any: dict[int, str] = {}

    def add(self, body: str) -> str:
        """A new rule; returns its name."""
        if len(self._rules) >= MAX_RULES:
            raise BadGrammar(f"the schemas of the tools come to more than {MAX_RULES:,} rules")
        self._rules.append(body)
        return f"a{len(self._rules) - 1}"

    def terminal(self, definition: str) -> str:
        """The name of a terminal, the same for the same definition."""
        return self._terminals.setdefault(definition, f"A{len(self._terminals)}")

    def text(self, content: str) -> str:
        """A string whose content is an expression of Lark."""
        return f"{self.quote} {content} {self.quote}"

    def any(self, depth: int) -> str:
        """A rule for any value of at most so many brackets within brackets."""
        if depth not in self._any:
            kinds = [self.text("TEXT"), "NUMBER", '"true"', '"false"', '"null"']
            if depth > 0:
                inner = self.any(depth - 1)
                pair = f'{self.terminal(f"/{_KEY}/")} ":" {inner}'
                kinds += [f'"[" ({inner} ("," {inner})*)? "]"', f'"{{" ({pair} ("," {pair})*)? "}}"']
            self._any[depth] = self.add(" | ".join(kinds))
        return self._any[depth]

    def lines(self) -> list[str]:
        """All of it as Lark."""
        rules = [f"a{index}: {body}" for index, body in enumerate(self._rules)]
        terminals = [f"{name}: {definition}" for definition, name in self._terminals.items()]
        return [*rules, *terminals, *(f"{name}: {regex}" for name, regex in _TERMINALS.items())]


class _Schema:
    """Writes the rules of one tool's schema. A method that returns None says that no value is valid there."""

    def __init__(self, root: Any, rules: _Rules) -> None:
        self._root = root if isinstance(root, dict) else {}
        self._rules = rules
        self._references: dict[tuple[str, int], str | None] = {}

    def arguments(self) -> str:
        """The rule of the arguments: always an object."""
        rule = self.value({"allOf": [self._root, {"type": "object"}]}, DEPTH)
        if rule is None:
            raise BadGrammar("no arguments are valid")
        return rule

    def value(self, node: Any, depth: int) -> str | None:
        """A value that is valid against a schema."""
        if node is False:
            return None
        if not isinstance(node, dict) or not node.keys() - _NOTES:
            return self._rules.any(min(depth, ANY_DEPTH))
        if isinstance(node.get("$ref"), str) and not node.keys() - _NOTES - {"$ref"}:
            return self._reference(node["$ref"], depth)
        node = self._flat(node, ())
        for word in ("anyOf", "oneOf"):
            if word in node:
                return self._alternatives(node, word, depth)
        if "enum" in node or "const" in node:
            return self._listed(node)
        kinds = [self._kind(kind, node, depth) for kind in kinds_of(node)]
        return self._either(kinds)

    def _reference(self, reference: str, depth: int) -> str | None:
        key = (reference, depth)
        if key not in self._references:
            target = self._target(reference)
            if isinstance(target, dict) and target.get("$ref") == reference:
                raise BadGrammar(f"'$ref' {reference[:100]!r} leads to itself")
            self._references[key] = None  # met again at the same depth: only through itself, without a bracket
            self._references[key] = self.value(target, depth)
        return self._references[key]

    def _target(self, reference: str) -> Any:
        target = resolve(reference, self._root)
        if target is None:
            raise BadGrammar(
                f"'$ref' {reference[:100]!r} leads nowhere; only references inside the schema are followed"
            )
        return target

    def _flat(self, node: Json, seen: tuple[str, ...]) -> Json:
        """A schema with its references and `allOf` merged in and only the keywords that count."""
        for key in sorted(node.keys() & _REFUSED):
            if not _says_nothing(key, node):
                raise BadGrammar(f"'{key}' is not supported")
        result = {key: value for key, value in node.items() if key in _KEPT and key not in ("$ref", "allOf")}
        parts: list[Any] = list(node.get("allOf") or ())
        reference = node.get("$ref")
        if isinstance(reference, str):
            if reference in seen:
                raise BadGrammar(f"'$ref' {reference[:100]!r} leads to itself")
            seen = (*seen, reference)
            parts.append(self._target(reference))
        for part in parts:
            if part is False:
                return {"enum": []}
            if isinstance(part, dict):
                result = both(result, self._flat(part, seen))
        return result

    def _alternatives(self, node: Json, word: str, depth: int) -> str | None:
        own = {key: value for key, value in node.items() if key != word}
        branches = [self._flat(branch, ()) if isinstance(branch, dict) else branch for branch in node[word]]
        if word == "oneOf" and not exclusive(branches):
            raise BadGrammar("'oneOf' is supported only where at most one branch can hold: by type, or by a constant")
        if own:
            branches = [
                both(own, branch) if isinstance(branch, dict) else own for branch in branches if branch is not False
            ]
            return self._either([self.value(branch, depth) for branch in branches])
        return self._either([self.value(branch, depth) for branch in node[word]])

    def _either(self, choices: Iterable[str | None]) -> str | None:
        possible = list(dict.fromkeys(choice for choice in choices if choice is not None))
        if len(possible) <= 1:
            return possible[0] if possible else None
        return self._rules.add(" | ".join(possible))

    def _listed(self, node: Json) -> str | None:
        values = node.get("enum", [node.get("const")])
        if "const" in node:
            values = [value for value in values if same(value, node["const"])]
        extra = node.keys() - {"enum", "const", "type", "format"}
        if extra:
            raise BadGrammar(f"'{min(extra)}' beside 'enum' or 'const' is not supported")
        kinds = kinds_of(node) if "type" in node else ALL_TYPES
        allowed = [
            value for value in values if kind_of(value) in kinds or (kind_of(value) == "integer" and "number" in kinds)
        ]
        return self._either([self._rules.add(self._constant(value)) for value in allowed])

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return self._rules.text(literal(value) if value else "")
        if isinstance(value, list):
            return " ".join(['"["', *_joined([self._constant(each) for each in value]), '"]"'])
        if isinstance(value, dict):
            pairs = [f"{self._key(key)} {self._constant(value[key])}" for key in _ordered(value)]
            return " ".join(['"{"', *_joined(pairs), '"}"'])
        return literal(json.dumps(value))

    def _kind(self, kind: str, node: Json, depth: int) -> str | None:
        if kind == "null":
            return '"null"'
        if kind == "boolean":
            return '("true" | "false")'
        if kind in ("integer", "number"):
            return self._number(kind, node)
        if kind == "string":
            return self._rules.add(self._rules.text(self._text(node)))
        if depth == 0:
            return None
        return self._array(node, depth - 1) if kind == "array" else self._object(node, depth - 1)

    def _number(self, kind: str, node: Json) -> str:
        limits = {key: node[key] for key in NUMERIC if key in node}
        if not limits:
            return kind.upper()
        # A bound on both sides also bounds the number of digits.
        if not limits.keys() & {"minimum", "exclusiveMinimum"}:
            limits["minimum"] = -_LARGEST
        if not limits.keys() & {"maximum", "exclusiveMaximum"}:
            limits["maximum"] = _LARGEST
        return self._rules.add(f"%json {json.dumps({'type': kind, **limits})}")

    def _text(self, node: Json) -> str:
        parts = []
        if "minLength" in node or "maxLength" in node:
            most = node.get("maxLength", "")
            parts.append(f"/(?s:.{{{node.get('minLength', 0)},{most}}})/")
        if isinstance(node.get("pattern"), str):
            parts.append(_searched(node["pattern"]))
        if node.get("format") in FORMATS:
            parts.append(f"/{_escaped(_FORMAT_REGEXES[node['format']])}/")
        return self._rules.terminal(" & ".join(parts)) if parts else "TEXT"

    def _array(self, node: Json, depth: int) -> str | None:
        least, most = int(node.get("minItems", 0)), None if node.get("maxItems") is None else int(node["maxItems"])
        items: Any = node.get("items", True)
        first: list[Any] = items if isinstance(items, list) else list(node.get("prefixItems") or ())
        further = True if isinstance(items, list) else items
        if most is not None and most < least:
            return None
        rest = self.value(further, depth) if most is None or most > len(first) else None
        if rest is None and least > len(first):
            return None
        tail = ""
        if rest is not None:
            low, high = max(least - len(first), 0), None if most is None else most - len(first)
            if first:
                tail = _times(f'"," {rest}', low, high)
            else:
                tail = f"{rest} " + _times(f'"," {rest}', max(low - 1, 0), None if high is None else high - 1)
                tail = tail if low else f"({tail})?"
        for index in reversed(range(len(first) if most is None else min(len(first), most))):
            item = self.value(first[index], depth)
            if item is None:
                if index < least:
                    return None
                tail = ""
                continue
            separator = '"," ' if index else ""
            tail = f"{separator}{item} {tail}" if index < least else f"({separator}{item} {tail})?"
        return self._rules.add(f'"[" {tail} "]"')

    def _object(self, node: Json, depth: int) -> str | None:
        named: Json = dict(node.get("properties") or {})
        required = [name for name in node.get("required") or () if isinstance(name, str)]
        unnamed = node.get("additionalProperties", "properties" not in node)  # none declared: none, not any
        for name in required:
            named.setdefault(name, node.get("additionalProperties", True))
        pairs: list[tuple[str, bool]] = []
        for name in _ordered(named):
            value = self.value(named[name], depth)
            if value is not None:
                pairs.append((f"{self._key(name)} {value}", name in required))
            elif name in required:
                return None
        extra = self.value(unnamed, depth) if unnamed is not False else None
        first, rest = "", ""
        if extra is not None:
            pair = f'{self._free_key(named)} ":" {extra}'
            rest = self._rules.add(f'("," {pair})*')
            first = self._rules.add(f"({pair} {rest})?")
        # From the last property to the first: how it goes on when something stands before it, and when nothing does.
        for text, needed in reversed(pairs):
            first, rest = (
                self._rules.add(f"{text} {rest}" + ("" if needed else f" | {first or _NOTHING}")),
                self._rules.add(f'"," {text} {rest}' + ("" if needed else f" | {rest or _NOTHING}")),
            )
        return self._rules.add(f'"{{" {first} "}}"')

    def _key(self, name: str) -> str:
        if not name:
            raise BadGrammar("a property without a name is not supported")
        if _PLAIN_KEY.fullmatch(name):
            return literal(f"{name}:")
        return f'{self._rules.text(literal(name))} ":"'

    def _free_key(self, named: Json) -> str:
        taken = "|".join(sorted(re.escape(name) for name in named if re.fullmatch(_KEY, name)))
        return self._rules.terminal(f"/{_KEY}/ & ~/({taken})/" if taken else f"/{_KEY}/")


def _says_nothing(key: str, node: Json) -> bool:
    """Whether a keyword of `_REFUSED` forbids nothing with the value it has."""
    value: Any = node[key]
    if key == "minProperties":
        return isinstance(value, int) and value <= len(node.get("required") or ())
    if key in ("dependencies", "dependentRequired", "dependentSchemas", "patternProperties"):
        return isinstance(value, dict) and not value
    return key == "uniqueItems" and value is False


def _times(item: str, least: int, most: int | None) -> str:
    return "" if most == 0 else f"({item}){{{least},{'' if most is None else most}}}"


def literal(text: str) -> str:
    """A text as Lark writes one: JSON's way, in which the delete character is no text."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _escaped(regex: str) -> str:
    return regex_to_lark(regex, "dw")


def _joined(parts: Sequence[str]) -> list[str]:
    return [piece for part in parts for piece in ('","', part)][1:]


def _ordered(names: Iterable[str]) -> list[str]:
    """As a template's `dictsort` has them."""
    return sorted(names, key=str.lower)


def _searched(pattern: str) -> str:
    """A terminal of the texts in which a pattern is found."""
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[1 if begins else 0 : len(pattern) - 1 if ends else None]
    if (begins or ends) and _has_outer_bar(inner):
        raise BadGrammar(f"'pattern' {pattern[:100]!r}: put what is between ^ and $ in brackets")
    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(inner))
    if problem:
        raise BadGrammar(f"'pattern' {pattern[:100]!r}: {line(problem)}")
    return f"/{'' if begins else '(?s:.*)'}({_escaped(inner)}){'' if ends else '(?s:.*)'}/"


def _has_outer_bar(regex: str) -> bool:
    depth, inside, skip = 0, False, False
    for symbol in regex:
        if skip:
            skip = False
        elif symbol == "\\":
            skip = True
        elif inside:
            inside = symbol != "]"
        elif symbol == "[":
            inside = True
        elif symbol in "()":
            depth += 1 if symbol == "(" else -1
        elif symbol == "|" and depth == 0:
            return True
    return False
