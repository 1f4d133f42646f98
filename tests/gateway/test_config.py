import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from vlmguard.errors import ConfigError
from vlmguard.gateway.config import SECTIONS, Settings, load
from vlmguard.gateway.config_text import hidden, toml
from vlmguard.guards.policy import Policy
from vlmguard.rewriter.protocol import CATEGORIES

EXAMPLE = Path(__file__).parents[2] / "docs" / "vlmguard.example.toml"
HASH = "ab" * 32
KEY = f'[[keys]]\nid = "app"\nsha256 = "{HASH}"\n'


@pytest.fixture(autouse=True)
def _target_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARGET_API_KEY", "sk-of-the-target")


def settings(text: str, tmp_path: Path, **overrides: Any) -> Settings:
    (tmp_path / "vlmguard.toml").write_text(text, encoding="utf-8")
    return load(tmp_path / "vlmguard.toml", {name.replace("__", "."): value for name, value in overrides.items()})


def problem(text: str, tmp_path: Path, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(text, tmp_path, **overrides)
    return str(caught.value)


def commented() -> str:
    """The example with what is commented out written out, so far as it goes together."""
    text = re.sub(r"^# (\[\[keys\]\]|\w+ = )", r"\1", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return text.replace('spec = "packaged', '# spec = "packaged')


def test_the_example_holds_the_defaults() -> None:
    assert load(EXAMPLE) == load() == Settings()


def test_the_example_has_every_key_and_a_comment_for_each() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    blocks = re.split(r"^(?:# )?\[+(\w+)\]+$", text, flags=re.MULTILINE)[1:]
    shown = dict(zip(blocks[::2], blocks[1::2], strict=True))
    assert shown.keys() == SECTIONS.keys()
    for section, model in SECTIONS.items():
        lines = re.findall(r"^(?:# )?(\w+) = .*?(?:  +| )# \S+", shown[section], flags=re.MULTILINE)
        assert set(lines) == set(model.model_fields), section


def test_what_the_example_comments_out_is_valid_too(tmp_path: Path) -> None:
    found = settings(commented(), tmp_path)
    assert found.target.url == "http://127.0.0.1:8000/v1"
    assert found.target.api_key == "sk-of-the-target"
    assert found.keys[0].routes == ("/v1/chat/completions",)
    assert (found.policy.unreadable, found.guard.threshold) == ("refuse", 0.5)
    assert found.telemetry.otlp_endpoint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[policy]\nmod = 'off'", "[policy] mod: unknown key; did you mean mode?"),
        ("[policy]\nmax_body_byte = 3", "[policy] max_body_byte: unknown key; did you mean [server] max_body_bytes?"),
        ("[polcy]\nmode = 'off'", "[polcy]: unknown section; did you mean [policy]?"),
        ("[key]\nid = 'a'", "[key]: unknown section; did you mean [[keys]]?"),
        ("[zzzzzz]\nmode = 'off'", "[zzzzzz]: unknown section; known are server, target,"),
        ("port = 80", "port: unknown key; did you mean [server] port?"),
        ("zzzzzz = 80", "zzzzzz: unknown key; known are [server],"),
        ("[breaker]\nzzzzzz = 80", "[breaker] zzzzzz: unknown key; known are failures, seconds"),
        (KEY + "modus = 'off'", "[[keys]] number 1 modus: unknown key; did you mean mode?"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_its_place(tmp_path: Path, text: str, message: str) -> None:
    assert message in problem(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server = 3", "[server]: expected a table, got 3"),
        ("[server]\nport = '80'", '[server] port: expected a whole number, got "80"'),
        ("[server]\nport = true", "[server] port: expected a whole number, got true"),
        ("[server]\nport = 70000", "[server] port: expected 65535 or less, got 70000"),
        ("[server]\nworkers = 0", "[server] workers: expected 1 or more, got 0"),
        ("[server]\ndocs = 'yes'", '[server] docs: expected true or false, got "yes"'),
        ("[server]\nhost = 1", "[server] host: expected text, got 1"),
        ("[guard]\nseconds = inf", "[guard] seconds: expected a finite number, got inf"),
        ("[guard]\nseconds = 0", "[guard] seconds: expected more than 0, got 0"),
        ("[guard]\nseconds = 2020-01-01", "[guard] seconds: expected a number, got 2020-01-01"),
        ("[guard]\nthreshold = 1.5", "[guard] threshold: expected 1 or less, got 1.5"),
        ("[guard]\nname = 'vlmguard-r2'", "[guard] name: no guard is named 'vlmguard-r2'; did you mean vlmguard-r1?"),
        ("[policy]\nmode = 'blok'", "[policy] mode: expected 'off', 'shadow', 'rewrite' or 'block', got \"blok\""),
        ("[policy]\nroutes = {'/v1/messages' = 'x'}", "[policy] routes.\"/v1/messages\": expected 'off'"),
        ("[policy]\ncategories = {fraud = 'x'}", "[policy] categories.fraud: expected 'off'"),
        ("[policy]\ncategories = {weapon = 'off'}", f"[policy]: a category: expected {', '.join(CATEGORIES)}, got"),
        (
            "[policy]\nroutes = {'/v1/message' = 'off'}",
            "[policy] routes: no route is named '/v1/message'; did you mean",
        ),
        ("[images]\nports = [443, 0]", "[images] ports[1]: expected 1 or more, got 0"),
        ("[images]\nhosts = 'a.example.com'", '[images] hosts: expected a list, got "a.example.com"'),
        ("[images]\nhosts = ['http://a.example.com/x']", "[images] hosts: expected names such as"),
        ("[images]\nhosts = ['127.0.0.1']", "[images] hosts: expected names such as"),
        ("[audit_log]\nurl = 'mysql://u:hunter2@h/d'", "[audit_log] url: expected sqlite:///FILE or postgresql://"),
        ("[telemetry]\nlog_level = 'all'", "[telemetry] log_level: expected 'debug'"),
        ("[telemetry]\notlp_endpoint = 'localhost'", "[telemetry] otlp_endpoint: expected an address"),
        ("[routes]\nallow = ['/v1/*']", '[routes] allow: expected whole paths such as "/v1/embeddings", got "/v1/*"'),
        ("[routes]\nallow = ['/v1/../x']", "[routes] allow: expected whole paths"),
        ("[routes]\nallow = ['/v1/embeddings']", "[routes] allow: goes with [target] url"),
        ("[[keys]]\nid = 'a'", "[[keys]] number 1 sha256: expected a value, got nothing"),
        ("[keys]\nid = 'a'", "[keys]: expected [[keys]], a table for each key, got a table"),
        (KEY + KEY.replace("app", "b"), "[[keys]] sha256: expected one for each key, got the same for app and b"),
        (KEY + KEY.replace("ab", "cd"), "[[keys]] id: expected one for each key, got the same for app and app"),
        (KEY.replace("app", "anonymous"), "[[keys]] number 1 id: expected up to 64 of"),
        (KEY + "routes = ['/v1/mesages']", "[[keys]] app routes: no route is named '/v1/mesages'; did you mean"),
        (KEY + "images = -1", "[[keys]] number 1 images: expected 0 or more, got -1"),
        (KEY + "mode = 'x'", "[[keys]] number 1 mode: expected 'off'"),
    ],
)
def test_a_wrong_value_says_what_is_expected(tmp_path: Path, text: str, message: str) -> None:
    assert message in problem(text, tmp_path)


def test_every_problem_of_a_file_is_named(tmp_path: Path) -> None:
    found = problem("[server]\nport = 'x'\nhots = 'y'\n[guard]\nseconds = -1", tmp_path)
    assert [line.partition(":")[0] for line in found.splitlines()] == [
        "[server] port",
        "[server] hots",
        "[guard] seconds",
    ]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/guard"])
def test_f009_a_guarded_route_cannot_be_allowed_unguarded(tmp_path: Path, route: str) -> None:
    text = f"[target]\nurl = 'http://127.0.0.1:8000'\n[routes]\nallow = ['/v1/rerank', '{route}']"
    assert f"[routes] allow: {route} is the gateway's own" in problem(text, tmp_path)


def test_routes_that_an_operator_allows(tmp_path: Path) -> None:
    text = "[target]\nurl = 'http://127.0.0.1:8000'\n[routes]\nallow = ['/v1/rerank']\n" + KEY
    found = settings(text + "routes = ['/v1/rerank', '/v1/models']", tmp_path)
    assert found.routes.allow == ("/v1/rerank",)
    assert found.keys[0].routes == ("/v1/rerank", "/v1/models")


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("https://host.example/v1/", "https://host.example/v1"),
        ("https://host.example/v1/chat/completions", "https://host.example/v1"),
        ("https://host.example/v1beta/openai/", "https://host.example/v1beta/openai"),
        ("HTTP://[::1]:80/v1", "http://[::1]/v1"),
    ],
)
def test_a_servers_address_with_or_without_v1(tmp_path: Path, url: str, root: str) -> None:
    target = settings(f"[target]\nurl = '{url}'", tmp_path).target
    assert (target.url, target.spec) == (root, None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000/v1", 'expected an address such as http://127.0.0.1:8000/v1, got "127.0.0.1:8000/v1"'),
        ("ftp://127.0.0.1/v1", "expected an address"),
        ("http:///v1", "expected an address"),
        ("http://[::1/v1", "expected an address"),
        ("http://host:99999/v1", "expected an address"),
        ("http://ho st/v1", "expected an address"),
        ("http://host/v1?key=hunter2", "expected an address without ? and #"),
        ("http://host/v1#qwen", "a model's name goes to model"),
        ("http://user:hunter2@host/v1", "holds a user or a password. Name the variable that holds it: api_key_env."),
        ("http://hunter2@host/v1", "holds a user or a password"),
    ],
)
def test_an_address_that_is_none_or_holds_a_key(tmp_path: Path, url: str, message: str) -> None:
    found = problem(f"[target]\nurl = '{url}'", tmp_path)
    assert found.startswith("[target] url: ")
    assert message in found
    assert "hunter2" not in found


def test_one_target_alone(tmp_path: Path) -> None:
    text = "[target]\nspec = 'packaged:assistant'\nurl = 'http://host/v1'"
    assert "[target]: expected spec or url, got both" in problem(text, tmp_path)
    text = "[target]\nspec = 'http://host/v1#a'\nmodel = 'b'"
    assert "[target]: expected one model, got one in spec and another" in problem(text, tmp_path)


def test_a_spec_that_is_an_address_becomes_the_url(tmp_path: Path) -> None:
    target = settings("[target]\nspec = 'http://host.example#org/model'", tmp_path).target
    assert (target.spec, target.url, target.model) == (None, "http://host.example/v1", "org/model")


def test_the_targets_key_is_in_the_environment_alone(tmp_path: Path) -> None:
    server = "[target]\nurl = 'http://host/v1'\n"
    found = settings(server + "api_key_env = 'TARGET_API_KEY'", tmp_path)
    assert found.target.api_key == "sk-of-the-target"
    assert "sk-of-the-target" not in found.shown() + repr(found) + str(found.model_dump())
    text = server + "api_key_env = 'NO_SUCH_VARIABLE'"
    assert "[target] api_key_env: the environment variable NO_SUCH_VARIABLE is not set" in problem(text, tmp_path)
    found_problem = problem(server + "api_key_env = 'sk-hunter2'", tmp_path)
    assert "expected the name of an environment variable" in found_problem
    assert "hunter2" not in found_problem


def test_a_key_for_no_server_or_two_for_one(tmp_path: Path) -> None:
    assert "go with url" in problem("[target]\napi_key_env = 'TARGET_API_KEY'", tmp_path)
    assert "go with url" in problem("[target]\npass_key = true", tmp_path)
    both = "[target]\nurl = 'http://host'\napi_key_env = 'TARGET_API_KEY'\npass_key = true"
    assert "got both" in problem(both, tmp_path)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("[target]\nurl = 'http://h'\napi_key = 'hunter2'", 'name that here: api_key_env = "NAME"'),
        ("[target]\nurl = 'http://h'\ntoken = 'hunter2'", 'name that here: api_key_env = "NAME"'),
        ("[guard]\napi_key = 'hunter2'", "set VLMGUARD_API_KEY to it"),
        (KEY + "key = 'hunter2'", "put its SHA-256 here as sha256"),
        (KEY.replace(HASH, "hunter2"), "expected 64 hexadecimal digits, got 7 characters; `vlmguard key` makes"),
        ("[guard]\nrewriter = 'http://u:hunter2@h/v1#m'", "Set VLMGUARD_API_KEY instead"),
        ("[telemetry]\notlp_endpoint = 'http://u:hunter2@h'", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("[audit_log]\nurl = 'my://u:hunter2@h/d'", "got a text of 18 characters"),
    ],
)
def test_a_secret_in_the_file_is_refused_with_advice_and_not_repeated(tmp_path: Path, text: str, advice: str) -> None:
    found = problem(text, tmp_path)
    assert advice in found
    assert "hunter2" not in found


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "::1"])
def test_this_machine_alone_needs_no_keys(tmp_path: Path, host: str) -> None:
    assert settings(f"[server]\nhost = '{host}'", tmp_path).server.is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "gateway.example.com", ""])
def test_other_machines_need_keys_or_an_open_door(tmp_path: Path, host: str) -> None:
    text = f"[server]\nhost = '{host}'\n"
    found = problem(text, tmp_path)
    assert "can be reached from other machines" in found
    assert "vlmguard key" in found
    assert "open = true" in found
    assert settings(text + KEY, tmp_path).keys[0].id == "app"
    assert settings(text + "open = true", tmp_path).server.open
    assert "[server] open: expected false where there are [[keys]]" in problem(text + "open = true\n" + KEY, tmp_path)


def test_options_stand_above_the_file(tmp_path: Path) -> None:
    text = "[server]\nport = 9000\nworkers = 3"
    found = settings(text, tmp_path, server__port=9001, server__host=None, guard__seconds=1)
    assert (found.server.port, found.server.workers, found.server.host, found.guard.seconds) == (
        9001,
        3,
        "127.0.0.1",
        1,
    )
    assert "[server] hots: unknown key; did you mean host?" in problem(text, tmp_path, server__hots="x")
    assert "can be reached from other machines" in problem(text, tmp_path, server__host="0.0.0.0")


def test_the_files_key_is_not_for_another_target(tmp_path: Path) -> None:
    text = "[target]\nurl = 'http://one'\nmodel = 'a'\napi_key_env = 'TARGET_API_KEY'\ntotal_seconds = 9"
    for option in ("target__spec", "target__url"):
        target = settings(text, tmp_path, **{option: "http://two/v1"}).target
        assert (target.url, target.model, target.api_key, target.total_seconds) == ("http://two/v1", None, None, 9)
    own = settings(text, tmp_path, target__url="http://two", target__api_key_env="TARGET_API_KEY").target
    assert own.api_key == "sk-of-the-target"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)
    assert "is not TOML" in problem("[server\nport = 1", tmp_path)
    assert "is not TOML" in problem("[server]\nport = 1\nport = 2", tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[server]\nhost = '\xe4'")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 17"):
        load(tmp_path / "latin.toml")


def test_the_policy_is_by_key_then_route_then_default(tmp_path: Path) -> None:
    text = (
        "[policy]\nmode = 'shadow'\nroutes = {'/v1/messages' = 'block'}\ncategories = {fraud = 'off'}\n"
        "timeout = 'open'\nupstream = 'refuse'\noverload = 'open'\nunreadable = 'refuse'\npictures = 'mask'\n"
    )
    found = settings(text + KEY + "mode = 'rewrite'\n" + KEY.replace("app", "b").replace("ab", "cd"), tmp_path)
    strict, plain = found.keys
    rest: dict[str, Any] = {"categories": {"fraud": "off"}, "timeout": "open", "upstream": "refuse", "overload": "open"}
    rest |= {"unreadable": "refuse", "pictures": "mask"}
    assert found.policy_for("/v1/responses", None) == Policy("shadow", **rest)
    assert found.policy_for("/v1/responses", plain) == Policy("shadow", **rest)
    assert found.policy_for("/v1/messages", plain) == Policy("block", **rest)
    assert found.policy_for("/v1/messages", strict) == Policy("rewrite", **rest)
    assert found.policy_for("/v1/messages", plain) is found.policy_for("/v1/messages", None)


def test_what_is_shown_is_in_effect_and_hides_secrets(tmp_path: Path) -> None:
    text = (
        "[target]\nurl = 'http://host'\napi_key_env = 'TARGET_API_KEY'\n"
        "[guard]\nrewriter = 'http://host/v1?api-version=hunter2#m'\n"
        "[policy]\nroutes = {'/v1/messages' = 'block'}\n"
        "[audit_log]\nurl = 'postgresql://audit:hun/te@r2@db/vlmguard?password=hunter2&sslmode=require'\n"
        "[telemetry]\notlp_endpoint = 'http://collector:4318'\n"
    )
    found = settings(text + KEY + "images = 0\n", tmp_path)
    shown = tomllib.loads(found.shown())
    assert "hunter2" not in found.shown() + repr(found)
    assert "te@r2" not in found.shown() + repr(found)
    assert HASH not in found.shown() + repr(found)
    assert shown["audit_log"]["url"] == "postgresql://audit:***@db/vlmguard?password=***&sslmode=***"
    assert shown["target"]["api_key_env"] == "TARGET_API_KEY"
    assert shown["keys"] == [{"id": "app", "sha256": "abababab...", "images": 0}]
    effective = found.model_dump(mode="json", exclude_none=True)
    for section in SECTIONS.keys() - {"keys", "audit_log", "guard"}:
        assert shown[section] == effective[section], section


def test_what_is_shown_of_the_defaults_loads_again(tmp_path: Path) -> None:
    assert settings(load().shown(), tmp_path) == load()


@pytest.mark.parametrize(
    "value",
    [True, 3, 0.25, 1e-9, 2e30, "", 'a "quoted" \\ line\n\t\x7f\x01 ü 🙂', ["a", 1], {"a b": {"c": []}, "d": "e"}],
)
def test_values_as_toml(value: object) -> None:
    assert tomllib.loads(f"value = {toml(value)}")["value"] == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sqlite:///vlmguard-audit.sqlite3", "sqlite:///vlmguard-audit.sqlite3"),
        ("sqlite:////var/lib/a:b@c.sqlite3", "sqlite:////var/lib/a:b@c.sqlite3"),
        ("postgresql+psycopg://:secret@/d", "postgresql+psycopg://:***@/d"),
        ("postgresql://user@host/d", "postgresql://user@host/d"),
        ("postgresql://u:a\nb@host/d", "postgresql://u:***@host/d"),
        ("packaged:assistant?a=b", "packaged:assistant?a=b"),
    ],
)
def test_an_address_without_its_secrets(text: str, shown: str) -> None:
    assert hidden(text) == shown


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().server.port = 1
