"""The headers that our Horovod adds: hashes and checksums by published vectors, and how ranks meet, by a program."""

from __future__ import annotations

import hashlib
import hmac
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import missing
from tests.support.repository import ROOT

HEADERS = ROOT / "launch" / "horovod" / "files" / "third_party" / "gloo"

# Of Gloo's own headers, what ours take.
STUBS = {
    "error.h": """#pragma once
#include <sstream>
#include <stdexcept>
namespace gloo {
struct IoException : std::runtime_error { using std::runtime_error::runtime_error; };
inline void put(std::ostringstream&) {}
template <typename T, typename... Rest> void put(std::ostringstream& out, const T& part, const Rest&... rest) {
  out << part;
  put(out, rest...);
}
}
#define GLOO_THROW_IO_EXCEPTION(...) do { \\
  std::ostringstream out; ::gloo::put(out, __VA_ARGS__); throw ::gloo::IoException(out.str()); } while (0)
""",
    "logging.h": """#pragma once
#include <cstdlib>
#define GLOO_ENFORCE(condition, ...) do { if (!(condition)) abort(); } while (0)
""",
}
PROGRAM = r"""
#include <arpa/inet.h>
#include <cstdio>
#include <iostream>
#include <sstream>
#include "gloo/common/crc32c.h"
#include "gloo/transport/tcp/introduction.h"
using namespace gloo;
using namespace gloo::transport::tcp;

std::string bytes(const std::string& hex) {
  std::string found;
  for (size_t i = 0; i < hex.size(); i += 2) found += char(std::stoi(hex.substr(i, 2), nullptr, 16));
  return found;
}

int main(int argc, char** argv) {
  const std::string what = argv[1];
  if (what == "accept" || what == "connect") {
    const auto deadline = introduction::Clock::now() + std::chrono::milliseconds(std::stoi(argv[3]));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = what == "accept" ? 0 : htons(std::stoi(argv[4]));
    int fd = -1;
    try {
      if (what == "connect") {
        fd = introduction::connectToMember((sockaddr*)&address, sizeof(address), argv[2], "here", deadline);
      } else {
        const int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        socklen_t size = sizeof(address);
        if (bind(listener, (sockaddr*)&address, size) || listen(listener, 1024)) abort();
        getsockname(listener, (sockaddr*)&address, &size);
        std::cout << ntohs(address.sin_port) << std::endl;
        fd = introduction::acceptMember(listener, argv[2], "here", deadline);
      }
    } catch (const IoException& error) {
      std::cout << error.what() << std::endl;
      return 1;
    }
    std::cout << (fd == -1 ? "nobody" : "met") << std::endl;
    return fd == -1;
  }
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string key, data;
    words >> key >> data;
    data = bytes(data == "-" ? "" : data);
    if (what == "sha256") {
      Sha256 hash;
      for (size_t i = 0; i < data.size(); i += 7) hash.update(data.data() + i, std::min<size_t>(7, data.size() - i));
      const auto digest = hash.finish();
      std::cout << toHex(digest.data(), digest.size()) << "\n";
    } else if (what == "hmac") {
      Hmac code(bytes(key));
      code.update(data.data(), data.size());
      const auto digest = code.finish();
      std::cout << toHex(digest.data(), digest.size()) << "\n";
    } else {
      const size_t half = data.size() / 2;
      const auto whole = crc32c::extend(0, data.data(), data.size());
      const auto parts = crc32c::extend(crc32c::extend(0, data.data(), half), data.data() + half, data.size() - half);
      const auto slow = ~crc32c::extendByTable(~0u, (const uint8_t*)data.data(), data.size());
      std::cout << whole << " " << parts << " " << slow << "\n";
    }
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("headers")
    (folder / "gloo" / "common").mkdir(parents=True)
    for name, text in STUBS.items():
        (folder / "gloo" / "common" / name).write_text(text)
    (folder / "program.cc").write_text(PROGRAM)
    # As old a language as Gloo is built with.
    command = ["g++", "-std=c++11", "-Wall", "-Werror", "-O1", f"-I{folder}", f"-I{HEADERS}", "-pthread"]
    try:
        subprocess.run([*command, "-o", str(folder / "program"), str(folder / "program.cc")], check=True)
    except FileNotFoundError:
        missing("g++ is not installed: apt-get install g++")
    return str(folder / "program")


def answers(program: str, what: str, lines: list[str]) -> list[str]:
    done = subprocess.run([program, what], input="\n".join(lines), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_sha256(program: str) -> None:
    """FIPS 180-4's examples, and every length around the ends of blocks."""
    messages = [b"abc", b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", b"a" * 1_000_000]
    messages += [bytes(range(256))[:size] for size in range(130)]
    found = answers(program, "sha256", [f"- {message.hex() or '-'}" for message in messages])
    assert found[0] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert found[1] == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
    assert found[2] == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    assert found == [hashlib.sha256(message).hexdigest() for message in messages]


def test_hmac(program: str) -> None:
    """RFC 4231's test cases but for the truncated one."""
    cases = [
        (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
        (b"Jefe", b"what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
        (b"\xaa" * 20, b"\xdd" * 50, "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
        (bytes(range(1, 26)), b"\xcd" * 50, "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"),
        (
            b"\xaa" * 131,
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        ),
        (
            b"\xaa" * 131,
            b"This is a test using a larger than block-size key and a larger than block-size data. The key needs to be "
            b"hashed before being used by the HMAC algorithm.",
            "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
        ),
    ]
    found = answers(program, "hmac", [f"{key.hex()} {message.hex()}" for key, message, _ in cases])
    assert found == [expected for *_, expected in cases]


def test_crc32c(program: str) -> None:
    """RFC 3720's examples, and lengths around those that are done in three parts: at once, in pieces, by the table."""
    examples = {
        b"123456789": 0xE3069283,
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        bytes(range(31, -1, -1)): 0x113FDB5C,
        b"": 0,
    }
    data = hashlib.shake_128(b"some bytes").digest(20_000)
    lengths = [data[:size] for size in (1, 7, 8, 9, 3071, 3072, 3073, 6143, 6144, 6145, 12_288, 20_000)]
    found = answers(program, "crc", [f"- {message.hex() or '-'}" for message in [*examples, *lengths]])
    for line, expected in zip(found, examples.values(), strict=False):
        assert line.split() == [str(expected)] * 3
    assert all(len(set(line.split())) == 1 for line in found)
    assert len(set(found)) == len(found)


KEY = "k" * 64


class Meeting:
    """A program that listens for a member, and what came of it."""

    def __init__(self, program: str, milliseconds: int = 20_000) -> None:
        command = [program, "accept", KEY, str(milliseconds)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def join(self, program: str, key: str = KEY, milliseconds: int = 10_000) -> str:
        """What another program finds that connects."""
        command = [program, "connect", key, str(milliseconds), str(self.port)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()

    def result(self) -> str:
        return self.process.communicate(timeout=30)[0].strip()


@pytest.fixture
def meeting(program: str) -> Iterator[Meeting]:
    meeting = Meeting(program)
    yield meeting
    meeting.process.kill()
    meeting.process.wait()


def test_members_meet(program: str, meeting: Meeting) -> None:
    assert meeting.join(program) == "met"
    assert meeting.result() == "met"


def proof(what: str, *parts: bytes) -> bytes:
    code = hmac.new(KEY.encode(), digestmod="sha256")
    for part in (what.encode(), *parts):
        code.update(len(part).to_bytes(8, "big") + part)
    return code.digest()


def test_the_proof_is_as_it_is_told(meeting: Meeting) -> None:
    """By another implementation, one byte at a time."""
    with meeting.connect() as member:
        challenge, nonce = member.recv(32), bytes(range(32))
        for byte in nonce + proof("gloo connect", challenge, nonce, b"here"):
            member.sendall(bytes([byte]))
        assert member.recv(32) == proof("gloo accept", challenge, nonce)
    assert meeting.result() == "met"


def test_who_does_not_know_the_key_is_let_go(program: str, meeting: Meeting) -> None:
    assert meeting.join(program, key="another" * 9, milliseconds=500) == "connect here: no answer in time"
    with meeting.connect() as stranger:
        challenge, nonce = stranger.recv(32), bytes(32)
        # What would be right elsewhere, as for one who passes on what a member said to him.
        stranger.sendall(nonce + proof("gloo connect", challenge, nonce, b"there"))
        assert stranger.recv(1) == b""
    with meeting.connect() as stranger:
        stranger.recv(32)
        stranger.sendall(nonce + proof("gloo connect", challenge, nonce, b"here"))  # to an earlier challenge
        assert stranger.recv(1) == b""
    assert meeting.join(program) == "met"


def test_a_member_gets_in_among_strangers_who_say_nothing(program: str, meeting: Meeting) -> None:
    strangers = [meeting.connect() for _ in range(300)]
    deadline = time.monotonic() + 10
    while len(list(Path(f"/proc/{meeting.process.pid}/fd").iterdir())) < 60:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(list(Path(f"/proc/{meeting.process.pid}/fd").iterdir())) < 80, "most of them were let go"
    assert meeting.join(program) == "met"
    assert meeting.result() == "met"
    for stranger in strangers:
        stranger.close()


def test_a_member_gets_in_while_strangers_keep_coming(program: str, meeting: Meeting) -> None:
    stop = threading.Event()

    def come() -> None:
        waiting: list[socket.socket] = []
        while not stop.is_set():
            try:
                waiting.append(meeting.connect())
            except OSError:
                return
            if len(waiting) > 200:
                waiting.pop(0).close()

    strangers = [threading.Thread(target=come) for _ in range(4)]
    for stranger in strangers:
        stranger.start()
    try:
        assert meeting.join(program) == "met"
    finally:
        stop.set()
        for stranger in strangers:
            stranger.join()


def test_nobody_comes(program: str) -> None:
    assert Meeting(program, milliseconds=200).result() == "nobody"


def test_nobody_listens(program: str, meeting: Meeting) -> None:
    meeting.process.kill()
    meeting.process.wait()
    assert meeting.join(program) == "connect here: Connection refused"


def test_who_listens_must_know_the_key_too(program: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        command = [program, "connect", KEY, "5000", str(impostor.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as member:
            link, _ = impostor.accept()
            link.sendall(bytes(64))  # a challenge, and a proof that is none
            assert member.stdout
            assert member.stdout.read().strip() == "connect here: who listens there does not know the job's key"
        link.close()
