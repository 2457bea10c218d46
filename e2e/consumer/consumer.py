"""Reads Tidewaiter's finding events from Kafka, validates each against its JSON Schema and prints one line for it.

Events come at least once: a revision that is not above the last one seen of a problem is ignored.
"""

import argparse
import json
import os
import pathlib
import sys
import uuid

from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka
from cloudevents.core.formats.json import JSONFormat
from confluent_kafka import Consumer, KafkaError, KafkaException
from jsonschema import Draft202012Validator

TYPE_PREFIX = "dev.tidewaiter."
EVENTS = ("finding.opened.v1", "finding.changed.v1", "finding.closed.v1")
SCHEMAS = pathlib.Path(__file__).resolve().parents[2] / "contracts" / "schemas"


def arguments():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--brokers", required=True, help="host:port, separated by commas")
    p.add_argument("--topic", default="finding.v1", help="with the installation's prefix, if it has one")
    p.add_argument("--username", help="for SASL/SCRAM-SHA-512; the password is in KAFKA_PASSWORD")
    p.add_argument("--ca", help="PEM file; encrypts the connection")
    p.add_argument("--group", help="remember what was read under this name")
    p.add_argument("--schemas", type=pathlib.Path, default=SCHEMAS)
    p.add_argument("--until-end", action="store_true", help="end when everything was read")
    return p.parse_args()


def configuration(a):
    c = {
        "bootstrap.servers": a.brokers,
        "group.id": a.group or f"finding-consumer-{uuid.uuid4()}",
        "enable.auto.commit": False,  # only what was printed is committed
        "auto.offset.reset": "earliest",
        "enable.partition.eof": a.until_end,
        "enable.metrics.push": False,
    }
    if a.username:
        c |= {"sasl.mechanism": "SCRAM-SHA-512", "sasl.username": a.username, "sasl.password": os.environ["KAFKA_PASSWORD"]}
    if a.ca:
        c["ssl.ca.location"] = a.ca
    protocols = {(False, False): "plaintext", (True, False): "sasl_plaintext", (False, True): "ssl", (True, True): "sasl_ssl"}
    c["security.protocol"] = protocols[bool(a.username), bool(a.ca)]
    return c


def validators(folder):
    out = {}
    for name in EVENTS:
        schema = json.loads((folder / f"{name}.schema.json").read_text())
        Draft202012Validator.check_schema(schema)
        out[TYPE_PREFIX + name] = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return out


def decode(message, schemas):
    """Returns the event and its data, or raises ValueError that says what is wrong."""
    headers = {name: value or b"" for name, value in message.headers() or []}
    try:
        event = from_kafka(KafkaMessage(headers=headers, key=message.key(), value=message.value() or b""), JSONFormat())
    except Exception as e:  # the SDK has many ways to say that bytes are no CloudEvent
        raise ValueError(f"no CloudEvent: {e}") from e
    schema = schemas.get(event.get_type())
    if schema is None:
        raise ValueError(f"type {event.get_type()} is not known here")
    data = event.get_data()
    errors = sorted(schema.iter_errors(data), key=lambda e: e.json_path)
    if errors:
        raise ValueError(f"event {event.get_id()}: " + "; ".join(f"{e.json_path}: {e.message}" for e in errors))
    if event.get_subject() != data["key"]:
        raise ValueError(f"event {event.get_id()}: the subject is not the problem's key")
    return event, data


def line(event, p):
    verb = event.get_type().split(".")[-2]
    todo = "update to " + " or ".join(p["fixedIn"]) if p.get("fixedIn") else "no fix yet"
    exploited = ", known to be exploited" if p["kev"] else ""
    return (
        f"{verb} {p['key']} r{p['revision']}: {p['package']} in {p['owner']}: {todo} "
        f"({p['severity']}{exploited}; {len(p['vulnerabilities'])} vulnerabilities, {p['imageCount']} images)"
    )


def consume(a):
    schemas = validators(a.schemas)
    seen, ended, bad = {}, set(), 0
    consumer = Consumer(configuration(a))
    try:
        consumer.subscribe([a.topic])
        while True:
            message = consumer.poll(1.0)
            if message is None:
                continue
            if message.error():
                if message.error().code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(message.error())
                ended.add(message.partition())
                if len(ended) == len(consumer.assignment()):
                    return bad
                continue
            ended.discard(message.partition())
            try:
                event, problem = decode(message, schemas)
            except ValueError as e:
                bad += 1
                print(f"invalid: {message.topic()}/{message.partition()}/{message.offset()}: {e}", file=sys.stderr)
            else:
                if problem["revision"] > seen.get(problem["key"], 0):
                    seen[problem["key"]] = problem["revision"]
                    print(line(event, problem), flush=True)
            if a.group:
                consumer.commit(message, asynchronous=False)
    finally:
        consumer.close()


if __name__ == "__main__":
    try:
        sys.exit(1 if consume(arguments()) else 0)
    except KeyboardInterrupt:
        pass
