"""Addresses: no way of writing one reaches a metadata service, and none is shown with its password."""

import re
import socket

import pytest

from kd_core.errors import KDError, RecipeError
from kd_core.recipe import S3Options
from kd_core.recipe.addresses import check_address, hide_passwords, holds_password, redact_url
from kd_core.recipe.files import load_recipe
from kd_core.store import open_store

RECIPE = "recipes/sequence-level.yaml"


def check(url: str) -> str:
    return check_address(url, field="run.teacher_url", instead="KD_TEACHER_API_KEY")


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.1.1:8000",
        "2852039166",  # 169.254.169.254 as one number
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "[fe80::1]",
        "[fe80::1%25lo]",
        "[::ffff:169.254.169.254]",  # mapped
        "[::ffff:0:a9fe:a9fe]",  # translated
        "[::169.254.169.254]",  # compatible
        "[64:ff9b::a9fe:a9fe]",  # NAT64
        "[64:ff9b:1::a9fe:a9fe]",  # local NAT64
        "[2002:a9fe:a9fe::1]",  # 6to4
        "[2001:0:4136:e378:8000:63bf:5601:5601]",  # Teredo, the client's address turned over
        "[fd00:ec2::254]",
        "[fd20:ce::254]",
        "100.100.100.200",
        "[64:ff9b::6464:64c8]",  # 100.100.100.200 behind NAT64
        "192.0.0.192",
        "168.63.129.16",
        "224.0.0.1",
        "metadata.google.internal",
        "METADATA.google.internal.",
        "instance-data",
    ],
)
def test_no_way_of_writing_it_reaches_a_metadata_service(host: str) -> None:
    with pytest.raises(RecipeError, match=r"^run\.teacher_url.*metadata"):
        check(f"http://{host}/v1")
    with pytest.raises(RecipeError, match=r"^run\.s3\.endpoint.*metadata"):
        open_store("s3://bucket/x", S3Options(endpoint=f"http://{host}"))


NO_ADDRESS = ["file:///etc/passwd", "ftp://host/v1", "127.0.0.1:8000/v1", "nonsense", "http:///v1", "http://host:99999/v1"]


@pytest.mark.parametrize("url", [*NO_ADDRESS, "http://[::1/v1", "http://host/v1?a=b", "http://host/v1#a", ""])
def test_what_is_no_plain_address_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=r"^run\.teacher_url"):
        check(url)


def test_a_name_that_resolves_to_a_metadata_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("64:ff9b::a9fe:a9fe", 80, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(RecipeError, match=r"innocent\.example.* 169\.254\.169\.254"):
        check("https://innocent.example/v1")


def test_ordinary_addresses_pass() -> None:
    for url in (
        "http://127.0.0.1:8000/v1",
        "http://localhost:8000/v1",
        "http://10.0.0.3/v1",
        "https://[::1]:8000/v1",
        "http://[64:ff9b::808:808]",
    ):
        assert check(url) == url


PASSWORDS = {
    "http://user:canary@host/v1": "canary",
    "postgresql://me:p@canary@host:5432/db": "p@canary",
    "postgresql://me:p/canary@host/db": "p/canary",
    "postgresql://me:p#canary@host/db": "p#canary",
    "postgresql://me:can%61ry@host/db": "canary",
    "postgresql://host/db?user=me&password=x@canary": "x@canary",
    "postgresql://host/db?sslpassword=canary&sslmode=require": "canary",
    "https://host/mlflow?access_token=canary": "canary",
}


@pytest.mark.parametrize(("url", "password"), PASSWORDS.items())
def test_a_password_is_hidden_wherever_an_address_is_shown(url: str, password: str) -> None:
    assert holds_password(url)
    for shown in (redact_url(url), hide_passwords(f"no server at {url}!"), hide_passwords(f"{password} is wrong", url)):
        assert "canary" not in shown
        assert "can%61ry" not in shown
    assert redact_url("postgresql://me:p?canary@host/db") == "postgresql://***", "where the password ends cannot be told"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "sqlite:////tmp/a@b/mlflow.db", "postgresql://me@host/db?sslmode=require"])
def test_other_addresses_hold_none(url: str) -> None:
    assert not holds_password(url)
    assert hide_passwords(f"see {url}.") == f"see {url}."


@pytest.mark.parametrize("url", PASSWORDS)
@pytest.mark.parametrize(
    ("field", "variable"),
    [
        ("run.tracking", "MLFLOW_TRACKING_URI"),
        ("run.teacher_url", "KD_TEACHER_API_KEY"),
        ("run.s3.endpoint", "AWS_SECRET_ACCESS_KEY"),
        ("run.store", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_recipe_holds_no_password(field: str, variable: str, url: str) -> None:
    """A recipe is kept, printed and given to an orchestrator, which keeps it too."""
    with pytest.raises(RecipeError, match=rf"{re.escape(field)}: the address holds a password.*environment.*{variable}") as caught:
        load_recipe(RECIPE, [f"{field}='{url}'"])
    assert "canary" not in str(caught.value)


def test_the_endpoint_of_the_environment_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_core.store.s3.BACKOFF_SECONDS", 0.001)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:canary@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(KDError) as caught:
        open_store("s3://bucket/x", S3Options())
    assert "canary" not in str(caught.value)
