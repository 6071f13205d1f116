"""Rules by type of layer: who answers for a parameter, and rules that other packages bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gcx._rules import Answer, Rule, Rules
from gcx.plan import LeaveAlone

GROUP = "gcx.tests.layers"


class Dense:
    pass


class Wide(Dense):
    pass


class Widest(Wide):
    pass


def rules(table: Mapping[Any, Rule[Answer]] | None = None) -> Rules[Answer]:
    return Rules(table or {}, group=GROUP)


def says(**answers: Answer) -> Rule[Answer]:
    return lambda _: answers


def test_what_nobody_declared_is_unknown() -> None:
    found, rule = rules().answer(Dense(), "weight")
    assert found == LeaveAlone("unknown: nobody declared Dense.weight")
    assert rule == "Dense"
    for table in ({}, {Dense: says(bias=None)}):
        assert rules(table).find(Dense(), "weight") is None


def test_nearest_class_that_knows_the_name_answers() -> None:
    """A rule is a function of a layer, or a mapping that is the same for all."""
    table = rules({Dense: {"weight": "io", "*": None}, Wide: says(weight="oi")})
    assert table.answer(Widest(), "weight") == ("oi", "Wide")
    assert table.answer(Widest(), "bias") == (None, "Dense")
    assert table.answer(Dense(), "weight") == ("io", "Dense")
    table.register(Wide)({"weight_?": "io", "weight_*": "oi"})  # the first that matches counts
    assert [table.answer(Wide(), f"weight_{k}")[0] for k in (1, 12)] == ["io", "oi"]


def test_globs_do_not_cross_dots() -> None:
    names = ["weight", "child.weight", "child.grandchild.weight"]
    for pattern, matches in {"*": names[:1], "*.weight": names[1:2]}.items():
        table = rules({Dense: {pattern: "io"}})
        assert [name for name in names if table.find(Dense(), name)] == matches


def test_rules_by_name_and_by_glob() -> None:
    table = rules({f"{__name__}.Dense": says(weight="io"), "absent_package.*": says(weight="oi")})
    assert table.answer(Wide(), "weight") == ("io", "Dense")
    table = rules({f"{__name__}.D*": says(weight="io"), f"{__name__}.*": says(weight="oi", b=None)})
    assert table.answer(Dense(), "weight") == ("io", "Dense")
    assert table.answer(Dense(), "b") == (None, "Dense")
    assert table.answer(Wide(), "weight") == ("oi", "Wide")


def test_registered_rule_replaces_that_of_the_table() -> None:
    table = rules({Dense: says(weight="io"), f"{__name__}.Dense": says(weight="oio")})
    assert table.answer(Wide(), "weight")[0] == "io"
    rule = says(weight="oi")
    assert table.register(Dense)(rule) is rule
    assert table.answer(Wide(), "weight")[0] == "oi"  # though Wide was asked before


def test_rule_of_another_kind() -> None:
    with pytest.raises(TypeError, match="takes the class of a layer, not <"):
        rules().register(Dense())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the rule of Dense is a mapping or a function, not 'io'"):
        rules().register(Dense)("io")  # type: ignore[type-var]
    with pytest.raises(TypeError, match="the rule of Dense returned 'io'; a rule returns a map"):
        rules({Dense: lambda _: "io"}).answer(Dense(), "weight")  # type: ignore[dict-item, return-value]


class Brought:
    """A layer of the package below."""


RULES_OF_A_PACKAGE = """
def input_first(layer):
    return {"weight": "io", "bias": None}

constant = 1
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a distribution that brings one rule for `Brought`, as pip would lay it out."""

    def install(refers_to: str, name: str = f"{__name__}.Brought") -> None:
        (tmp_path / "gcx_rules_of_a_package.py").write_text(RULES_OF_A_PACKAGE, encoding="utf-8")
        info = tmp_path / "brings_rules-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brings-rules\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {refers_to}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.mark.parametrize("name", [f"{__name__}.Brought", f"{__name__}.Br*"])
def test_package_brings_its_rules(package: Any, name: str) -> None:
    package("gcx_rules_of_a_package:input_first", name)
    table = rules({f"{__name__}.*": says(weight="oi", other="oio")})
    assert table.answer(Brought(), "weight") == ("io", "Brought")
    assert table.answer(Brought(), "other") == ("oio", "Brought")
    assert table.answer(Dense(), "weight")[0] == "oi"
    table.register(Brought)(says(weight="oi"))
    assert table.answer(Brought(), "weight")[0] == "oi"
    assert table.find(Brought(), "bias") == (None, "Brought")


@pytest.mark.parametrize("refers_to", ["gcx_no_such_module:rule", "gcx_rules_of_a_package:nothing"])
def test_rule_that_does_not_load_is_an_error_with_its_name(package: Any, refers_to: str) -> None:
    package(refers_to)
    table = rules()
    message = (
        rf"the entry point '{__name__}\.Brought' of group '{GROUP}', of the package brings-rules, "
        rf"does not load '{refers_to}': (ModuleNotFound|Attribute)Error: "
    )
    for _ in range(2):  # it is not forgotten
        with pytest.raises(ImportError, match=message):
            table.answer(Brought(), "weight")
    assert table.find(Dense(), "weight") is None  # which does not need it


def test_entry_point_is_a_rule(package: Any) -> None:
    package("gcx_rules_of_a_package:constant")
    with pytest.raises(TypeError, match="brings-rules, is a mapping or a function, not 1"):
        rules().answer(Brought(), "weight")
