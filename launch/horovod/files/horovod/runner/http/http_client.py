"""Asks the rendezvous server of a job, with proof of the job's key."""

import http.client
import itertools
import secrets

from horovod.runner.http import authentication

MOST_BYTES = 1 << 20  # of an answer


class StoreClient:
    """Requests to one server, one at a time."""

    def __init__(self, addr: str, port: int, key: bytes | None = None) -> None:
        self._addr, self._port = addr, port
        self._key = key or authentication.job_key()
        self._name, self._numbers = secrets.token_hex(16), itertools.count()

    def request(self, method: str, scope: str, key: str, body: bytes = b"", timeout: float = 10) -> bytes | None:
        """Asks, and returns the answer as bytes; None where the server has nothing.

        Raises:
            OSError: the server cannot be reached, refuses, or is not the job's own.
        """
        path = f"/{scope}/{key}"
        nonce = f"{self._name}-{next(self._numbers)}"
        headers = {
            authentication.NONCE_HEADER: nonce,
            authentication.DIGEST_HEADER: authentication.request_digest(self._key, method, path, nonce, body),
        }
        # Not urllib, which would go through the proxy that a shell may name.
        connection = http.client.HTTPConnection(self._addr, self._port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = response.read(MOST_BYTES + 1)
        except http.client.HTTPException as error:
            raise OSError(f"{method} {path}: no proper answer") from error
        finally:
            connection.close()
        expected = authentication.answer_digest(self._key, nonce, response.status, answer)
        if not authentication.is_same(expected, response.headers.get(authentication.DIGEST_HEADER, "")):
            raise OSError(f"{method} {path}: the answer is not from the server of this job")
        if response.status == 404:
            return None
        if response.status != 200:
            raise OSError(f"{method} {path}: refused with {response.status}")
        return answer
