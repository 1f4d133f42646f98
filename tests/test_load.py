import json
import sys
from pathlib import Path

import pytest

from tests import tiny
from vlmguard import load
from vlmguard.chat import Chat
from vlmguard.errors import ConfigError, MissingExtra, ModelError
from vlmguard.guards import GUARDS
from vlmguard.rewriter.rewriter import Prompted
from vlmguard.vlms import VLMS
from vlmguard.vlms.endpoint import Endpoint
from vlmguard.vlms.local import Local
from vlmguard.vlms.scripted import Scripted


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from vlmguard.vlms.scripted import Scripted\n"
        "vlm = Scripted('an instance')\n"
        "def made():\n    return Scripted('a function')\n"
        "class Mine(Scripted):\n    def __init__(self):\n        super().__init__('a class')\n"
        "@dataclass\nclass MyGuard:\n    vlm: object\n    strength: float = 1.0\n"
        "number = 3\n"
    )
    return path


def test_endpoint_specs() -> None:
    made = load.vlm("https://host.example/v1#org/model")
    assert isinstance(made, Endpoint)
    assert made.name == "https://host.example/v1#org/model"


async def test_scripted_specs() -> None:
    made = load.vlm("scripted:I can't: sorry")
    assert isinstance(made, Scripted)
    assert (await made(Chat.of("hi"))).text == "I can't: sorry"


@pytest.mark.parametrize(("name", "text"), [("vlm", "an instance"), ("made", "a function"), ("Mine", "a class")])
async def test_a_file_of_ones_own(own: Path, name: str, text: str) -> None:
    assert (await load.vlm(f"{own}:{name}")(Chat.of("hi"))).text == text


def test_a_guard_of_ones_own(own: Path) -> None:
    factory = load.guard(f"{own}:MyGuard")
    assert factory(None).strength == 1.0  # type: ignore[attr-defined]
    assert load.guard(f"{own}:MyGuard") is factory


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"base": "x", "threshold": 0.5, "instructed": false}', "is damaged: KeyError"),
        ('{"base": "x", "threshold": "low", "instructed": false, "format": 1}', "is damaged"),
        ('{"base": "x", "threshold": NaN, "instructed": false, "format": 1}', "expected a probability"),
        ('{"base": "x", "threshold": 7, "instructed": false, "format": 1}', "expected a probability, got 7"),
        ('{"base": "x", "threshold": 0.5, "instructed": false, "format": 9}', "has format 9, this is 1"),
    ],
)
def test_a_trained_rewriters_note_that_cannot_be_used_is_said(tmp_path: Path, told: str, problem: str) -> None:
    (tmp_path / "rewriter.json").write_text(told)
    for spec in (str(tmp_path), f"hf:base+{tmp_path}"):
        with pytest.raises(ConfigError, match=problem):
            load.rewriter(spec)


def test_a_rewriter_whose_training_has_not_ended_is_said(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has not ended.*--resume"):
        load.rewriter(str(tmp_path))


def test_a_trained_rewriter_of_the_packaged_base_is_put_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"base": "packaged:base", "threshold": 0.25, "instructed": True, "format": 1}
    (tmp_path / "rewriter.json").write_text(json.dumps(told))
    (tmp_path / "adapter_config.json").touch()
    loaded: list[tuple[str, str | None]] = []

    def local(path: str, adapter: str | None) -> Scripted:
        loaded.append((path, adapter))
        return Scripted("safe")

    monkeypatch.setattr("vlmguard.load._local", local)
    monkeypatch.setattr("vlmguard.vlms.assemble.ensure", lambda report: Path("cached"))
    made = load.rewriter(str(tmp_path))
    assert isinstance(made, Prompted)
    assert (made.threshold, made.instructed) == (0.25, True)
    load.rewriter(f"hf:other/base+{tmp_path}")
    (tmp_path / "adapter_config.json").unlink()
    load.rewriter(str(tmp_path))
    assert loaded == [("cached", str(tmp_path)), ("other/base", str(tmp_path)), (str(tmp_path), None)]


def test_a_folder_and_its_hf_spelling(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny.save("llava", tmp_path_factory.getbasetemp() / "tiny")
    for spec in (str(folder), f"hf:{folder}"):
        made = load.vlm(spec)
        assert isinstance(made, Local)
        assert made.name == "llava"
    with pytest.raises(ModelError, match="adapter"):
        load.vlm(f"hf:{folder}+{folder.parent / 'no-adapter'}")


def test_a_module(monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    monkeypatch.syspath_prepend(own.parent)
    assert isinstance(load.vlm("my:vlm"), Scripted)
    monkeypatch.delitem(sys.modules, "my")


@pytest.mark.parametrize("spec", ["", "asistant", "scriptd:hi", "hf:", "no/such/folder", "file:x"])
def test_no_such_form_lists_the_forms(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load.vlm(spec)
    for form in VLMS:
        assert form in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("packaged:asistant", "did you mean assistant"),
        ("packaged", "assistant, rewriter"),
        ("http://127.0.0.1:8000/v1", "#MODEL"),
        ("vlmguard.vlms.nothing:Name", "No module named"),
        ("vlmguard.vlms.scripted:Scriptd", "did you mean Scripted"),
        ("vlmguard.vlms.scripted:Scripted", "without arguments"),
    ],
)
def test_wrong_specs_say_what_is_near(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load.vlm(spec)


def test_wrong_files(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean my\.py"):
        load.vlm(f"{tmp_path}/mi.py:vlm")
    with pytest.raises(ConfigError, match="expected a VLM, got 'int'"):
        load.vlm(f"{own}:number")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match="cannot be imported"):
        load.vlm(f"{tmp_path}/broken.py:f")
    (tmp_path / "torchless.py").write_text("raise ModuleNotFoundError('no torch', name='torch')\n")
    with pytest.raises(MissingExtra, match=r"vlmguard-r1\[local\]"):
        load.vlm(f"{tmp_path}/torchless.py:f")


def test_a_local_model_without_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"vlmguard-r1\[local\]"):
        load.vlm("hf:org/model")


def test_unknown_guards_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean vlmguard-r1") as caught:
        load.guard("vlmguard-r2")
    assert all(name in str(caught.value) for name in GUARDS)


def test_every_form_is_explained() -> None:
    assert all(form and what and not what.endswith(".") for form, what in VLMS.items())
    assert all(":" in where for where in GUARDS.values())
