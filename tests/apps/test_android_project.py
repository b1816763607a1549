"""What an Android project is made of: formatted sources, a pure core, resources that link, libraries on pages of 16 KB."""

from __future__ import annotations

import ast
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.android import AAR, ANDROID, API, CORE, HERE, KTLINT, MODEL, SCREEN, Client, kotlinc, passed, require
from helpers.apps import ROOT, project

from edgewright.apps.platforms import PLATFORMS
from edgewright.apps.render import render

FRAMEWORK = Path("/usr/share/android-framework-res/framework-res.apk")
NAME = "http://schemas.android.com/apk/res/android"
PAGE = 16384
_LOAD = 1


@pytest.fixture(scope="module")
def made(app_bundles: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of a tiny model whose weights are fetched."""
    folder = tmp_path_factory.mktemp("project") / "app"
    with pytest.MonkeyPatch.context() as patch:
        newer = {**vars(PLATFORMS["android"]), "runtime": "1.32"}  # nothing of it is run here
        patch.setitem(PLATFORMS, "android", type(PLATFORMS["android"])(**newer))
        name = 'it\'s <A> & "B" \\ C'
        project(app_bundles("t5gemma"), folder, "android", name=name, weights_url="https://example.org/m")
    return folder


def test_no_placeholder_is_left(made: Path) -> None:
    for path in (p for p in made.rglob("*") if p.suffix in (".kt", ".kts", ".xml", ".md", ".toml", ".properties")):
        text = path.read_text()
        assert not re.search(r"\{%|\{\{|TODO|None", text), path.name
        assert "/tmp" not in text, path.name


def test_what_lies_where(made: Path) -> None:
    assert {p.name for p in (made / MODEL).iterdir()} >= {
        "app.json",
        "traces.json",
        "download.json",
        "encoder.onnx",
        "tokenizer.json",
    }
    assert [p.name for p in (made / "upload").iterdir()] == ["weights.bin"]
    assert not (made / MODEL / "weights.bin").exists()


def test_the_network_is_asked_for_only_where_it_is_used(made: Path) -> None:
    text = (made / "app/src/main/AndroidManifest.xml").read_text()
    assert [p.get(f"{{{NAME}}}name") for p in ET.fromstring(text).iter("uses-permission")] == [
        "android.permission.INTERNET"
    ]
    source = (ROOT / "apps/android/app/src/main/AndroidManifest.xml.j2").read_text()
    assert "{% if url %}" in source


def test_the_core_knows_nothing_of_android(made: Path) -> None:
    pure = [*(made / CORE).glob("*.kt"), made / SCREEN / "Session.kt"]
    assert len(pure) > 15
    for path in pure:
        assert "import android" not in path.read_text(), path.name
    assert all("import android" in p.read_text() for p in (made / CORE / "android").glob("*.kt"))


def test_the_runtime_is_pinned_to_the_platforms(made: Path) -> None:
    versions = (made / "gradle/libs.versions.toml").read_text()
    assert f'onnxruntime = "{PLATFORMS["android"].runtime}.' in versions


def test_sources_are_of_a_size_to_read() -> None:
    for path in (ROOT / "apps/android").rglob("*.kt*"):
        assert path.read_text().count("\n") <= 400, path.name


@pytest.mark.slow
def test_ktlint_finds_nothing(made: Path) -> None:
    require("java")
    checked = [made / "**/*.kt", made / "**/*.kts", HERE / "*.kt"]
    passed("java", "-jar", KTLINT, f"--editorconfig={HERE / 'editorconfig'}", *checked)


def linked(made: Path, folder: Path) -> Path:
    """R.java of the sample's resources and manifest, linked against the resources of Android's own."""
    require("aapt2")
    if not FRAMEWORK.is_file():
        pytest.skip("no framework-res.apk here: apt-get install android-framework-res")
    manifest = folder / "AndroidManifest.xml"
    text = (made / "app/src/main/AndroidManifest.xml").read_text()
    manifest.write_text(text.replace("<manifest ", '<manifest package="edgewright.app" '))  # Gradle's namespace
    passed("aapt2", "compile", "--dir", made / "app/src/main/res", "-o", folder / "res.zip")
    options = ("--min-sdk-version", 27, "--target-sdk-version", 29, "--java", folder / "java", "-o", folder / "out.apk")
    passed("aapt2", "link", "-I", FRAMEWORK, "--manifest", manifest, *options, folder / "res.zip")
    return folder / "java" / "edgewright" / "app" / "R.java"


@pytest.mark.slow
def test_resources_and_manifest_link(made: Path, tmp_path: Path) -> None:
    text = linked(made, tmp_path).read_text()
    screen = (made / SCREEN / "MainActivity.kt").read_text()
    for kind, name in set(re.findall(r"\bR\.(\w+)\.(\w+)", screen)):
        assert re.search(rf"class {kind} \{{[^}}]*\bint {name}=", text), name
    said = passed("aapt2", "dump", "strings", tmp_path / "out.apk")
    assert 'it\'s <A> & "B" \\ C' in said


def alignments(library: Path) -> set[int]:
    """Of the segments that are loaded, of a 64-bit library."""
    data = library.read_bytes()
    assert data[:5] == b"\x7fELF\x02", library.name
    at, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    heads = [struct.unpack_from("<IIQQQQQQ", data, at + i * size) for i in range(count)]
    return {head[7] for head in heads if head[0] == _LOAD}


@pytest.mark.slow
@pytest.mark.parametrize("abi", ["arm64-v8a", "x86_64"])
def test_the_aars_libraries_lie_on_pages_of_16_kb(abi: str) -> None:
    require()
    libraries = sorted((AAR / "jni" / abi).glob("*.so"))
    assert [p.name for p in libraries] == ["libonnxruntime.so", "libonnxruntime4j_jni.so"]
    for library in libraries:
        assert min(alignments(library)) >= PAGE, library.name


@pytest.mark.slow
def test_the_aar_knows_what_turns_the_slow_path_off() -> None:
    """onnxruntime#33196; the thin layer sets it before a model is opened."""
    require()
    name = "ORT_GQA_DISABLE_FLASH_ATTENTION"
    assert name.encode() in (AAR / "jni/arm64-v8a/libonnxruntime.so").read_bytes()
    layer = ROOT / "apps/android" / CORE / "android"
    assert f'Os.setenv("{name}", "1", true)' in (layer / "Phone.kt").read_text()
    assert re.search(r"prepareRuntime\(\)\s+return installer\.open", (layer / "Assets.kt").read_text())


@pytest.mark.slow
def test_the_thin_layer_type_checks_against_androids_signatures(
    made: Path, android_client: Client, tmp_path: Path
) -> None:
    """Declarations of the classes of Android that are used: what is declared is held to a list of Android 36's API below."""
    require("javac")
    resources = linked(made, tmp_path)
    declared = sorted((HERE / "api").rglob("*.java"))
    passed("javac", "-nowarn", "-d", tmp_path / "api", *declared, resources)
    sources = [*(made / CORE / "android").glob("*.kt"), made / SCREEN / "MainActivity.kt"]
    kotlinc(sources, tmp_path / "classes", android_client.classes, tmp_path / "api")
    assert (tmp_path / "classes/edgewright/app/MainActivity.class").is_file()


def classes_of(package: Path) -> dict[str, ast.ClassDef]:
    """Name, `Outer.Inner` for an inner one -> the class, of a package in the list of Android's API."""
    found: dict[str, ast.ClassDef] = {}

    def add(body: list[ast.stmt], outer: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[outer + node.name] = node
                add(node.body, f"{outer}{node.name}.")

    add(ast.parse((package / "__init__.pyi").read_text()).body, "")
    return found


def members_of(name: str) -> set[tuple[str, int | None]]:
    """(method, its parameters) and (field, None) of a class of Android's and of those that it inherits from."""
    outer = re.match(r"(android(?:\.[a-z]\w*)*)\.([A-Z][\w.]*)$", name)
    if outer is None:
        return set()
    node = classes_of(API / outer[1].removeprefix("android").strip(".").replace(".", "/")).get(outer[2])
    assert node is not None, f"Android has no {name}"
    members: set[tuple[str, int | None]] = set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            arguments = [a.arg for a in (*item.args.posonlyargs, *item.args.args) if a.arg != "self"]
            members.add((item.name, len(arguments)))
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            members.add((item.target.id, None))
    for base in node.bases:
        text = ast.unparse(base)
        if text.startswith(("java.", "typing.")):
            continue
        members |= members_of(text if text.startswith("android.") else f"{outer[1]}.{text}")
    return members


@pytest.mark.slow
def test_what_is_declared_of_android_is_in_its_api(tmp_path: Path) -> None:
    """Class by class: each method, with as many parameters, and each field, in the list of Android 36's API."""
    require("javac")
    passed("javac", "-nowarn", "-d", tmp_path, *sorted((HERE / "api").rglob("*.java")))
    compiled = sorted(tmp_path.rglob("*.class"))
    assert len(compiled) > 20
    for path in compiled:
        name = path.relative_to(tmp_path).with_suffix("").as_posix().replace("/", ".")
        listed = members_of(name.replace("$", "."))
        for line in passed("javap", "-protected", "-cp", tmp_path, name).splitlines()[1:]:
            method = re.search(r"(\w+)\(([^)]*)\)", line)
            field = re.search(r"(\w+);$", line)
            if (
                method is not None
                and method[1] != name.rpartition(".")[2]
                and not line.strip().startswith(f"public {name}(")
            ):
                count = len([p for p in method[2].split(",") if p])
                assert (method[1], count) in listed, f"{name}: {line.strip()}"
            elif method is None and field is not None:
                assert (field[1], None) in listed, f"{name}: {line.strip()}"


def test_a_project_needs_its_values() -> None:
    with pytest.raises(Exception, match="'app' is undefined"):
        render("android", {})


def test_the_tools_are_those_that_the_makefile_names() -> None:
    text = (ROOT / "Makefile").read_text()
    for pinned in (
        "com.github.asus4.onnxruntime@0.4.9",
        "kotlin-compiler@2.4.20",
        "onnxruntime==1.29.0",
        "apps-tools-android",
    ):
        assert pinned in text
    assert ANDROID.name == "android"
