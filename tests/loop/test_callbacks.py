"""The user's save and load functions are called the way that their signatures allow."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from learnit_r8 import CheckpointError
from learnit_r8.loop.callbacks import LoadCallback, SaveCallback

STATE = {"epoch": 3}
PATH = Path("some/model")


def save_with(function):
    SaveCallback(function)(lambda: STATE, PATH)


class Model:
    def __init__(self):
        self.calls = []

    def save(self, path):
        self.calls.append((path,))

    def save_both(self, state_dict, filepath):
        self.calls.append((state_dict, filepath))

    def load(self, source):
        self.calls.append((source,))

    def load_told(self, source, from_ram=False):
        self.calls.append((source, from_ram))

    @staticmethod
    def static_save(filepath):
        Model.last = filepath

    def __call__(self, filepath):
        self.calls.append((filepath,))


BOTH = (STATE, str(PATH))
ONE = (str(PATH),)
SAVES = {
    "published": (lambda log: lambda state_dict, filepath: log.append((state_dict, filepath)), BOTH),
    "one": (lambda log: lambda filepath: log.append((filepath,)), ONE),
    "one of any name": (lambda log: lambda x: log.append((x,)), ONE),
    "path with an option": (lambda log: lambda filepath, verbose=False: log.append((filepath,)), ONE),
    "state with default path": (lambda log: lambda state, filepath="x": log.append((state, filepath)), BOTH),
    "star": (lambda log: lambda *args: log.append(args), BOTH),
    "star and keywords": (lambda log: lambda *args, **kw: log.append(args), BOTH),
    "three, the last optional": (lambda log: lambda state, path, tag="": log.append((state, path)), BOTH),
    "partial": (lambda log: functools.partial(lambda tag, filepath: log.append((filepath,)), "tag"), ONE),
    "keyword-only option": (lambda log: lambda filepath, *, tag="": log.append((filepath,)), ONE),
}


@pytest.mark.parametrize("name", SAVES)
def test_a_save_function_gets_what_it_takes(name):
    build, expected = SAVES[name]
    log = []
    save_with(build(log))
    assert log == [expected]


def test_methods_and_callable_objects_save():
    model = Model()
    for function in (model.save, model.save_both, model, Model.static_save):
        save_with(function)
    assert model.calls == [ONE, BOTH, ONE]
    assert Model.last == str(PATH)


def test_a_list_can_hear_what_is_saved():
    log = []
    save_with(log.append)
    assert log == [str(PATH)]


BAD_SAVES = {
    "no argument": lambda: None,
    "three arguments": lambda a, b, c: None,
    "only keywords": lambda *, filepath: None,
}


@pytest.mark.parametrize("name", BAD_SAVES)
def test_a_save_function_that_cannot_be_called_is_refused_early(name):
    with pytest.raises(TypeError, match=r"save_callback must take \(state_dict, filepath\) or \(filepath\)"):
        SaveCallback(BAD_SAVES[name])


LOADS = {
    "published": (lambda log: lambda filepath: log.append((filepath,)), lambda s, ram: (s,)),
    "told": (lambda log: lambda source, from_ram=False: log.append((source, from_ram)), lambda s, ram: (s, ram)),
    "told by position": (lambda log: lambda source, from_ram: log.append((source, from_ram)), lambda s, ram: (s, ram)),
    "told by keyword only": (
        lambda log: lambda source, *, from_ram: log.append((source, from_ram)),
        lambda s, ram: (s, ram),
    ),
    "another option": (lambda log: lambda source, strict=True: log.append((source, strict)), lambda s, ram: (s, True)),
    "star": (lambda log: lambda *args: log.append(args), lambda s, ram: (s,)),
    "any keyword": (lambda log: lambda source, **kw: log.append((source,)), lambda s, ram: (s,)),
}


@pytest.mark.parametrize("from_ram", [True, False])
@pytest.mark.parametrize("name", LOADS)
def test_a_load_function_gets_what_it_takes(name, from_ram):
    build, expected = LOADS[name]
    log = []
    LoadCallback(build(log))("source", from_ram=from_ram)
    assert log == [expected("source", from_ram)]


def test_methods_load():
    model = Model()
    LoadCallback(model.load)("a", from_ram=True)
    LoadCallback(model.load_told)("b", from_ram=True)
    assert model.calls == [("a",), ("b", True)]


@pytest.mark.parametrize(
    "function", [lambda: None, lambda a, b: None, lambda *, source: None], ids=["none", "two", "keyword"]
)
def test_a_load_function_that_cannot_be_called_is_refused_early(function):
    with pytest.raises(TypeError, match=r"load_callback must take \(source\) or \(source, from_ram\)"):
        LoadCallback(function)


@pytest.mark.parametrize("answer", [None, True, 1, 0, {}, "saved"])
def test_any_answer_but_false_is_success(answer):
    called = []

    def function(where):
        called.append(where)
        return answer

    save_with(lambda filepath: function(filepath))
    LoadCallback(lambda source: function(source))("x", from_ram=False)
    assert len(called) == 2
    assert called[1] == "x"


def test_false_means_failure():
    with pytest.raises(CheckpointError, match="save_callback returned False"):
        save_with(lambda filepath: False)
    with pytest.raises(RuntimeError, match="load_callback returned False"):
        LoadCallback(lambda source: False)("x", from_ram=True)


def test_an_error_inside_the_users_function_is_the_users_error():
    def save(filepath):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        save_with(save)
