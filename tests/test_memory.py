"""When a program asks for large pages, and that asking changes nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minilm import memory

MODES = {"asked": "always [madvise] never", "unasked": "[always] madvise never",
         "never": "always madvise [never]"}  # fmt: skip


@pytest.fixture
def offered(tmp_path):
    def write(mode: str) -> Path:
        (tmp_path / "enabled").write_text(MODES[mode] + "\n")
        return tmp_path / "enabled"

    return write


def test_a_recent_glibc_is_told_where_the_kernel_waits_to_be_asked(offered):
    found = memory.environment({"HOME": "/root"}, offered("asked"), "glibc 2.36")
    assert found == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("known", "mode", "libc"),
    [
        ({}, "unasked", "glibc 2.36"),
        ({}, "never", "glibc 2.36"),
        ({}, "asked", "glibc 2.31"),
        ({}, "asked", "musl 1.2"),
        ({}, "asked", "no version at all"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "asked", "glibc 2.36"),
    ],
)
def test_elsewhere_and_over_the_users_own_nothing_is_set(offered, known, mode, libc):
    assert memory.environment(known, offered(mode), libc) == {}


def test_a_system_without_the_list_needs_nothing(tmp_path):
    assert memory.environment({}, tmp_path / "missing", "glibc 2.36") == {}


CHILD = """
import json, os, sys
from pathlib import Path
from minilm import memory

class Told(type(Path())):
    def read_text(self, *args, **kwargs):
        return "always [madvise] never"

memory.environment.__defaults__ = (os.environ, Told("x"), "glibc 2.36")
memory.restart()
print(json.dumps([os.getpid(), sys.argv[1:], os.environ["GLIBC_TUNABLES"]]))
"""


def test_a_host_that_reads_a_script_is_not_started_again():
    """From standard input there is nothing left to read; a notebook's kernel would be gone."""
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    code = CHILD.replace('os.environ["GLIBC_TUNABLES"]', 'os.environ.get("GLIBC_TUNABLES")')
    words = [sys.executable, "-", "one"]
    done = subprocess.run(words, input=code, env=clean, capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith('["one"], null]'), done.stderr


def test_a_restart_keeps_the_process_and_its_words(tmp_path):
    script = tmp_path / "a child.py"
    script.write_text(CHILD)
    clean = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    words = [sys.executable, str(script), "one two", "--three=4"]
    child = subprocess.Popen(words, env=clean, stdout=subprocess.PIPE, text=True)
    said = child.communicate(timeout=60)[0]
    assert said.strip() == f'[{child.pid}, ["one two", "--three=4"], "glibc.malloc.hugetlb=1"]'
