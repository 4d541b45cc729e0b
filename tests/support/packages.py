"""Makes small packages for pip, and serves a folder of them as a package index on 127.0.0.1.

wheel = make_wheel(tmp_path, "some-package", "1.0")
with index(tmp_path, {wheel.name: digest(wheel)}) as url:
    ...
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SETUP = """{first}
from setuptools import setup

setup(name={name!r}, version={version!r}, py_modules=[{module!r}])
"""


def module_of(name: str) -> str:
    """Returns the name of the module of a package."""
    return name.replace("-", "_")


def make_wheel(
    folder: Path, name: str, version: str, source: str = "", requires: tuple[str, ...] = (), module: str = ""
) -> Path:
    """Writes a wheel with one module.

    Args:
        source: the text of the module.
        requires: lines of `Requires-Dist`.
        module: the module's name; by default that of the package.
    """
    package = module_of(name)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {one}\n" for one in requires)
    metadata += "".join(f"Provides-Extra: {extra}\n" for extra in re.findall(r"extra == '(.+?)'", " ".join(requires)))
    files = {
        f"{module or package}.py": source,
        f"{package}-{version}.dist-info/METADATA": metadata,
        f"{package}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{package}-{version}.dist-info/RECORD"
    files[record] = "".join(f"{path},,\n" for path in [*files, record])
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return path


def make_sdist(folder: Path, name: str, version: str, first: str = "") -> Path:
    """Writes a source distribution; `first` is the first statement of its setup.py."""
    module = module_of(name)
    files = {
        "setup.py": SETUP.format(first=first, name=name, version=version, module=module),
        f"{module}.py": "",
        "PKG-INFO": f"Metadata-Version: 1.0\nName: {name}\nVersion: {version}\n",
    }
    path = folder / f"{module}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for inside, text in files.items():
            entry = tarfile.TarInfo(f"{module}-{version}/{inside}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def index(folder: Path, told: dict[str, str]) -> Iterator[str]:
    """Serves the packages of a folder for a block, and yields the URL of the index.

    Args:
        told: the SHA-256 that the index gives of each file.
    """
    for path in [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]:
        project = folder / "simple" / path.name.split("-")[0].replace("_", "-")
        project.mkdir(parents=True, exist_ok=True)
        link = f'<a href="../../{path.name}#sha256={told[path.name]}">{path.name}</a>\n'
        with (project / "index.html").open("a", encoding="utf-8") as page:
            page.write(link)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple"
        server.shutdown()
