"""The student that the tests of training share."""

import pytest

from tests.toy import tiny_llama


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random tiny student; nothing changes it."""
    return tiny_llama(tmp_path_factory.mktemp("student"))
