"""A user's own file: what is imported and called, what is not, and what is said where it fails."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.provenance import file_sha256
from isomorphic.user_file import UserFile, is_user_file, load_factory
from tests.faults import one_line

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(width, 3)

    def forward(self, x):
        return self.first(x)
"""

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes `own.py` and gives its path."""

    def file(source: str) -> str:
        (tmp_path / "own.py").write_text(source)
        return str(tmp_path / "own.py")

    return file


def refusal(source: str, **kwargs: object) -> str:
    """What is said of a source; the search path is left as it was."""
    path = list(sys.path)
    with pytest.raises(UserError) as error:
        load_factory(source).build(kwargs)
    assert sys.path == path
    return one_line(error)


# --- what is a user's file ---


@pytest.mark.parametrize("source", ["net.py:build", "a/b.c/net.py:build", "/net.py:Net", "net.py", "net.py:", ".py:x"])
def test_sources_that_name_a_file(source: str):
    assert is_user_file(source)


@pytest.mark.parametrize(
    "source",
    [
        "resnet18",
        "vit.augreg_in1k",
        "hf-hub:a/model",
        "local-dir:/a",
        "net.pyc:build",
        "",
        ":",
        "a:b",
        "net.safetensors",
    ],
)
def test_sources_that_do_not(source: str):
    assert not is_user_file(source)


def test_other_files_are_recognised_to_be_refused(tmp_path: Path):
    (tmp_path / "net.txt").write_text(NET)
    assert is_user_file(f"{tmp_path}/net.txt:Net")
    assert "net.txt is not a Python file" in refusal(f"{tmp_path}/net.txt:Net")


# --- importing ---


def test_functions_and_classes_are_factories(write: Write):
    path = write(NET + "def build(**kwargs):\n    return Net(**kwargs)\nsmall = lambda: Net(2)\n")
    assert load_factory(f"{path}:Net").build({}).get_parameter("first.weight").shape == (3, 4)
    assert load_factory(f"{path}:build").build({"width": 5}).get_parameter("first.weight").shape == (3, 5)
    assert load_factory(f"{path}:small").build({}).get_parameter("first.weight").shape == (3, 2)
    assert str(load_factory(f"{path}:build")) == "own.py:build"
    assert list(load_factory(f"{path}:Net").parameters) == ["width"]


def test_the_checksum_is_the_files_and_reading_runs_nothing(write: Write, tmp_path: Path):
    path = write(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + NET)
    assert UserFile.read(path).sha256 == file_sha256(path)
    assert not (tmp_path / "ran").exists()


def test_what_was_read_is_what_runs(write: Write):
    file = UserFile.read(write(NET))
    write("raise SystemExit")
    assert file.load("Net").build({}).get_parameter("first.weight").shape == (3, 4)


def test_a_file_is_imported_once_and_anew_where_it_changed(write: Write, tmp_path: Path):
    counting = f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n"
    first, second = (load_factory(write(counting + NET) + ":Net") for _ in range(2))
    assert first.make is second.make and (tmp_path / "count").read_text() == "x"
    changed = load_factory(write(counting + NET.replace("3", "7")) + ":Net")
    assert changed.build({}).get_parameter("first.weight").shape == (7, 4)
    assert first.build({}).get_parameter("first.weight").shape == (3, 4)
    assert (tmp_path / "count").read_text() == "xx"


def test_modules_beside_the_file_are_found_while_it_is_imported_and_called(write: Write, tmp_path: Path):
    (tmp_path / "own_parts_a.py").write_text("width = 6")
    (tmp_path / "own_parts_b.py").write_text("depth = 2")
    path = list(sys.path)
    source = "from own_parts_a import width\n" + NET
    source += "def build():\n    from own_parts_b import depth\n    return Net(width * depth)\n"
    assert load_factory(write(source) + ":build").build({}).get_parameter("first.weight").shape == (3, 12)
    assert sys.path == path


def test_a_file_may_arrange_its_own_search_path(write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    load_factory(write("import sys\nsys.path.pop(0)" + NET) + ":Net")


def test_dataclasses_pickles_and_the_files_own_place_work(write: Write, tmp_path: Path):
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
    source += "@dataclass\nclass Config:\n    widths: ClassVar[int] = 1\n    width: int = 4\n" + NET
    source += "def build():\n    net = Net()\n    net.config, net.place = Config(), __file__\n    return net\n"
    factory = load_factory(write(source) + ":build")
    model = factory.build({})
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model) and again.config == model.config
    assert model.place == str(tmp_path / "own.py")
    assert factory.make.__module__.startswith("_isomorphic_")


def test_a_file_is_compiled_by_its_own_future_imports(write: Write):
    """This project's modules postpone annotations; a user's file that does not gets them evaluated."""
    factory = load_factory(write(NET + "def build(width: int = 4):\n    return Net(width)\n") + ":build")
    assert factory.make.__annotations__ == {"width": int}


def test_a_main_guard_is_not_entered(write: Write):
    load_factory(write(NET + 'if __name__ == "__main__":\n    raise SystemExit(3)\n') + ":Net")


def test_the_model_is_put_where_the_caller_builds(write: Write):
    factory = load_factory(write(NET) + ":Net")
    assert not factory.build({}).get_parameter("first.weight").is_meta
    with torch.device("meta"):
        assert factory.build({}).get_parameter("first.weight").is_meta
    stubborn = load_factory(
        write(NET + 'import torch\ndef build():\n    with torch.device("cpu"):\n        return Net()\n') + ":build"
    )
    assert not stubborn.build({}).get_parameter("first.weight").is_meta
    with torch.device("meta"):
        assert stubborn.build({}).get_parameter("first.weight").is_meta


# --- what fails, in one line ---


def test_files_that_are_not_there(tmp_path: Path):
    assert refusal(f"{tmp_path}/own.py:build") == f"no such file: {tmp_path}/own.py"
    (tmp_path / "folder.py").mkdir()
    assert refusal(f"{tmp_path}/folder.py:build").startswith("no such file")
    assert refusal("resnet18") == "resnet18 is not path/to/file.py:factory"


def test_a_factory_has_to_be_named(write: Write):
    path = write(NET)
    for source in (path, f"{path}:"):
        assert refusal(source) == f"{path}: say which function or class of it makes the model, as in {path}:build"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make", "'make' is not in it (it defines Net, half)"),
        ("Net.forward", "'Net.forward' is not in it"),
        ("width", "'width' is not a function or class that it defines"),
        ("nn", "'nn' is not a function or class that it defines"),
        ("Linear", "'Linear' is not a function or class that it defines"),
        ("system", "'system' is not a function or class that it defines"),
        ("tiny", "'tiny' is not a function or class that it defines"),
        ("__import__", "'__import__' is not in it"),
        ("__builtins__", "'__builtins__' is not a function or class that it defines"),
        ("__class__", "'__class__' is not a function or class that it defines"),
    ],
)
def test_factories_are_what_the_file_defines(name: str, message: str, write: Write):
    path = write("from os import system\nfrom functools import partial\nfrom torch.nn import Linear\nwidth = 3" + NET
                 + "def half(): ...\ntiny = partial(Net, 2)\n")  # fmt: skip
    with pytest.raises(UserError) as error:
        load_factory(f"{path}:{name}")
    assert message in one_line(error) and path in str(error.value)


def test_a_file_without_definitions(write: Write):
    assert "'build' is not in it (it defines none)" in refusal(write("width = 3") + ":build")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import own_nonesuch", "ModuleNotFoundError: No module named 'own_nonesuch' (line 1)"),
        ("\n\nwidth = 1 / 0", "ZeroDivisionError: division by zero (line 3)"),
        ("x = 1\nraise ValueError('one\\ntwo')", "ValueError: one (line 2)"),
        ("def f():\n    raise KeyError\nf()", "KeyError (line 2)"),
        ("x = 1\ndef build(:\n    pass", "SyntaxError: invalid syntax (line 2)"),
        ("import sys\nsys.exit('usage: net.py')", "SystemExit: usage: net.py (line 2)"),
        ("x = '\0'", "SyntaxError: source code string cannot contain null bytes"),
        ("\nimport json\njson.loads('{')", "JSONDecodeError: Expecting property name enclosed in double quotes"),
    ],
    ids=lambda text: text.splitlines()[-1][:20],
)
def test_files_that_cannot_be_imported(source: str, message: str, write: Write):
    path, modules = write(source), set(sys.modules)
    assert refusal(f"{path}:Net").startswith(f"cannot import {path}: {message}")
    assert not any(name.startswith("_isomorphic_") for name in sys.modules.keys() - modules)


def test_an_error_beyond_the_file_names_the_line_that_led_there(write: Write, tmp_path: Path):
    (tmp_path / "own_broken.py").write_text("\n\n\nx = ]")
    said = refusal(write("x = 1\nfrom own_broken import x") + ":Net")
    assert "SyntaxError: unmatched ']' (own_broken.py, line 4) (line 2)" in said


def test_an_interrupted_import_stays_an_interrupt(write: Write):
    path = write("raise KeyboardInterrupt")
    modules = set(sys.modules)
    with pytest.raises(KeyboardInterrupt):
        load_factory(f"{path}:build")
    assert set(sys.modules) == modules


@pytest.mark.parametrize(
    ("body", "kwargs", "message"),
    [
        (
            "(): return Net(-1)",
            {},
            "cannot build own.py:build with its defaults: RuntimeError: Trying to create tensor",
        ),
        ("(a, b): ...", {"a": 1}, "cannot build own.py:build with {'a': 1}: TypeError: build() missing 1 required"),
        ("(): ...", {"width": 3}, "TypeError: build() got an unexpected keyword argument 'width'"),
        ("(): open('nonesuch')", {}, "FileNotFoundError: [Errno 2] No such file or directory: 'nonesuch' (line 11)"),
        ("(): raise_()", {}, "NameError: name 'raise_' is not defined (line 11)"),
        ("(): exit(3)", {}, "SystemExit: 3 (line 11)"),
        ("(): ...", {}, "own.py:build returns NoneType, not a torch.nn.Module"),
        ("(): return Net", {}, "own.py:build returns type, not a torch.nn.Module"),
        ("(): return Net().state_dict()", {}, "own.py:build returns OrderedDict, not a torch.nn.Module"),
        ("(): return nn.Flatten()", {}, "own.py:build returns a model without parameters"),
        (
            "(): return nn.LazyLinear(3)",
            {},
            "own.py:build returns a model without parameters; lazy layers need one image",
        ),
    ],
)
def test_factories_that_make_no_model(body: str, kwargs: dict[str, object], message: str, write: Write):
    assert message in refusal(write(NET + "def build" + body) + ":build", **kwargs)
