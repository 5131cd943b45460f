"""What errors of the engine become: whole sentences, files and remedies, whose fault."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from oq_runtime.engine import messages, oq
from oq_runtime.errors import InputError, NoWorkers, WorkerDied

#: the text of an error of a worker, as the engine raises it again in its own process
WORKER = """
  File "/venv/lib/openquake/baselib/parallel.py", line 441, in new
    val = func(*args)
          ^^^^^^^^^^^
  File "/venv/lib/openquake/{module}.py", line 62, in read
    raise {name}(text)
{name}: {text}"""


def raised(exc: BaseException, module: str, file: str = __file__) -> BaseException:
    """The error, raised by a function of a module of the engine that was about a file."""
    code = "def read(fname, exc):\n    raise exc\n"
    namespace: dict[str, object] = {}
    exec(compile(code, f"/venv/lib/openquake/{module}.py", "exec"), namespace)
    try:
        namespace["read"](file, exc)  # type: ignore[operator]
    except BaseException as found:
        return found
    raise AssertionError


@pytest.mark.parametrize(
    "named, there",
    [
        ("Sites.csv", " (there is sites.csv)"),
        ("gmf-2.csv", " (there is gmf_2.csv)"),
        ("sites.csv", ""),
        ("exposure.xml", ""),
        ("nowhere/sites.csv", ""),
    ],
)
def test_a_file_that_is_called_almost_so(tmp_path: Path, named: str, there: str) -> None:
    for name in "sites.csv", "gmf_2.csv", "job.ini":
        (tmp_path / name).touch()
    text = f"{tmp_path}/job.ini: No such file: {tmp_path}/{named}"
    assert messages.explain(OSError(text)) == text + there


@pytest.mark.parametrize(
    "exc, text",
    [
        (ValueError("\nOne thing must hold,\nand another.\n"), "One thing must hold, and another."),
        (ValueError("ValueError: ValueError: too big"), "too big"),
        (
            NameError("exposure.xml does not end with .xml"),
            "exposure.xml does not end with .xml (a blank ends a file name here)",
        ),
        (KeyError("PGA"), "KeyError: 'PGA'"),
        (AssertionError(), "AssertionError"),
        (
            AssertionError("<ImtWeight {'weight': 0.3}> in branchset bs1"),
            "gsim_logic_tree_file: the weights of branch set bs1 add up to 0.3, not 1",
        ),
        (
            ValueError("tmap.risk_id {'XX', 'Y'} not in the CompositeRiskModel"),
            "the vulnerability or fragility files have no function for 'XX', 'Y'; add it, or name "
            "another for that taxonomy in a taxonomy_mapping_csv",
        ),
        (
            OSError(errno.ENOENT, "No such file or directory", "/a/b"),
            "/a/b: No such file or directory",
        ),
        (InputError("job.ini is empty"), "job.ini is empty"),
        (SystemExit("Cannot do it: zero hazard"), "Cannot do it: zero hazard"),
        (ValueError(["a1", "a2"]), "ValueError: ['a1', 'a2']"),
        (
            OSError(r"No such file: /job/.\sites.csv"),
            r"No such file: /job/.\sites.csv (folders are parted by / here)",
        ),
        (ValueError("red \x1b[31m and \u202e back"), r"red \x1b[31m and \u202e back"),
    ],
)
def test_explained(exc: BaseException, text: str) -> None:
    assert messages.explain(exc) == text


@pytest.mark.parametrize("worker", [False, True])
def test_what_nobody_had_thought_of_says_where(worker: bool) -> None:
    """The text of HDF5 does not say what it has not found."""
    text = "'component not found'"
    if worker:
        exc: BaseException = RuntimeError(
            WORKER.format(module="getters", name="KeyError", text=text)
        )
    else:
        exc = raised(KeyError("component not found"), "getters")
    line = "raise KeyError(text)" if worker else ""
    assert messages.explain(exc) == f"KeyError: {text} (read in getters.py: {line})"


@pytest.mark.parametrize("text", ["105: no element found", "first,\nthen second"])
def test_explained_of_a_worker(text: str) -> None:
    exc = ValueError(WORKER.format(module="hazardlib/nrml", name="ValueError", text=text))
    assert messages.explain(exc) == " ".join(text.split())


def test_explained_of_a_lost_task() -> None:
    exc = WorkerDied("\nlost task\nWorkerDied: task #3 was given up after 3 attempts")
    assert messages.explain(exc) == "task #3 was given up after 3 attempts"


@pytest.mark.parametrize(
    "exc, verdict",
    [
        (raised(ValueError("wrong"), "risklib/asset"), True),
        (raised(RuntimeError("wrong"), "calculators/base"), False),
        (raised(type("InvalidFile", (Exception,), {})("wrong"), "calculators/base"), True),
        (raised(MemoryError(), "commonlib/readinput"), False),
        (raised(OSError(errno.ENOSPC, "No space left on device"), "commonlib/readinput"), False),
        (raised(NoWorkers("no node"), "commonlib/readinput"), False),
        (ValueError(WORKER.format(module="hazardlib/nrml", name="ValueError", text="x")), True),
        (
            ValueError(WORKER.format(module="hazardlib/calc/gmf", name="ValueError", text="x")),
            False,
        ),
    ],
)
def test_whose_fault(exc: BaseException, verdict: bool) -> None:
    assert messages.of_input(exc) is verdict


@pytest.mark.parametrize(
    "function, statement, verdict",
    [
        ("pre_execute", "raise RuntimeError('Wrong')", True),
        ("pre_execute", "1 / 0", False),
        ("execute", "raise RuntimeError('The sites are far from all sources')", True),
        ("execute", "raise RuntimeError('The events have duplicates')", False),
    ],
)
def test_what_the_engine_raises_on_purpose(
    tmp_path: Path, function: str, statement: str, verdict: bool
) -> None:
    path = tmp_path / "openquake" / "calculators" / "base.py"
    path.parent.mkdir(parents=True)
    path.write_text(f"def {function}():\n    {statement}\n")
    namespace: dict[str, Callable[[], None]] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    with pytest.raises((RuntimeError, ZeroDivisionError)) as error:
        namespace[function]()
    assert messages.of_input(error.value) is verdict


@pytest.mark.parametrize(
    "code, remedy",
    [(errno.ENOSPC, "free space or"), (errno.EDQUOT, "free space or"), (errno.EFBIG, "raise the")],
)
def test_no_room(code: int, remedy: str) -> None:
    try:
        try:
            raise OSError(code, "no matter", "/data/calc_1.hdf5")
        except OSError as exc:
            exc.strerror = os.strerror(code)
            raise RuntimeError("Can't decrement id ref count") from exc
    except RuntimeError as exc:
        text = messages.no_room(exc)
    assert re.fullmatch(rf"{os.strerror(code)}: /data/calc_1.hdf5; {remedy} .*", text)
    assert messages.no_room(ValueError("wrong")) == ""


def test_a_file_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "exposure.csv"
    file.write_text("id\n")
    nameless, named = ValueError("no header"), ValueError(f"{file}: no header")
    assert messages.input_text(nameless, []) == "no header"
    for exc in (nameless, named):
        found = raised(exc, "risklib/asset", str(file))
        assert messages.input_text(found, []) == f"{file}: no header"


def test_the_file_that_is_not_utf8(tmp_path: Path) -> None:
    good, bad, wide = (tmp_path / name for name in ("a.csv", "b.csv", "c.xml"))
    good.write_text("id\nà\n")
    bad.write_bytes("id,name\n1,Müller\n".encode("cp1252"))
    wide.write_text("id\n", encoding="utf-16")
    try:
        bad.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        error = exc
    text = messages.input_text(error, [str(good), str(bad), str(wide)])
    assert re.search(
        rf"{bad} is not UTF-8 at byte 11 \(line 2\); .*iconv.*ignore_encoding_errors", text
    )
    assert re.search(rf"{wide} is UTF-16", messages.input_text(error, [str(wide)]))
    # what a worker's one has become: it cannot be raised again with a text
    with pytest.raises(TypeError) as lost:
        raise UnicodeDecodeError("text")  # type: ignore[call-arg]
    assert str(bad) in messages.input_text(lost.value, [str(bad)])


@pytest.mark.parametrize(
    "data, words",
    [
        ("id,lon\n".encode("utf-32"), "is UTF-32; save it as UTF-8, e.g. iconv -f UTF-32"),
        ("id,lon\n".encode("utf-16-le"), "is not UTF-8: it has a zero at byte 1 (line 1); save"),
        (b"id,lon\n1,\0\n", "it has a zero at byte 9 (line 2)"),
        (b"PK\3\4\x14\0", "is an archive or a spreadsheet, not text; save it as CSV"),
        (b"\x1f\x8b\x08\0", "is compressed, not text; unpack it"),
        (b"id;lon\n1;10,5\n", "has columns between semicolons; save it with commas"),
        (b"id\tlon\n", "has columns between tabs; save it with commas"),
        (b"\xef\xbb\xbfsep=,\nid,lon\n", "begins with sep=, which only spreadsheets read; remove"),
        (b"<!DOCTYPE html>\n<html>", "is a web page, not a table; get the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS; git lfs pull"),
        (b" \n", "is empty"),
        (b"id,lon\n", ": missing {'id'}"),
    ],
)
def test_the_table_that_is_none(tmp_path: Path, data: bytes, words: str) -> None:
    """The engine only says what columns are missing, or that something is no number."""
    file = tmp_path / "exposure.csv"
    file.write_bytes(data)
    found = raised(ValueError("missing {'id'}"), "risklib/asset", str(file))
    text = messages.input_text(found, [])
    assert text.startswith(str(file)) and words in text


@pytest.mark.parametrize(
    "data, words",
    [
        (b"# made today\nid,lon\n\n", " has a header and no rows"),
        (b"10,-20\n", ": AttributeError: array (read in"),
        (b"lon,lat\n1,10\n", ": AttributeError: array (read in"),
    ],
)
def test_the_table_without_rows(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "sites.csv"
    file.write_bytes(data)
    found = raised(AttributeError("array"), "openquake/commonlib/readinput", str(file))
    assert messages.input_text(found, []).startswith(f"{file}{words}")


def test_the_encoding_that_an_xml_file_does_not_have(tmp_path: Path) -> None:
    file = tmp_path / "model.xml"
    file.write_text('<?xml version="1.0" encoding="UTF-8"?><a/>', encoding="utf-16")
    exc = ValueError(f"{file}: 1: encoding specified in XML declaration is incorrect")
    assert f"{file} is UTF-16" in messages.input_text(raised(exc, "baselib/node", str(file)), [])


def test_the_xml_file_that_is_none(tmp_path: Path) -> None:
    """The parser only says where: another encoding than the declared one, or no XML at all."""
    good, bad = tmp_path / "good.xml", tmp_path / "bad.xml"
    good.write_bytes('<?xml version="1.0" encoding="ISO-8859-1"?><a b="é"/>'.encode("latin-1"))
    bad.write_bytes('<?xml version="1.0"?><a b="é"/>'.encode("latin-1"))
    inputs = [str(good), str(bad)]
    exc = ValueError(f"{bad}: 1: not well-formed (invalid token)")
    assert f"{bad} is not UTF-8 at byte 27 (line 1); save it" in messages.encoding(exc, inputs)
    assert messages.encoding(exc, [str(good)]) == ""
    good.write_text(good.read_text("latin-1").replace("ISO-8859-1", "UTF-16"), encoding="utf-16")
    assert messages.encoding(exc, [str(good)]) == ""
    bad.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    exc = ValueError(f"{bad}: 1: syntax error")
    assert f"{bad} is a pointer of Git LFS; git lfs pull" in messages.encoding(exc, inputs)


def test_the_file_of_the_error_below(tmp_path: Path) -> None:
    """The engine names the logic tree where a source model in it is wrong."""
    sources, tree = tmp_path / "sources.xml", tmp_path / "tree.xml"
    sources.write_text("<a>")
    tree.write_text("<a/>")
    try:
        raise raised(ValueError("no element found"), "hazardlib/nrml", str(sources))
    except ValueError:
        exc = raised(ValueError(f"{tree}, line 6: no element found"), "hazardlib/lt", str(tree))
    expected = f"{sources}: {tree}, line 6: no element found"
    assert messages.input_text(exc, []) == expected


@pytest.mark.parametrize("level", ["ERROR", "CRITICAL"])
def test_the_last_line_of_a_log_is_what_the_user_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """The WebUI shows that; of an error that nobody had thought of, the engine's traceback."""
    from openquake.commonlib import logs

    said: list[tuple[object, ...]] = []

    def dbcmd(action: str, *arguments: object) -> object:
        said.append((action, *arguments))
        return [SimpleNamespace(level=level)]

    file = tmp_path / "calc_7" / "exposure.csv"
    file.parent.mkdir()
    file.write_text("id;lon\n")
    wrong = raised(ValueError("missing {'id'}"), "risklib/asset", str(file))

    def fail(log: object, exc: Exception) -> None:
        raise exc

    monkeypatch.setattr(logs, "dbcmd", dbcmd)
    monkeypatch.setattr(logs, "get_datadir", lambda: str(tmp_path))
    engine = SimpleNamespace(run_calc=fail)
    oq.install_run_calc(engine)
    log = SimpleNamespace(calc_id=7, params={"inputs": {"exposure": [str(file)]}})
    with pytest.raises(ValueError, match="missing"):
        engine.run_calc(log, wrong)
    line = "exposure.csv has columns between semicolons; save it with commas"
    assert said[-1][:2] + said[-1][3:] == ("log", 7, level, "oq_runtime", line)
    said.clear()
    with pytest.raises(KeyError):
        engine.run_calc(log, KeyError("x"))
    assert said == []


def test_inputs_are_nested() -> None:
    inputs = {"a": "1", "b": ["2", "3"], "c": {"d": "4", "e": ["5"]}, "f": 6}
    assert list(messages.files(inputs)) == ["1", "2", "3", "4", "5"]


def test_files_that_a_logic_tree_names(tmp_path: Path) -> None:
    tree = tmp_path / "tree.xml"
    tree.write_text("<uncertaintyModel>sources.xml\n area.xml</uncertaintyModel>")
    (tmp_path / "sources.xml").write_bytes("<sourceModel name='\xe9'>".encode("latin-1"))
    exc = ValueError(f"filename '{tree}', line 1: 'utf-8' codec can't decode byte 0xe9")
    assert f"{tmp_path}/sources.xml is not UTF-8 at byte 19" in messages.encoding(exc, [str(tree)])
    assert messages.no_file([str(tree), str(tmp_path)]) == ""
    os.mkfifo(tmp_path / "area.xml")
    assert f"{tmp_path}/area.xml is not a file" in messages.no_file([str(tree)])
    assert "/dev/zero is not a file" in messages.no_file(["/dev/zero"])
