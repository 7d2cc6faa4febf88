"""The same recipe into a real bucket: where the artifacts lie changes nothing about what they are."""

import json

import pytest

from kd_core.ledger import history
from kd_core.recipe import S3Options
from kd_core.store import open_store

pytestmark = [pytest.mark.stack, pytest.mark.slow]


@pytest.mark.drill
def test_a_bucket_holds_what_a_local_store_holds(copy, kd, s3_environment):
    where = f"s3://{s3_environment.bucket}/end-to-end"
    words = ["run", "--local", "--json", copy.recipe_file, "--set", f"run.store={where}"]
    words += ["--set", f"run.s3.endpoint={s3_environment.urls['s3']}"]
    called = kd(*words)
    assert (called.code, called.err) == (0, "")
    said = json.loads(called.out)
    assert {node["status"] for node in said["nodes"]} == {"computed"}

    def named(run, key):
        return {node["name"]: node[key] for node in run["nodes"]}

    place = {"publish": named(said, "fingerprint")["publish"]}  # another registry
    assert named(said, "fingerprint") == named(copy.said, "fingerprint") | place
    timed = {"report"}  # it shows how long things took
    local, there = named(copy.said, "digest"), named(said, "digest")
    assert {n: d for n, d in there.items() if n not in timed} == {n: d for n, d in local.items() if n not in timed}
    store = open_store(where, S3Options(endpoint=s3_environment.urls["s3"]))
    [entry] = history(store, "small-student")
    assert entry.artifact.digest == there["student.0"]
    assert not list(store.list("checkpoints/"))
    again = json.loads(kd(*words).out)
    assert {node["status"] for node in again["nodes"]} == {"hit"}
    assert named(again, "digest") == there
