"""``qwedge mqtt try-rule``: what a configured rule makes of a message, before a machine sends one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.commands import options
from edge.config import Settings
from edge.errors import ConfigError

if TYPE_CHECKING:  # this brings the engine's packages, which `qwedge --help` does without
    from edge.mqtt.rules import Rule

MAX_PAYLOAD_BYTES = 1 << 20


def register(group: typer.Typer) -> None:
    """Add the command to ``qwedge mqtt``."""
    group.command("try-rule")(try_rule)


def try_rule(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The rule's name in the file of --config.")],
    *,
    topic: Annotated[str, typer.Option("--topic", metavar="T", help="Topic of the message.")],
    payload: Annotated[str | None, typer.Option("--payload", metavar="TEXT", help="Its payload.")] = None,
    payload_file: Annotated[
        Path | None, typer.Option("--payload-file", metavar="FILE", help="A file with its payload.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Let the model answer.")] = False,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="DIR", help="The bundle that answers; implies --run.")
    ] = None,
    config: options.Config = None,
    as_json: options.Json = False,
) -> None:
    """Show what a rule makes of a message: the prompt, the form of the answer, and where it goes.

    Nothing is published, and no broker is needed. With --run the model answers too.
    """
    from edge.mqtt.rules import RuleMessage, load_rules

    chosen = options.settings(config, model__bundle=bundle, engine__slots=1)
    rule = _find(name, load_rules(chosen.mqtt))
    captures = rule.captures(topic)
    if captures is None:
        hint = f"it takes {rule.settings.subscribe}, without qwedge's own topics"
        raise ConfigError(f"the rule {name!r} takes no messages on {topic}", hint=hint)
    prompt = rule.render(RuleMessage(topic, _payload(payload, payload_file)))
    report: dict[str, Any] = {
        "rule": name,
        "subscribe": rule.settings.subscribe,
        "captures": captures,
        "publish": rule.output_topic(topic),
        "qos": rule.settings.qos,
        "retain": rule.settings.retain,
        "request": rule.request(prompt),
    }
    if run or bundle is not None:
        report["answer"] = _answer(chosen, rule, report["request"])
    if as_json:
        options.print_json(report)
    else:
        print(_text(report, rule))


def _find(name: str, rules: tuple[Rule, ...]) -> Rule:
    """The rule of a name.

    Raises:
        ConfigError: there is none.
    """
    if rule := next((rule for rule in rules if rule.name == name), None):
        return rule
    known = ", ".join(rule.name for rule in rules)
    hint = f"the rules are {known}" if rules else "there are no rules: name a file with --config"
    raise ConfigError(f"there is no rule {name!r}", hint=hint)


def _payload(text: str | None, file: Path | None) -> bytes:
    """The message's payload, from one of the two options.

    Raises:
        ConfigError: both or none is given, or the file cannot be read.
    """
    if (text is None) == (file is None):
        raise ConfigError("a message has one payload", hint="give --payload or --payload-file")
    if file is None:
        return (text or "").encode("utf-8", errors="surrogateescape")
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_PAYLOAD_BYTES)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", hint="check --payload-file") from None


def _answer(settings: Settings, rule: Rule, request: dict[str, Any]) -> str:
    """What the model answers, checked as the device checks it."""
    from edge.commands.local import ask, local_service
    from edge.mqtt.rules import check_with

    with local_service(settings) as service:
        check_with(service.model, [rule])
        return rule.read(ask(service, request, lambda _text, _reasoning: None))


def _text(report: dict[str, Any], rule: Rule) -> str:
    """The report for a person."""
    wildcards = "".join(f", {{{number}}} = {value}" for number, value in enumerate(report["captures"], 1))
    retained = ", retained" if report["retain"] else ""
    facts = (
        f"rule       {report['rule']}",
        f"takes      {report['subscribe']}{wildcards}",
        f"publishes  {report['publish']}, QoS {report['qos']}{retained}",
        f"answer     {_form(rule)}, {rule.settings.max_tokens} tokens at most",
    )
    parts = ["\n".join(facts)]
    parts += [f"--- {message['role']}\n{message['content']}" for message in report["request"]["messages"]]
    if rule.schema is not None:
        parts.append(f"--- schema\n{json.dumps(rule.schema, indent=2, ensure_ascii=False)}")
    if "answer" in report:
        parts.append(f"--- answer\n{report['answer']}")
    return "\n\n".join(parts)


def _form(rule: Rule) -> str:
    if rule.settings.choices is not None:
        return f"one of {', '.join(rule.settings.choices)}"
    return "text" if rule.schema is None else "JSON by the schema"
